"""Generate images with a diffusion model: seeds → PNG files.

`edm_sampler` and `ablation_sampler` are the samplers of Karras et al. 2022 (`--randn_like=db`); the second-order SDE
sampler (`--randn_like=ddb`) is in sampler_2nd.py. `generate_images` runs any of them, batch by batch, with random
numbers of its own for each seed: an image does not depend on what else is in its batch, nor on how many processes
share the work.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

import dnnlib
import sampler_2nd
from metrics import measure
from torch_utils import distributed as dist
from torch_utils import network_io

SHIPPED_NETWORK = Path(__file__).parent / 'ckpts' / 'edm-mnist-32x32-cond-vp.pkl'

# ----------------------------------------------------------------------------
# EDM's sampler.


@torch.no_grad()
def edm_sampler(
    net,
    latents,
    class_labels=None,
    randn_like=torch.randn_like,
    num_steps=18,
    sigma_min=0.002,
    sigma_max=80,
    rho=7,
    S_churn=0,
    S_min=0,
    S_max=float('inf'),
    S_noise=1,
    callback=None,
):
    """Heun's method on the probability-flow ODE, with noise added and removed again (churn).

    Karras et al. 2022 (arXiv 2206.00364), algorithm 2; without churn, algorithm 1. Evaluates `net` 2·num_steps − 1
    times. A step draws one normal, with or without churn, so that a seed means the same noise in either case. Arguments
    and `callback` are those of `sampler_2nd.ito_taylor_sampler`; S_churn spreads over the steps, at most √2 − 1 each.
    """
    denoise = sampler_2nd.Denoiser(net, class_labels)
    t_steps = sampler_2nd.noise_levels(net, num_steps, sigma_min, sigma_max, rho)
    x = latents.to(sampler_2nd.state_dtype(latents.device)) * t_steps[0]
    for i in range(num_steps):
        t_cur, t_next = t_steps[i : i + 2]
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= t_cur <= S_max else 0
        t_hat = round_sigma(net, (1 + gamma) * t_cur)
        x_hat = x + math.sqrt(max(t_hat**2 - t_cur**2, 0)) * S_noise * randn_like(x)

        D = denoise(x_hat, t_hat)
        slope = (x_hat - D) / t_hat
        x = x_hat + (t_next - t_hat) * slope
        if t_next > 0:
            slope_next = (x - denoise(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (slope + slope_next) / 2
        if callback is not None:
            callback(i, x, D, t_cur)
    return x


def round_sigma(net, sigma: float) -> float:
    return float(net.round_sigma(torch.tensor(sigma, dtype=torch.float64)))


# ----------------------------------------------------------------------------
# The ablation sampler: any noise schedule σ(t), scaling s(t) and choice of time steps.


@torch.no_grad()
def ablation_sampler(
    net,
    latents,
    class_labels=None,
    randn_like=torch.randn_like,
    num_steps=18,
    sigma_min=None,
    sigma_max=None,
    rho=7,
    solver='heun',
    discretization='edm',
    schedule='linear',
    scaling='none',
    epsilon_s=1e-3,
    C_1=0.001,
    C_2=0.008,
    M=1000,
    alpha=1,
    S_churn=0,
    S_min=0,
    S_max=float('inf'),
    S_noise=1,
    callback=None,
):
    """`edm_sampler` with each choice of Karras et al. 2022, table 1, free: x = s(t)·(clean + σ(t)·noise) is integrated

        dx/dt = (σ'/σ + s'/s) x − (σ's/σ) D(x/s; σ)

    by `solver` 'euler' or 'heun' (α = 1: trapezoid, ½: midpoint; appendix D.2), over the noise levels of
    `discretization` 'vp', 've', 'iddpm' or 'edm', with σ(t) given by `schedule` 'vp', 've' or 'linear' and s(t) by
    `scaling` 'vp' or 'none'. Unset, sigma_min and sigma_max are those of the discretization's paper.
    """
    _check_choice('solver', solver, ('euler', 'heun'))
    _check_choice('schedule', schedule, ('vp', 've', 'linear'))
    _check_choice('scaling', scaling, ('vp', 'none'))
    sigma_min, sigma_max = _ablation_range(net, discretization, sigma_min, sigma_max, epsilon_s)
    vp = _matched_vp_curve(sigma_min, sigma_max, epsilon_s)
    curve = {'vp': vp, 've': VE_CURVE, 'linear': LINEAR_CURVE}[schedule]
    sigmas = {
        'vp': lambda: [vp.sigma(1 + u * (epsilon_s - 1)) for u in _ramp(num_steps)],
        've': lambda: [sigma_max * (sigma_min / sigma_max) ** u for u in _ramp(num_steps)],
        'iddpm': lambda: _iddpm_levels(num_steps, sigma_min, sigma_max, C_1, C_2, M),
        'edm': lambda: sampler_2nd.noise_levels(net, num_steps, sigma_min, sigma_max, rho)[:-1],
    }[discretization]()

    def s(t):
        return 1 / math.sqrt(1 + curve.sigma(t) ** 2) if scaling == 'vp' else 1.0

    def s_deriv(t):
        return -curve.sigma(t) * curve.sigma_deriv(t) * s(t) ** 3 if scaling == 'vp' else 0.0

    denoise = sampler_2nd.Denoiser(net, class_labels)

    def slope(x, t):
        """(dx/dt, D)"""
        sigma, sigma_deriv = curve.sigma(t), curve.sigma_deriv(t)
        D = denoise(x / s(t), sigma)
        return (sigma_deriv / sigma + s_deriv(t) / s(t)) * x - sigma_deriv * s(t) / sigma * D, D

    t_steps = [*(curve.sigma_inv(round_sigma(net, sigma)) for sigma in sigmas), 0.0]
    x = latents.to(sampler_2nd.state_dtype(latents.device)) * curve.sigma(t_steps[0]) * s(t_steps[0])
    for i in range(num_steps):
        t_cur, t_next = t_steps[i : i + 2]
        sigma_cur = curve.sigma(t_cur)
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= sigma_cur <= S_max else 0
        # Without churn t̂ = t exactly: rounding errors of σ⁻¹(σ(t)) would pass for noise to add, 1e-8 of it.
        t_hat = curve.sigma_inv(round_sigma(net, (1 + gamma) * sigma_cur)) if gamma else t_cur
        added = math.sqrt(max(curve.sigma(t_hat) ** 2 - sigma_cur**2, 0))
        x_hat = s(t_hat) / s(t_cur) * x + added * s(t_hat) * S_noise * randn_like(x)

        h = t_next - t_hat
        d_cur, D = slope(x_hat, t_hat)
        x = x_hat + h * d_cur
        if solver == 'heun' and i < num_steps - 1:
            d_prime, _ = slope(x_hat + alpha * h * d_cur, t_hat + alpha * h)
            x = x_hat + h * ((1 - 1 / (2 * alpha)) * d_cur + 1 / (2 * alpha) * d_prime)
        if callback is not None:
            callback(i, x, D, sigma_cur)
    return x


@dataclass(frozen=True)
class Curve:
    """A noise schedule σ(t) with its derivative and its inverse."""

    sigma: Callable[[float], float]
    sigma_deriv: Callable[[float], float]
    sigma_inv: Callable[[float], float]


def vp_curve(beta_d: float, beta_min: float) -> Curve:
    """σ(t)² = exp(½β_d t² + β_min t) − 1."""

    def sigma(t):
        return math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t))

    return Curve(
        sigma,
        lambda t: 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t)),
        lambda value: (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(value**2)) - beta_min) / beta_d,
    )


VE_CURVE = Curve(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda sigma: sigma**2)
LINEAR_CURVE = Curve(lambda t: t, lambda t: 1.0, lambda sigma: sigma)


def _ablation_range(net, discretization, sigma_min, sigma_max, epsilon_s) -> tuple[float, float]:
    """The noise range asked for, or that of the paper, within what the network knows."""
    vp = vp_curve(beta_d=19.9, beta_min=0.1)
    defaults = {'vp': (vp.sigma(epsilon_s), vp.sigma(1)), 've': (0.02, 100), 'iddpm': (0.002, 81), 'edm': (0.002, 80)}
    _check_choice('discretization', discretization, tuple(defaults))
    low, high = defaults[discretization]
    low = max(low if sigma_min is None else sigma_min, net.sigma_min)
    high = min(high if sigma_max is None else sigma_max, net.sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(f'noise levels from sigma_max={high} down to sigma_min={low} are not a range')
    return low, high


def _matched_vp_curve(sigma_min, sigma_max, epsilon_s) -> Curve:
    """The VP curve with σ(ε_s) = σ_min and σ(1) = σ_max."""
    log_low, log_high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_low / epsilon_s - log_high) / (epsilon_s - 1)
    return vp_curve(beta_d, log_high - 0.5 * beta_d)


def _ramp(num_steps) -> list[float]:
    return [i / max(num_steps - 1, 1) for i in range(num_steps)]


def _iddpm_levels(num_steps, sigma_min, sigma_max, C_1, C_2, M) -> list[float]:
    """Every so-manieth of the improved DDPM's M levels u_0 > … > u_{M−1} that lie in the range."""
    # EDM computes ᾱ in float32 and the rest in float64. In float64 throughout, the lowest levels move by 5e-4.
    alpha_bar = [(0.5 * math.pi * torch.tensor(j) / M / (C_2 + 1)).sin() ** 2 for j in range(M + 1)]
    levels = [0.0]
    for j in range(M, 0, -1):
        shrink = float((alpha_bar[j - 1] / alpha_bar[j]).clamp(min=C_1))
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / shrink - 1))
    kept = [u for u in reversed(levels) if sigma_min <= u <= sigma_max]
    if not kept:
        raise ValueError(f'no noise level of the improved DDPM lies between sigma_min={sigma_min} and {sigma_max}')
    spacing = (len(kept) - 1) / max(num_steps - 1, 1)
    return [kept[round(spacing * i)] for i in range(num_steps)]


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not one of {", ".join(choices)}')


# ----------------------------------------------------------------------------
# Seeds → images.


class StackedRandomGenerator:
    """One random generator per image of a batch: row i of every draw depends on seeds[i] only."""

    def __init__(self, device: torch.device | str, seeds: Sequence[int]):
        self._generators = [torch.Generator(device).manual_seed(int(seed) % 2**32) for seed in seeds]

    def randn(self, size: Sequence[int], **kwargs: Any) -> torch.Tensor:
        return self._stack(torch.randn, size, **kwargs)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return self.randn(x.shape, dtype=x.dtype, layout=x.layout)

    def randint(self, *args: Any, size: Sequence[int], **kwargs: Any) -> torch.Tensor:
        return self._stack(partial(torch.randint, *args), size, **kwargs)

    def _stack(self, draw: Callable[..., torch.Tensor], size: Sequence[int], **kwargs: Any) -> torch.Tensor:
        if size[0] != len(self._generators):
            raise ValueError(f'{size[0]} rows asked of {len(self._generators)} generators')
        return torch.stack([draw(size[1:], generator=g, device=g.device, **kwargs) for g in self._generators])


def split_seeds(seeds: Sequence[int], max_batch_size: int) -> list[list[int]]:
    """The fewest batches of at most `max_batch_size`, nearly equal, in order: the same for any number of processes."""
    num_batches = max(math.ceil(len(seeds) / max_batch_size), 1)
    return [[seeds[i] for i in part] for part in np.array_split(np.arange(len(seeds)), num_batches)]


def generate_images(
    net: Any,
    batches: Sequence[Sequence[int]],
    sampler: Callable[..., torch.Tensor],
    device: torch.device,
    class_idx: int | None = None,
    noise: str = 'fresh',
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Yield (seeds, images) for each batch of seeds; images are uint8 [N, R, R, C].

    Each seed draws, from a generator of its own on `device`: the latent, then a class (if the network knows classes,
    and even if `class_idx` overrides it), then what `sampler(net, latents, labels, randn_like=…)` asks for. With `noise`
    'path' the sampler's noise is a `sampler_2nd.BrownianPath` of the seeds instead.
    """
    for seeds in batches:
        rnd = StackedRandomGenerator(device, seeds)
        shape = [len(seeds), net.img_channels, net.img_resolution, net.img_resolution]
        latents = rnd.randn(shape)
        labels = None
        if net.label_dim:
            drawn = rnd.randint(net.label_dim, size=[len(seeds)])
            classes = drawn if class_idx is None else torch.full_like(drawn, class_idx)
            labels = torch.eye(net.label_dim, device=device)[classes]
        randn_like = sampler_2nd.BrownianPath(seeds) if noise == 'path' else rnd.randn_like
        yield seeds, to_uint8(sampler(net, latents, labels, randn_like=randn_like))


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[−1, 1] → 0…255 as EDM does it: 127.5 x + 128, clipped, truncated. [N, C, H, W] → [N, H, W, C]."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_png(image: np.ndarray, path: str | os.PathLike) -> None:
    """Write a uint8 [H, W, 1 or 3] image; the file appears whole or not at all."""
    with dnnlib.util.atomic_write(path) as file:
        PIL.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, format='png')


def save_images(outdir: str, subdirs: bool, seeds: Sequence[int], images: np.ndarray) -> None:
    for seed, image in zip(seeds, images, strict=True):
        path = image_path(outdir, seed, subdirs)
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        save_png(image, path)


def image_path(outdir: str, seed: int, subdirs: bool) -> str:
    """outdir/000123.png, with `subdirs` outdir/000000/000123.png: a folder for each thousand seeds."""
    folder = os.path.join(outdir, f'{seed - seed % 1000:06d}') if subdirs else outdir
    return os.path.join(folder, f'{seed:06d}.png')


class Scores:
    """Measures images as they come: what fid.py says of the PNG files, without the files."""

    def __init__(self, metrics: str, ref: str, detector: str | None, device: torch.device):
        self._metrics = measure.parse_metrics(metrics)
        self._reference, loaded = measure.open_statistics(ref, detector, device)
        measure.check_comparable(loaded, self._reference, self._metrics)
        self._images = measure.FeatureSet(loaded, device, keep=measure.needs_features(self._metrics))

    def add(self, seeds: Sequence[int], images: np.ndarray) -> None:
        self._images.add(seeds, torch.from_numpy(images).permute(0, 3, 1, 2))

    def finish(self) -> measure.Numbers:
        """The numbers, on every process, once all have added their images."""
        self._images.finish()
        for text in measure.warnings(self._images, self._reference):
            dist.print0(f'Warning: {text}')
        return measure.measure(self._images, self._reference, self._metrics)


# ----------------------------------------------------------------------------
# From options to a sampler.

ABLATION_OPTIONS = ('solver', 'discretization', 'schedule', 'scaling')


def choose_sampler(randn_like: str, options: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """The sampler that the options ask for, with the options that were given (those not None) bound to it.

    Raises:
        click.UsageError: an option that belongs to the other kind of noise, or a window that is none.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if value != value or (name in ('rho', 'S_noise', 'eta') and math.isinf(value)):
            raise click.UsageError(f'--{name}={value} is not a number to compute with')
    if given.get('S_min', 0) > given.get('S_max', math.inf):
        raise click.UsageError(f'--S_min={given["S_min"]:g} is above --S_max={given["S_max"]:g}')
    if randn_like == 'ddb':
        for name in ('S_churn', *ABLATION_OPTIONS):
            if name in given:
                instead = '--eta sets the noise strength' if name == 'S_churn' else '--scheme sets the integrator'
                option = '--disc' if name == 'discretization' else f'--{name}'
                raise click.UsageError(f'{option} belongs to --randn_like=db; with --randn_like=ddb, {instead}')
        return partial(sampler_2nd.ito_taylor_sampler, **given)
    for name, instead in [('scheme', '--solver=euler|heun'), ('eta', '--S_churn')]:
        if name in given:
            raise click.UsageError(f'--{name} belongs to --randn_like=ddb; with --randn_like=db, use {instead}')
    if any(name in given for name in ABLATION_OPTIONS):
        return partial(ablation_sampler, **given)
    return partial(edm_sampler, **given)


def parse_int_list(text: str | Sequence[int]) -> list[int]:
    """'1,2,5-10' → [1, 2, 5, 6, 7, 8, 9, 10]. Ranges include both ends; the order is kept.

    Raises:
        ValueError: the text is not such a list.
    """
    if not isinstance(text, str):
        return list(text)
    numbers: list[int] = []
    for item in text.split(','):
        match = re.fullmatch(r'\s*(\d+)(?:-(\d+))?\s*', item, re.ASCII)
        if match is None:
            raise ValueError(f'{item!r} is neither a number nor a range such as 0-63')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f'the range {item.strip()!r} runs backwards')
        numbers.extend(range(first, last + 1))
    return numbers


def check_network(net: Any, class_idx: int | None) -> None:
    """Raise click.UsageError unless `net` makes images that a PNG file can hold, and knows the class."""
    if net.img_channels not in (1, 3):
        raise click.UsageError(f'--network makes images of {net.img_channels} channels; PNG files hold 1 or 3')
    if class_idx is None:
        return
    if not net.label_dim:
        raise click.UsageError(f'--class={class_idx}: this network is unconditional; leave --class out')
    if class_idx >= net.label_dim:
        raise click.UsageError(f'--class={class_idx}: this network has the classes 0 to {net.label_dim - 1}')


def load_network(path: str, device: torch.device, trust_pickle: bool = False) -> torch.nn.Module:
    """The network, on `device`. Rank 0 loads first, so that it alone downloads, and alone says what is wrong.

    Raises:
        click.ClickException: the file is missing, or is not a network that this project reads.
    """
    net, error = None, None
    if dist.get_rank() == 0:
        try:
            net = network_io.load_network(path, trust_pickle=trust_pickle)
        except (OSError, ValueError) as err:
            error = f'--network: {err}'
    error = dist.broadcast_object(error)
    if error is not None:
        raise click.ClickException(error) if dist.get_rank() == 0 else SystemExit(1)
    return (net or network_io.load_network(path, trust_pickle=trust_pickle)).to(device)


PRECISIONS = {'fp16': torch.float16, 'bf16': torch.bfloat16}


def set_precision(net: Any, device: torch.device, dtype: str) -> None:
    """Make `net` compute in 'fp32', or let autocast compute in 'fp16' or 'bf16'; weights, input and output stay.

    Raises:
        click.ClickException: the device cannot.
    """
    net.use_fp16 = False  # EDM's own half precision; it would mix with autocast's
    if dtype == 'fp32':
        return
    if device.type == 'cpu':
        dist.print0(f'Warning: --dtype={dtype} is for GPUs; many CPUs compute it far slower than fp32')
    try:
        precision = torch.autocast(device.type, PRECISIONS[dtype])
    except RuntimeError as err:
        raise click.ClickException(f'--dtype={dtype}: {err}') from None
    net.forward = precision(net.forward)


# ----------------------------------------------------------------------------
# Command line.


class IntList(click.ParamType):
    name = 'list'

    def convert(self, value, param, ctx):
        try:
            return parse_int_list(value)
        except ValueError as err:
            self.fail(f'{err}; seeds look like 0-63 or 1,2,5-10', param, ctx)


positive = click.FloatRange(min=0, min_open=True)
non_negative = click.FloatRange(min=0)


# fmt: off
@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', 'network_pkl',    help='Network file', metavar='NAME|PATH|URL', default=str(SHIPPED_NETWORK), show_default='the shipped MNIST network')
@click.option('--outdir',                    help='Where to save the images; not needed with --metrics', metavar='DIR')
@click.option('--seeds',                     help='Random seeds, one per image', metavar='LIST', type=IntList(), default='0-63')
@click.option('--subdirs',                   help='One subfolder per 1000 seeds', is_flag=True)
@click.option('--class', 'class_idx',        help='Class label', metavar='INT', type=click.IntRange(min=0), show_default='random')
@click.option('--batch', 'max_batch_size',   help='Maximum batch size of a process', metavar='INT', type=click.IntRange(min=1), default=64)
@click.option('--metrics',                   help=f'Measure the images: some of {",".join(measure.METRICS)}', metavar='LIST')
@click.option('--ref',                       help='Reference statistics for --metrics, as for fid.py', metavar='NPZ|URL')
@click.option('--detector',                  help='Features for --metrics, as for fid.py', metavar='NAME', show_default='that of --ref')
@click.option('--device',                    help='cuda, mps or cpu', metavar='NAME', show_default='the first there is')
@click.option('--trust-pickle',              help='Run the code inside the network file', is_flag=True)
@click.option('--dtype',                     help='Precision inside the network; the state stays float64', type=click.Choice(['fp32', 'fp16', 'bf16']), show_default="fp32, or the file's own on CUDA")
@click.option('--compile', 'compile_net',    help='Compile the network first, for minutes; not with --scheme=taylor', is_flag=True)
@click.option('--steps', 'num_steps',        help='Number of time steps', metavar='INT', type=click.IntRange(min=1), default=18)
@click.option('--sigma_min',                 help='Lowest noise level', metavar='FLOAT', type=positive, show_default='by sampler, 0.002')
@click.option('--sigma_max',                 help='Highest noise level', metavar='FLOAT', type=positive, show_default='by sampler, 80')
@click.option('--rho',                       help='Time step exponent', metavar='FLOAT', type=positive, show_default='7')
@click.option('--randn_like',                help='Noise: increments (EDM), or pairs (second order)', type=click.Choice(['db', 'ddb']), default='db')
@click.option('--noise',                     help='ddb: path = the same picture for any number of steps', type=click.Choice(['fresh', 'path']), default='fresh')
@click.option('--S_min', 'S_min',            help='Lowest noise level with noise added', metavar='FLOAT', type=non_negative, show_default='0')
@click.option('--S_max', 'S_max',            help='Highest noise level with noise added', metavar='FLOAT', type=non_negative, show_default='inf')
@click.option('--S_noise', 'S_noise',        help='Factor on the noise', metavar='FLOAT', type=float, show_default='1')
@click.option('--S_churn', 'S_churn',        help='db: amount of noise', metavar='FLOAT', type=non_negative, show_default='0')
@click.option('--eta',                       help='ddb: amount of noise; 0 = ODE, 1 = exact time reversal', metavar='FLOAT', type=non_negative, show_default='1')
@click.option('--scheme',                    help='ddb: one evaluation with a JVP, or one evaluation', type=click.Choice(['taylor', 'rk']), show_default='taylor')
@click.option('--solver',                    help='db, ablation: ODE solver', type=click.Choice(['euler', 'heun']))
@click.option('--disc', 'discretization',    help='db, ablation: time steps', type=click.Choice(['vp', 've', 'iddpm', 'edm']))
@click.option('--schedule',                  help='db, ablation: noise schedule σ(t)', type=click.Choice(['vp', 've', 'linear']))
@click.option('--scaling',                   help='db, ablation: signal scaling s(t)', type=click.Choice(['vp', 'none']))
def main(
    network_pkl, outdir, seeds, subdirs, class_idx, max_batch_size, metrics, ref, detector, device, trust_pickle,
    dtype, compile_net, randn_like, noise, **options
):
    """Generate images, one per seed.

    \b
    # 64 digits from the shipped network, second-order SDE sampler
    python generate.py --outdir=out --randn_like=ddb --steps=40

    \b
    # EDM's CIFAR-10 network with EDM's own sampler: 18 steps, 35 evaluations
    python generate.py --outdir=out --steps=18 \\
        --network=https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl

    \b
    # 50,000 images on two GPUs
    torchrun --standalone --nproc_per_node=2 generate.py --outdir=out --seeds=0-49999 --batch=500 --subdirs \\
        --network=ckpts/edm-cifar10-32x32-cond-vp.pkl --randn_like=ddb --steps=40 --rho=3

    \b
    # FID of 50,000 images that are never written
    python generate.py --seeds=0-49999 --metrics=fid --network=ckpts/edm-cifar10-32x32-cond-vp.pkl \\
        --ref=https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz
    """
    sampler = choose_sampler(randn_like, options)
    if noise == 'path' and randn_like != 'ddb':
        raise click.UsageError('--noise=path belongs to --randn_like=ddb')
    if compile_net and randn_like == 'ddb' and options['scheme'] != 'rk':
        raise click.UsageError(
            '--compile does nothing for --scheme=taylor: PyTorch runs a compiled network uncompiled where it takes a '
            'JVP; use --scheme=rk'
        )
    if outdir is None and metrics is None:
        raise click.UsageError('--outdir is missing: the folder for the images')
    if (metrics is None) != (ref is None) or (detector is not None and ref is None):
        raise click.UsageError('--metrics and --ref go together (and --detector with them)')
    try:
        device = dist.init(device)
    except ValueError as err:
        raise click.ClickException(str(err)) from None
    dist.print0(f'Loading network from {network_pkl} ...')
    loaded = load_network(network_pkl, device, trust_pickle)
    check_network(loaded, class_idx)
    if dtype is not None:
        set_precision(loaded, device, dtype)
    if compile_net:
        loaded.compile()
    net = sampler_2nd.CountCalls(loaded)
    batches = split_seeds(seeds, max_batch_size)
    mine = batches[dist.get_rank() :: dist.get_world_size()]
    num_steps = options['num_steps']

    start = time.perf_counter()
    hidden = dist.get_rank() != 0
    sinks: list[Callable[..., None]] = [] if outdir is None else [partial(save_images, outdir, subdirs)]
    try:
        scores = Scores(metrics, ref, detector, device) if metrics is not None else None
        if scores is not None:
            sinks.append(scores.add)
        total = len(mine) * num_steps
        # The delay keeps the bar away from the errors that the sampler finds in its arguments.
        with tqdm(desc=f'Sampling {len(seeds)} images', total=total, unit='step', disable=hidden, delay=0.1) as bar:
            sampler = partial(sampler, callback=lambda *_: bar.update())
            for batch_seeds, images in generate_images(net, mine, sampler, device, class_idx, noise):
                for sink in sinks:
                    sink(batch_seeds, images)
        numbers = scores.finish() if scores is not None else {}
    except (OSError, ValueError) as err:
        raise click.ClickException(str(err)) from None
    except RuntimeError as err:
        if not compile_net or not isinstance(err, torch._dynamo.exc.BackendCompilerFailed):
            raise
        raise click.ClickException(f'--compile: {network_io.one_line(err.inner_exception)}') from None
    dist.barrier()
    seconds = time.perf_counter() - start
    dist.print0(f'{len(seeds)} images in {seconds:.1f} s ({len(seeds) / seconds:.2f} images/s) on {device}')
    if mine:
        dist.print0(work_done(net, num_steps, len(mine)))
    if outdir is not None:
        dist.print0(f'Saved in {os.path.abspath(outdir)}')
    for name, value in numbers.items():
        dist.print0(f'{name} {value:g}')

# fmt: on


def work_done(net: sampler_2nd.CountCalls, num_steps: int, num_batches: int) -> str:
    """What an image cost."""
    calls, jvp_calls = net.calls // num_batches, net.jvp_calls // num_batches
    return f'{num_steps} steps: {calls} network calls, {jvp_calls} of them with a JVP'


if __name__ == '__main__':
    main()
