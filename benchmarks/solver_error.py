"""How far is each sampler from the solution of the network's SDE? The solver's error, without the network's.

The distance to real images mixes the network's error, which all samplers share, with the solver's. Here all get the
Brownian paths of the same seeds (`sampler_2nd.BrownianPath`) on EDM's noise levels, and are compared with `rk` at 256
steps on these paths. `taylor` weighs a path differently, and is compared with itself at 256 steps. Strong error: root
mean square distance of the pixels, in grey levels. Weak error: mean of x² − x*² for pixels in [−1, 1], with its
standard error; x* is the solution on the same path, so few images suffice.
"""

import itertools
import os
import sys

import click
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import sampler_2nd
from benchmarks import mixture, plots
from comparison.cells import clock_for
from dnnlib import options
from sampling import draw, networks
from torch_utils import distributed

SOLUTION_STEPS = 256


class Problem:
    """A network, and seeds with their latents, classes (seed k has number k mod their count) and Brownian paths."""

    def __init__(self, net, seeds, rho, batch):
        self.net, self.rho, self.batch = net, rho, batch
        self.path = sampler_2nd.BrownianPath(seeds)
        rnd = draw.StackedRandomGenerator('cpu', seeds)
        latents, classes = draw.draw_start(net, rnd, seeds, range(net.label_dim))
        device = next(net.parameters()).device
        self.latents = latents.to(device, sampler_2nd.state_dtype(device))
        self.labels = None if classes is None else torch.eye(net.label_dim)[classes].to(device)

    def denoise(self, x, sigma):
        labels = [None] * len(x) if self.labels is None else self.labels.split(self.batch)
        sigma = torch.as_tensor(sigma).reshape(-1)[0]
        parts = zip(x.split(self.batch), labels, strict=False)
        return torch.cat([sampler_2nd.Denoiser(self.net, label)(part, sigma) for part, label in parts])

    def solve(self, name, levels):
        """(images, seconds per image) of a sampler that makes `levels` steps, the last one to σ = 0.

        Without those for the path. On a CPU it is processor time, of all threads.
        """
        sigmas = [float(sigma) for sigma in sampler_2nd.noise_levels(self.net, levels, 0.002, 80, self.rho)]
        time_integral = name != 'taylor'
        steps = itertools.pairwise(sigmas[:-1])
        normals = [z for step in steps for z in self.path.normals(self.latents, *step, 1.0, time_integral)]
        noise = mixture.PathNoise(name, normals)
        seconds = clock_for(self.latents.device)
        start = seconds()
        with torch.no_grad():
            images = mixture.SOLVERS[name].run(self.denoise, self.latents * sigmas[0], sigmas, noise)
            images = images.cpu()  # waits for a GPU
        return images, (seconds() - start) / len(images)


def errors(x, solution):
    """(strong error, weak error, the weak error's standard error)"""
    gap = (x.square() - solution.square()).flatten(1).mean(1)
    strong = 127.5 * float((x - solution).square().mean().sqrt())
    return strong, float(gap.mean()), float(gap.std()) / len(gap) ** 0.5


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', help='Network pickle', metavar='PATH|URL', default=str(networks.SHIPPED_NETWORK))
@click.option('--seeds', help='Images', metavar='LIST', type=options.parse_int_list, default='0-99')
@click.option('--evaluations', help='Of the network, per image', metavar='LIST', default='8,12,16,24,32,64')
@click.option('--rho', help='Time step exponent', metavar='FLOAT', type=float, default=7)
@click.option('--sampler', 'names', help='Which samplers', metavar='NAME', multiple=True, default=mixture.ON_A_PATH)
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=50)
@click.option('--device', help='cuda, mps or cpu', metavar='NAME', default='cpu')
@plots.option('the strong error over evaluations and over seconds')
def main(network, seeds, evaluations, rho, names, batch, device, plot_path):
    """Print strong error; weak error ± its standard error, against network evaluations (a JVP counts as one more).

    \b
    python benchmarks/solver_error.py
    """
    if unknown := set(names) - set(mixture.ON_A_PATH):
        raise click.UsageError(f'--sampler={unknown.pop()!r} is not one of: {", ".join(mixture.ON_A_PATH)}')
    if len(seeds) < 2:
        raise click.UsageError('--seeds: one image has no standard error; give two or more')
    try:
        net = networks.open_network(network, distributed.select_device(device))
    except ValueError as err:
        raise click.UsageError(str(err)) from None
    problem = Problem(net, seeds, rho, batch)
    counts, solutions = options.parse_int_list(evaluations), {}
    over_evaluations, over_seconds = {}, {}
    print('| strong error; weak error | ' + ' | '.join(map(str, counts)) + ' |')
    print('|---' * (len(counts) + 1) + '|', flush=True)
    for name in (name for name in names if name in mixture.available()):
        best = 'taylor' if name == 'taylor' else 'rk'
        if best not in solutions:
            solutions[best], _ = problem.solve(best, SOLUTION_STEPS)
        problem.solve(name, 3)  # imports packages, warms up
        images, seconds = zip(*(problem.solve(name, mixture.SOLVERS[name].levels(n)) for n in counts), strict=True)
        found = [errors(x, solutions[best]) for x in images]
        over_evaluations[name], over_seconds[name] = ((work, [each[0] for each in found]) for work in (counts, seconds))
        cells = [f'{strong:.1f}; {weak:+.4f} ± {spread:.4f}' for strong, weak, spread in found]
        print(f'| {name} | ' + ' | '.join(cells) + ' |', flush=True)
    for name, x in solutions.items():
        energy = x.square().flatten(1).mean(1)
        print(f'E x*² = {float(energy.mean()):.4f} ± {float(energy.std()) / len(energy) ** 0.5:.4f} ({name})')
    if plot_path:
        title = f'{os.path.basename(network)}, rho = {rho:g}'
        axis = f'{"processor " * (device == "cpu")}seconds per image'
        panels = [plots.Panel(title, 'network evaluations', over_evaluations), plots.Panel(title, axis, over_seconds)]
        plots.draw(plot_path, panels, 'strong error, grey levels')


if __name__ == '__main__':
    main()
