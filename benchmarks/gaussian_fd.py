"""How far is each sampler's result from Gaussian data, with no sampling noise at all?

For data N(0, diag s²) every sampler is linear: its result is a matrix of coefficients over independent normals, and the
Fréchet distance Σ (s_i,out − s_i)² is exact arithmetic. The samplers run unchanged: `x` has a row per normal. σ runs
from 80 to 0.002. Work is counted in network evaluations; one with a JVP counts as two.
"""

import os
import sys

import click
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import sampler_2nd
from benchmarks import plots, solvers
from comparison import peers

EVALUATIONS = (12, 16, 24, 32, 48, 64, 96, 128)


def small_digits():
    """scikit-learn's 8×8 digits, [1797, 64], pixels in [−1, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise click.ClickException('these data need scikit-learn: pip install -e ".[bench]"') from None
    return load_digits().data / 8 - 1


def digits_spectrum():
    """The 64 principal standard deviations of `small_digits`, variances at least 1e-4."""
    variances = np.linalg.eigvalsh(np.cov(small_digits().T))[::-1]
    return torch.tensor(np.sqrt(variances.clip(1e-4)))


SPECTRA = {
    'digits': digits_spectrum,
    'power': lambda: 1 / torch.arange(1, 65, dtype=torch.float64),
    'two-scale': lambda: torch.tensor([1.0] * 8 + [0.03] * 56, dtype=torch.float64),
}


def frechet_distance(sampler: peers.Solver, stds: torch.Tensor, evaluations: int, rho: float) -> float:
    """Σ (s_out − s)²; nan where the evaluations pay for less than three noise levels."""
    num_levels = sampler.levels(evaluations)
    if num_levels < 3:
        return float('nan')
    sigmas = sampler_2nd.noise_levels(None, num_levels, 0.002, 80, rho)
    noise = peers.Columns(4 * num_levels + 4, len(stds))

    def denoise(x, sigma):
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)[:1]
        return x * (stds**2 / (stds**2 + sigma**2))

    x = sampler.run(denoise, noise.fresh() * sigmas[0], sigmas, noise)
    return float((x.double().square().sum(0).sqrt() - stds).square().sum())


def table(spectrum, rho, samplers, evaluations):
    """{name: [distance for each number of evaluations]}"""
    stds = SPECTRA[spectrum]()
    return {
        name: [frechet_distance(sampler, stds, count, rho) for count in evaluations]
        for name, sampler in samplers.items()
    }


def lead(results):
    """How many times smaller than the best stochastic peer's the best of ours is, for each column."""
    ours = np.nanmin([values for name, values in results.items() if name not in solvers.RIVALS], axis=0)
    stochastic = {name for name, solver in solvers.RIVALS.items() if solver.stochastic}
    rivals = [values for name, values in results.items() if name in stochastic]
    return np.nanmin(rivals, axis=0) / ours


def format_table(title, results, evaluations):
    lines = ['| ' + ' | '.join([title, *map(str, evaluations)]) + ' |', '|---' * (len(evaluations) + 1) + '|']
    for name, values in results.items():
        lines.append('| ' + ' | '.join([name, *(f'{1e3 * value:.3g}' for value in values)]) + ' |')
    lines.append(
        '| ' + ' | '.join(['*best stochastic peer ÷ ours*', *(f'*{ratio:.3g}*' for ratio in lead(results))]) + ' |'
    )
    return '\n'.join(lines)


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option(
    '--spectrum', 'spectra', help='Data', type=click.Choice(list(SPECTRA)), multiple=True, default=list(SPECTRA)
)
@click.option(
    '--rho', 'rhos', help='Time step exponent', metavar='FLOAT', type=float, multiple=True, default=[7.0, 3.0]
)
@click.option('--stochastic', help='Only samplers that add noise', is_flag=True)
@solvers.noise_options
@plots.option('work–precision diagrams')
def main(spectra, rhos, stochastic, plot_path, **noise):
    """Print tables of the exact Fréchet distance times 1000.

    \b
    python benchmarks/gaussian_fd.py --plot=docs/gaussian-fd.png
    """
    samplers = solvers.rivals() | solvers.ours_with(**noise, scheme_of=solvers.linear)
    samplers = {name: each for name, each in samplers.items() if each.stochastic or not stochastic}
    for name in peers.PEERS.keys() - peers.installed().keys():
        click.echo(f'{name}: not installed, left out ({peers.INSTALL})', err=True)
    tables = {}
    for spectrum in spectra:
        for rho in rhos:
            tables[spectrum, rho] = results = table(spectrum, rho, samplers, EVALUATIONS)
            click.echo(format_table(f'{spectrum}, rho = {rho:g}', results, EVALUATIONS) + '\n')
    if plot_path:
        panels = [
            plots.Panel(
                f'{spectrum}, rho = {rho:g}',
                'network evaluations',
                {name: (EVALUATIONS, values) for name, values in results.items()},
            )
            for (spectrum, rho), results in tables.items()
        ]
        rows = 1 if len(panels) <= 2 else len(rhos)
        plots.draw(plot_path, panels, 'exact Fréchet distance', rows, ylim=(2e-7, 1e2))


if __name__ == '__main__':
    main()
