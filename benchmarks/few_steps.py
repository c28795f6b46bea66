"""What do noise levels win in few steps, and does guidance diverge?

The data are those of kernel_density.py, whose denoiser is known exactly. First table: excess Fréchet distance of `rk`,
over that of draws from the data, at EDM's noise levels, at those for so many steps, and at those made from the loss
curve of the denoiser, as tune.py makes them. Second: guidance of one class of digits against all; the distance to the
sampler's own limit of 96 steps, and in brackets the largest pixel over the limit's.
"""

import os
import statistics
import sys
from functools import partial

import click
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import sampler_2nd
from benchmarks import gaussian_fd
from benchmarks.kernel_density import KernelDensity
from comparison.peers import Normals
from metrics import distances
from sampling.levels import LossCurve

STEPS, GUIDANCE, GUIDED_CLASS, LIMIT_STEPS = (6, 8, 10, 12), (2, 4, 7.5, 15), 5, 96
WITHOUT_BOUND = sampler_2nd.SCHEMES['rk']._replace(step=partial(sampler_2nd.rk_step, bound=float('inf')))


def as_network(density):
    return lambda x, sigma, class_labels=None: density.denoise(x, sigma)


def loss_curve(density, num=400):
    x = density.sample(num, seed=5)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sigmas = np.geomspace(80, 0.002, 60).tolist()
    losses = [float((density.denoise(x + sigma * noise, sigma) - x).square().mean()) for sigma in sigmas]
    return LossCurve(tuple(sigmas), tuple(losses))


def edm_levels(num_steps):
    return sampler_2nd.noise_levels(None, num_steps, **sampler_2nd.EDM_LEVELS)


def usual_levels(num_steps):
    return sampler_2nd.noise_levels(None, num_steps, **sampler_2nd.levels_for_steps(num_steps))


def sample(net, sigmas, num, scheme='rk', seed=0):
    noise = Normals(seed, [num, 64])
    return sampler_2nd.ito_taylor_sampler(net, noise.fresh(), None, noise, scheme=scheme, sigmas=sigmas)


def distance(x, y):
    """Fréchet distance of two sets of samples."""
    moments = x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T)
    return distances.frechet_distance(*(each.numpy() for each in moments)).distance


def print_table(head, columns, rows):
    print('\n| ' + ' | '.join([head, *map(str, columns)]) + ' |')
    print('|---' * (len(columns) + 1) + '|')
    for name, cells in rows.items():
        print('| ' + ' | '.join([name, *cells]) + ' |', flush=True)


def levels_table(points, bandwidth, num):
    density = KernelDensity(points, bandwidth)
    floor = statistics.mean(density.frechet_distance(density.sample(num, seed)) for seed in range(3))

    def cell(sigmas):
        return f'{1e3 * (density.frechet_distance(sample(as_network(density), sigmas, num)) - floor):.0f}'

    kinds = {'EDM': edm_levels, 'for so many steps': usual_levels, 'from the curve': loss_curve(density).levels}
    rows = {name: [cell(levels(n)) for n in STEPS] for name, levels in kinds.items()}
    print_table(f'bandwidth {bandwidth:g}, levels', STEPS, rows)


def guidance_table(points, classes, num, num_steps=8, bandwidth=0.12):
    whole, part = KernelDensity(points, bandwidth), KernelDensity(points[classes == GUIDED_CLASS], bandwidth)
    curve = loss_curve(whole)
    kinds = {
        'from the curve': (curve.levels(num_steps, guided=True), 'rk'),
        'from the curve, without the bound': (curve.levels(num_steps, guided=True), WITHOUT_BOUND),
        'for so many steps': (usual_levels(num_steps), 'rk'),
    }
    rows: dict[str, list[str]] = {name: [] for name in kinds}
    for guidance in GUIDANCE:
        net = sampler_2nd.Guided(as_network(part), as_network(whole), guidance)
        limit = sample(net, usual_levels(LIMIT_STEPS), num, seed=9)
        for name, (sigmas, scheme) in kinds.items():
            x = sample(net, sigmas, num, scheme)
            largest = float(x.abs().max() / limit.abs().max())
            rows[name].append(f'{1e3 * distance(x, limit):.0f} ({largest:.2f})')
    print_table(f'guided, {num_steps} steps', [f'w = {guidance:g}' for guidance in GUIDANCE], rows)


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--num', help='Samples', metavar='INT', type=click.IntRange(min=100), default=3000)
def main(num: int) -> None:
    """Print both tables, distances × 1000.

    \b
    python benchmarks/few_steps.py
    """
    from sklearn.datasets import load_digits

    points = torch.tensor(gaussian_fd.small_digits())
    for bandwidth in (0.12, 0.3):
        levels_table(points, bandwidth, num)
    guidance_table(points, torch.tensor(load_digits().target), num)


if __name__ == '__main__':
    main()
