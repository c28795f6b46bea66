"""Noise levels made for a network: its loss curve, and the levels that follow from it for any number of steps.

With few steps the levels matter more than the sampler. Between two levels D changes, and what a step leaves out grows
with the change of its loss m(σ) = E|D(x₀ + σn; σ) − x₀|² per pixel. Equal steps of m^¼ share the error out evenly: a
step that changes ln m by δ leaves C m δ⁴ of squared error (strong order 1.5), and Σ m δ⁴ is least where m^¼ δ is
constant. The last level comes out by itself: there m has fallen to m₀/N⁴, and the result is D. A heuristic, which
docs/method.md measures.
"""

import inspect
import math
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import click
import numpy as np
import torch

import sampler_2nd
from dnnlib import settings
from sampling import draw, run_record
from torch_utils import distributed as dist

SUFFIX = '.levels.json'
NUM_LEVELS, NUM_IMAGES = 24, 64  # of a curve that is measured
START_STEPS = 8  # of the images that a curve is measured on, where there are no others


class LossCurve(NamedTuple):
    """m(σ) at `sigmas`, which fall; `network`: the fingerprint of the network that it belongs to."""

    sigmas: tuple[float, ...]
    losses: tuple[float, ...]
    network: str | None = None

    def levels(self, num_steps: int, guided: bool = False) -> list[float]:
        """N levels from the highest one down, at equal steps of m^¼, linear in ln σ between those measured.

        Under guidance the curve is that of another D, and its levels are too low; their geometric mean with those that
        `rk` has without a curve is not.
        """
        z = np.minimum.accumulate(np.array(self.losses)) ** 0.25
        wanted = np.linspace(z[0], max(z[0] / num_steps, z[-1]), num_steps)
        # Of levels with equal m, the lowest: from there on D changes.
        distinct = np.append(z[1:] < z[:-1], True)
        made = np.exp(np.interp(-wanted, -z[distinct], np.log(self.sigmas)[distinct]))
        made[0] = self.sigmas[0]
        if guided and num_steps > 1:
            ends = sampler_2nd.levels_for_steps(num_steps) | {'sigma_max': self.sigmas[0]}
            made = np.sqrt(made * sampler_2nd.noise_levels(None, num_steps, **ends)[:-1])
        return [float(level) for level in made]

    def save(self, path: str, **how: Any) -> None:
        numbers = {'sigma': self.sigmas, 'loss': self.losses}
        rounded = {name: [float(f'{value:.6g}') for value in values] for name, values in numbers.items()}
        settings.save(path, {'network': self.network, **how, **rounded})


def read_curve(path: str) -> LossCurve:
    """The curve in a file.

    Raises:
        ValueError, OSError: there is none, or it is not one.
    """
    record = settings.read(path)
    try:
        sigmas, losses = (tuple(float(value) for value in record[name]) for name in ('sigma', 'loss'))
        values = np.array([sigmas, losses])
        sound = np.isfinite(values).all() and (values > 0).all() and (np.diff(values[0]) < 0).all()
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or len(sigmas) < 2:
        raise ValueError(f'{path} is no curve of levels: lists sigma, falling, and loss, of positive numbers')
    return LossCurve(sigmas, losses, record.get('network'))


def measure_curve(
    net: Any, images: torch.Tensor | None = None, seed: int = 0, progress: Callable[[], Any] = lambda: None
) -> LossCurve:
    """m(σ) of `net`, by one evaluation of each image at each level.

    Args:
        images: clean ones, [N, C, R, R] in [−1, 1], for a network without classes. Otherwise `NUM_IMAGES` are drawn, by
            `rk` in `START_STEPS` steps, of random classes.
        seed: of the images drawn, and of the noise, which is the same at all levels, so that the curve is smooth.
        progress: called after each evaluation of a batch.
    """
    device = next(net.parameters()).device
    seeds = range(seed, seed + (NUM_IMAGES if images is None else len(images)))
    rnd, labels = draw.StackedRandomGenerator(device, seeds), None
    if images is None:
        latents, classes = draw.draw_start(net, rnd, seeds, None)
        labels = None if classes is None else torch.eye(net.label_dim, device=device)[classes]
        rk = partial(sampler_2nd.ito_taylor_sampler, scheme='rk', num_steps=START_STEPS)
        images = rk(net, latents, labels, rnd.randn_like, callback=lambda *_: progress())
    denoise = sampler_2nd.Denoiser(net, labels)
    images = images.to(device, sampler_2nd.state_dtype(device))
    noise = rnd.randn_like(images)
    sigmas, losses = _measured_levels(net), []
    with torch.no_grad():
        for sigma in sigmas:
            losses.append(float((denoise(images + sigma * noise, sigma) - images).square().mean()))
            progress()
    return LossCurve(tuple(sigmas), tuple(losses), run_record.fingerprint(net))


def _measured_levels(net: Any) -> list[float]:
    low = max(0.002, float(sampler_2nd.property_of(net, 'sigma_min', 0)))
    high = min(80.0, float(sampler_2nd.property_of(net, 'sigma_max', math.inf)))
    sigmas = torch.logspace(math.log10(high), math.log10(low), NUM_LEVELS, dtype=torch.float64)
    sigmas[0], sigmas[-1] = high, low
    return sampler_2nd.rounded_levels(net, sigmas)[:-1]


# ----------------------------------------------------------------------------
# The option --levels.

HELP = 'Noise levels: auto (NETWORK.levels.json, for rk, where tune.py has made it), edm, such a file, or 80,3.9,0.5'


class Levels(click.ParamType):
    """auto, edm, a list of levels, or a file of a curve → 'auto', 'edm', floats or a `LossCurve`."""

    name = 'levels'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or value in ('auto', 'edm'):
            return value
        if re.fullmatch(r'[\d.eE+-]+(,[\d.eE+-]+)*', value):
            try:
                return sampler_2nd.given_levels(None, [float(text) for text in value.split(',')])[:-1]
            except ValueError as err:
                self.fail(f'{err}', param, ctx)
        try:
            return read_curve(os.path.expanduser(value))
        except (OSError, ValueError) as err:
            self.fail(f'{err}; --levels is auto, edm, a list such as 80,3.9,0.5, or a file of tune.py', param, ctx)


def beside(network: str) -> str:
    """Where the curve of a network file is kept."""
    return network + SUFFIX


def choose_levels(chosen: Any, sampler: partial, net: Any, network: str, guidance: float | None = None) -> partial:
    """The sampler with the noise levels that --levels asks for, and a line on what they are, unless they are its own.

    'auto' is for `rk` without levels of its own: the curve that lies beside the network file, if it is this network's.

    Raises:
        click.UsageError: levels that this sampler cannot take, or that its number of steps contradicts.
    """
    own = {name for name in sampler_2nd.EDM_LEVELS if name in sampler.keywords}
    num_steps = sampler.keywords.get('num_steps', 18)
    if chosen == 'auto':
        few_steps = getattr(sampler_2nd.SCHEMES.get(sampler.keywords.get('scheme', '')), 'few_steps', False)
        if own or not few_steps or not os.path.isfile(beside(network)):
            return sampler
        chosen = read_curve(beside(network))
        if chosen.network != run_record.fingerprint(net):
            dist.print0(f'Warning: {beside(network)} belongs to another network; tune.py makes one for this')
            return sampler
        dist.print0(f'Noise levels from {beside(network)}')
    elif own:
        raise click.UsageError(f'--levels and --{min(own)} exclude each other')
    elif 'sigmas' not in inspect.signature(sampler.func).parameters:
        raise click.UsageError('--levels is not for --sampler=ablation, whose levels follow from --disc')
    if chosen == 'edm':
        return partial(sampler, **sampler_2nd.EDM_LEVELS)
    if isinstance(chosen, LossCurve):
        chosen = chosen.levels(num_steps, guided=(guidance or 1) > 1)
    if len(chosen) != num_steps:
        raise click.UsageError(f'--levels has {len(chosen)} levels, and a step starts at each: --steps={len(chosen)}')
    return partial(sampler, sigmas=chosen)
