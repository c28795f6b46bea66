"""How far is each sampler's result from data that are neither Gaussian nor known by a network only?

The data: normal laws of standard deviation `--bandwidth` around each of scikit-learn's 1,797 digits, 8×8 pixels in
[−1, 1]. Their denoiser is known exactly, so what differs from the data is the sampler's doing. Printed is the Fréchet
distance of the samples to the exact mean and covariance, mean ± standard deviation over seed sets. The last row, as
many draws from the data themselves, is what the best sampler can reach. σ runs from 80 to 0.002; an evaluation with a
JVP counts as two.
"""

import os
import statistics
import sys

import click
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import sampler_2nd
from benchmarks import gaussian_fd, solvers
from comparison.peers import Normals, Solver
from dnnlib import options
from metrics import distances

CHUNK = 4000  # images whose weights are computed at once


class KernelDensity:
    """A mixture of normals of one standard deviation, with equal weights. `points`: [k, d].

    `orders.Mixture` has any covariances, which would take too much memory for so many points.
    """

    def __init__(self, points: torch.Tensor, bandwidth: float):
        self.points, self.variance = points.double(), bandwidth**2
        self.mean = self.points.mean(0)
        self.covariance = torch.cov(self.points.T, correction=0) + self.variance * torch.eye(points.shape[1]).double()

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """E[x0 | x]: x and the points, weighted by their likelihoods. In float32, as a network does it."""
        total = self.variance + float(torch.as_tensor(sigma).reshape(-1)[0]) ** 2
        points = self.points.float()
        half_squares = points.square().sum(1) / 2
        parts = [((part @ points.T - half_squares) / total).softmax(1) @ points for part in x.float().split(CHUNK)]
        center = torch.cat(parts).to(x.dtype)
        return center + (self.variance / total) * (x - center)

    def sample(self, num: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.points), [num], generator=generator)
        noise = torch.randn([num, self.points.shape[1]], generator=generator, dtype=torch.float64)
        return self.points[chosen] + self.variance**0.5 * noise

    def frechet_distance(self, x: torch.Tensor) -> float:
        """|μ − μ'|² + tr(C + C' − 2 (C C')^{1/2}) for the exact μ, C and those of the samples x: [N, d]."""
        moments = x.mean(0), torch.cov(x.T), self.mean, self.covariance
        return distances.frechet_distance(*(each.numpy() for each in moments)).distance


def distance(density: KernelDensity, sampler: Solver, evaluations: int, rho: float, num: int, seed: int) -> float:
    """The Fréchet distance of `num` samples to the data."""
    sigmas = sampler_2nd.noise_levels(None, sampler.levels(evaluations), 0.002, 80, rho)
    noise = Normals(seed, [num, density.points.shape[1]])
    with torch.no_grad():
        return density.frechet_distance(sampler.run(density.denoise, noise.fresh() * sigmas[0], sigmas, noise).double())


def row(name: str, columns: list[list[float]]) -> str:
    cells = [f'{1e3 * statistics.mean(each):.3g} ± {1e3 * statistics.stdev(each):.2g}' for each in columns]
    return '| ' + ' | '.join([name, *cells]) + ' |'


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--bandwidth', help='Of the data', type=click.FloatRange(min=0, min_open=True), default=0.2)
@click.option('--num', help='Samples of each seed set', metavar='INT', type=click.IntRange(min=100), default=10000)
@click.option('--sets', help='Seed sets', metavar='INT', type=click.IntRange(min=2), default=3)
@click.option('--evaluations', help='Of the denoiser', metavar='LIST', default='12,16,24,32,48')
@click.option('--rho', help='Time step exponent', type=click.FloatRange(min=0, min_open=True), default=7)
@solvers.noise_options
@click.option('--sampler', 'names', help='Which samplers', metavar='NAME', multiple=True, show_default='all installed')
def main(bandwidth, num, sets, evaluations, rho, names, **noise):
    """Print Fréchet distances × 1000.

    \b
    python benchmarks/kernel_density.py
    """
    samplers = solvers.rivals() | solvers.ours_with(**noise)
    unknown = set(names) - set(samplers)
    if unknown:
        raise click.UsageError(f'--sampler={unknown.pop()!r} is not one of: {", ".join(samplers)}')
    counts = options.parse_int_list(evaluations)
    density = KernelDensity(torch.tensor(gaussian_fd.small_digits()), bandwidth)
    print('| ' + ' | '.join([f'bandwidth {bandwidth:g}, rho = {rho:g}', *map(str, counts)]) + ' |')
    print('|---' * (len(counts) + 1) + '|')
    for name in names or samplers:
        found = [[distance(density, samplers[name], n, rho, num, seed) for seed in range(sets)] for n in counts]
        print(row(name, found), flush=True)
    floor = [density.frechet_distance(density.sample(num, seed)) for seed in range(sets)]
    print(row('*the data*', [floor] * len(counts)))


if __name__ == '__main__':
    main()
