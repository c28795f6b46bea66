"""Our samplers and EDM's behind the call of comparison/peers.py, for noise and noise levels of the benchmarks' own."""

import itertools
import math
from functools import partial

import click
import torch

import sampler_2nd
from comparison.peers import PEERS, Solver, installed
from sampling import edm


def as_network(denoise, sigmas):
    """A network whose known noise levels are the `sigmas`: any schedule is one of ours then."""

    def net(x, sigma, class_labels=None):
        return denoise(x, sigma)

    net.round_sigma = lambda sigma: torch.tensor(sigmas[:-1], dtype=torch.float64) if sigma.ndim else sigma
    return net


def on_levels(sampler, **kwargs):
    """A sampler of ours as the call of comparison/peers.py."""

    def run(denoise, x, sigmas, noise):
        ends = {'sigma_max': sigmas[0], 'sigma_min': sigmas[0] / 2, 'num_steps': len(sigmas) - 1}  # round_sigma decides
        return sampler(as_network(denoise, sigmas), x / sigmas[0], randn_like=noise.fresh, **ends, **kwargs)

    return run


CHURN = {'S_churn': 40, 'S_min': 0.05, 'S_max': 50, 'S_noise': 1.003}  # of EDM's ImageNet-64


HEUN = {
    'heun, S_churn 40': Solver(on_levels(edm.edm_sampler, **CHURN), True, 2, -1),
    'heun': Solver(on_levels(edm.edm_sampler), False, 2, -1),
}
RIVALS = PEERS | HEUN


def rivals():
    """Those of `RIVALS` whose package is installed."""
    return installed() | HEUN


def linear(scheme):
    """The scheme without the bound on the change of D̂, for arithmetic with `Columns`, whose rows are no images.

    On Gaussian images the bound takes part in few steps from 12 evaluations on (docs/method.md).
    """
    chosen = sampler_2nd.SCHEMES[scheme]
    return chosen._replace(step=partial(chosen.step, bound=math.inf)) if scheme == 'rk' else chosen


def ours_with(etas=(1.0,), S_maxes=(math.inf,), S_noises=(1.0,), scheme_of=sampler_2nd.SCHEMES.get):
    """Our schemes with each of these strengths of noise, up to each of these noise levels, times each of these factors.

    A name tells what is unusual. `scheme_of`: what a name stands for, `linear` or as it is.
    """
    samplers = {}
    for eta, S_max, S_noise in itertools.product(etas, S_maxes, S_noises):
        told = '' if eta == 1 else f', eta {eta:g}'
        told += '' if S_max == math.inf else f', S_max {S_max:g}'
        told += '' if S_noise == 1 else f', S_noise {S_noise:g}'
        for scheme, costs in [('taylor', (2, -1)), ('rk', (1, 0))]:
            options = {'eta': eta, 'S_max': S_max, 'S_noise': S_noise}
            run = on_levels(sampler_2nd.ito_taylor_sampler, scheme=scheme_of(scheme), **options)
            samplers[f'{scheme}{told}'] = Solver(run, eta > 0, *costs)
    return samplers


OURS = ours_with()


def noise_options(command):
    """The options --eta, --S_max and --S_noise of our schemes: what `ours_with` takes, by its names."""
    below_sqrt_3, not_negative = click.FloatRange(0, math.sqrt(3), max_open=True), click.FloatRange(0)
    several = {'metavar': 'FLOAT', 'multiple': True}
    for option in [
        click.option('--S_noise', 'S_noises', help='Factor on it', default=[1.0], type=not_negative, **several),
        click.option('--S_max', 'S_maxes', help='Its highest level', default=[math.inf], type=not_negative, **several),
        click.option('--eta', 'etas', help='Noise of ours', default=[1.0], type=below_sqrt_3, **several),
    ]:
        command = option(command)
    return command
