"""How far is each sampler from the solution on the same Brownian path, and from its moments, on mixtures of normals?

The denoiser is exact and not linear. σ runs from 3 to 0.1 in steps of equal length in ln σ, then to 0 by x = D(x; 0.1),
which every sampler does alike. Strong error: root mean square distance over the paths. Weak error: |E x² − E x*²|, with
x* the solution on the same path, which takes most of the Monte Carlo noise away; what is left of it is printed.
"""

import math
import os
import sys

import click
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from benchmarks import orders, plots, solvers

EVALUATIONS = (10, 18, 34, 66, 130)  # so that nobody loses more than one of them to steps being powers of two
# dpmpp_sde, churn and euler_ancestral mix their noise in a way that no Brownian path in λ describes.
ON_A_PATH = [
    'k-diffusion-dpmpp_2m_sde',
    'k-diffusion-dpmpp_3m_sde',
    'diffusers-EDM-dpm-2M-SDE',
    'torchsde-srk',
    'taylor',
    'rk',
]
SOLVERS = solvers.RIVALS | solvers.OURS


def available():
    """Those of `ON_A_PATH` that are installed."""
    return [name for name in ON_A_PATH if name in solvers.rivals() | solvers.OURS]


class PathNoise:
    """The normals of a path, two for each step; a peer that asks by times gets the increment of the next step."""

    def __init__(self, sampler, normals):
        increments_only = sampler.startswith(('k-diffusion', 'diffusers'))
        self._draws = iter(normals[::2] if increments_only else normals)
        self._nothing = torch.zeros_like(normals[0])

    def fresh(self, *_):
        return next(self._draws, self._nothing)  # diffusers draws once more for the last step, to multiply it by 0

    __call__ = fresh


def solve(name, path, problem, num_steps):
    noise = PathNoise(name, path.normals(num_steps, 1.0, name != 'taylor'))

    def denoise(x, sigma):
        return orders.PROBLEMS[problem](x, torch.as_tensor(sigma).reshape(-1)[0])

    sigmas = [*orders.equal_levels(num_steps).tolist(), 0.0]
    return SOLVERS[name].run(denoise, path.latents * sigmas[0], sigmas, noise)


def errors(name, path, problem, solution, evaluations):
    """(strong error, weak error, the weak error's standard deviation)"""
    num_steps = SOLVERS[name].levels(evaluations) - 1
    num_steps = 2 ** int(math.log2(max(num_steps, 1)))  # the path's cells divide by powers of two
    x = solve(name, path, problem, num_steps)
    gap = (x.square() - solution.square()).sum(-1)
    strong = float((x - solution).square().sum(-1).mean().sqrt())
    return strong, abs(float(gap.mean())), float(gap.std()) / math.sqrt(len(gap))


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--problem', help='Data', type=click.Choice(['mixture', 'mixture 2-D']), default='mixture')
@click.option('--paths', help='Brownian paths', metavar='INT', type=click.IntRange(min=2), default=4000)
@plots.option('the strong errors')
def main(problem, paths, plot_path):
    """Print strong and weak errors against network evaluations (a JVP counts as one more).

    \b
    python benchmarks/mixture.py
    """
    path = orders.Path(paths, orders.PROBLEMS[problem].dim)
    solution = solve('rk', path, problem, 1024)
    print('| ' + ' | '.join([f'{problem}: strong error; weak error', *map(str, EVALUATIONS)]) + ' |')
    print('|---' * (len(EVALUATIONS) + 1) + '|')
    lines = {}
    for name in (name for name in available()):
        cells = [errors(name, path, problem, solution, count) for count in EVALUATIONS]
        print('| ' + ' | '.join([name, *(f'{s:.1e}; {w:.1e} ± {e:.0e}' for s, w, e in cells)]) + ' |', flush=True)
        lines[name] = EVALUATIONS, [strong for strong, *_ in cells]
    if plot_path:
        plots.draw(plot_path, [plots.Panel(problem, 'network evaluations', lines)], 'strong error')


if __name__ == '__main__':
    main()
