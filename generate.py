"""Generate images with a diffusion model: seeds → PNG files, or an archive of them.

`edm_sampler` and `ablation_sampler` are the samplers of Karras et al. 2022 (`--randn_like=db`); the second-order SDE
sampler (`--randn_like=ddb`) is in sampler_2nd.py. `generate_images` runs any of them, batch by batch, with random
numbers of its own for each seed: an image does not depend on what else is in its batch, nor on how many processes
share the work. `run` draws the batches that are missing in the output folder (images/output.py), which is why the same
command continues a run that was killed.
"""

import contextlib
import inspect
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import dnnlib
import sampler_2nd
from images import pictures, run_record
from images.files import own_files
from images.output import FORMATS, FirstImages, Output
from images.progress import progress
from metrics import measure
from torch_utils import distributed as dist
from torch_utils import misc, network_io
from torch_utils.interrupts import Interrupts
from training.networks import Precond

SHIPPED_NETWORK = Path(__file__).parent / 'ckpts' / 'edm-mnist-32x32-cond-vp.pkl'
SAMPLERS = 2  # their version: one more whenever the same settings make other images

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
    init=None,
):
    """Heun's method on the probability-flow ODE, with noise added and removed again (churn).

    Karras et al. 2022 (arXiv 2206.00364), algorithm 2; without churn, algorithm 1. Evaluates `net` 2·num_steps − 1
    times. A step draws one normal, with or without churn, so that a seed means the same noise in either case. Arguments
    and `callback` are those of `sampler_2nd.ito_taylor_sampler`; S_churn spreads over the steps, at most √2 − 1 each.
    """
    denoise = sampler_2nd.Denoiser(net, class_labels)
    t_steps = sampler_2nd.noise_levels(net, num_steps, sigma_min, sigma_max, rho)
    x = sampler_2nd.first_state(latents.to(sampler_2nd.state_dtype(latents.device)), t_steps[0], init)
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
    if not hasattr(net, 'round_sigma'):
        return sigma
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
        # Without churn, too: what rounding makes of σ⁻¹(σ(t)) passes for noise to add, 1e-8 of it, as in EDM's images.
        t_hat = curve.sigma_inv(round_sigma(net, (1 + gamma) * sigma_cur))
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
        return math.sqrt(math.e ** (0.5 * beta_d * t**2 + beta_min * t) - 1)  # to the bit what EDM's is; so not expm1

    return Curve(
        sigma,
        lambda t: 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t)),
        lambda value: (math.sqrt(beta_min**2 + 2 * beta_d * math.log(value**2 + 1)) - beta_min) / beta_d,
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
    log_low, log_high = math.log(sigma_min**2 + 1), math.log(sigma_max**2 + 1)
    beta_d = 2 * (log_low / epsilon_s - log_high) / (epsilon_s - 1)
    return vp_curve(beta_d, log_high - 0.5 * beta_d)


def _ramp(num_steps) -> list[float]:
    return [i / max(num_steps - 1, 1) for i in range(num_steps)]


def _iddpm_levels(num_steps, sigma_min, sigma_max, C_1, C_2, M) -> list[float]:
    """Every so-manieth of the improved DDPM's M levels u_0 > … > u_{M−1} that lie in the range."""
    # EDM computes ᾱ in float32 and the rest in float64. In float64 throughout, the lowest levels move by 5e-4.
    alpha_bar = [(0.5 * math.pi * torch.tensor(j) / M / (C_2 + 1)).sin() ** 2 for j in range(M + 1)]
    levels = [torch.zeros((), dtype=torch.float64)]
    for j in range(M, 0, -1):
        shrink = (alpha_bar[j - 1] / alpha_bar[j]).clamp(min=C_1)
        levels.append(((levels[-1] ** 2 + 1) / shrink - 1).sqrt())
    kept = [u for u in map(float, reversed(levels)) if sigma_min <= u <= sigma_max]
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
    class_idx: int | Sequence[int] | None = None,
    noise: str = 'fresh',
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Yield (seeds, images) for each batch of seeds; images are uint8 [N, R, R, C].

    Each seed draws, from a generator of its own on `device`: the latent, then a class (if the network knows classes,
    and even if `class_idx` overrides it), then what `sampler(net, latents, labels, randn_like=…)` asks for. With `noise`
    'path' the sampler's noise is a `sampler_2nd.BrownianPath` of the seeds instead. Of several classes in `class_idx`,
    seed k has number k mod their count.
    """
    for seeds in batches:
        rnd = StackedRandomGenerator(device, seeds)
        latents, classes = draw_start(net, rnd, seeds, class_idx)
        labels = None if classes is None else torch.eye(net.label_dim, device=device)[classes]
        randn_like = sampler_2nd.BrownianPath(seeds) if noise == 'path' else rnd.randn_like
        yield seeds, to_uint8(sampler(net, latents, labels, randn_like=randn_like))


def draw_start(
    net: Any, rnd: StackedRandomGenerator, seeds: Sequence[int], class_idx: int | Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The latents of a batch and its classes, int64 [N]; None for a network without classes."""
    latents = rnd.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution])
    if not net.label_dim:
        return latents, None
    drawn = rnd.randint(net.label_dim, size=[len(seeds)])
    if class_idx is None:
        return latents, drawn
    choice = [class_idx] if isinstance(class_idx, int) else class_idx
    return latents, torch.tensor([choice[seed % len(choice)] for seed in seeds], device=drawn.device)


def classes_of(
    net: Any, batches: Sequence[Sequence[int]], device: torch.device, class_idx: int | Sequence[int] | None
) -> list[int] | None:
    """The class of each seed, drawn as `generate_images` draws it; None for a network without classes."""
    if not net.label_dim:
        return None
    starts = (draw_start(net, StackedRandomGenerator(device, seeds), seeds, class_idx) for seeds in batches)
    return [int(label) for _, classes in starts if classes is not None for label in classes]


def denoised_frames(
    net: Any, seeds: Sequence[int], sampler: Callable[..., torch.Tensor], device: torch.device, **kwargs: Any
) -> np.ndarray:
    """D after each step, as `generate_images(…, **kwargs)` goes through them: uint8 [steps, N, R, R, C].

    The last one is the images.
    """
    frames: list[np.ndarray] = []
    watched = partial(sampler, callback=lambda step, x, D, sigma: frames.append(to_uint8(D)))
    list(generate_images(net, [seeds], watched, device, **kwargs))
    return np.stack(frames)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[−1, 1] → 0…255 as EDM does it: 127.5 x + 128, clipped, truncated. [N, C, H, W] → [N, H, W, C]."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


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
        for text in measure.warnings(self._images, self._reference, self._metrics):
            dist.print0(f'Warning: {text}')
        return measure.measure(self._images, self._reference, self._metrics)


# ----------------------------------------------------------------------------
# From options to a sampler.

ABLATION_OPTIONS = ('solver', 'discretization', 'schedule', 'scaling')
SAMPLER_OPTIONS = (
    *('num_steps', 'sigma_min', 'sigma_max', 'rho', 'S_min', 'S_max', 'S_noise', 'S_churn', 'eta', 'scheme'),
    *ABLATION_OPTIONS,
)


def choose_sampler(randn_like: str, options: dict[str, Any]) -> partial[torch.Tensor]:
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


def options_in_effect(sampler: partial) -> dict[str, Any]:
    """The options of a sampler, by the names of the command line, those left at their default included."""
    parameters = inspect.signature(sampler.func).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    names = {'num_steps': 'steps', 'discretization': 'disc'}
    return {
        names.get(name, name): value
        for name, value in {**defaults, **sampler.keywords}.items()
        if value is not None and name not in ('randn_like', 'callback')
    }


# ----------------------------------------------------------------------------
# Networks.


def check_network(net: Any, class_idx: int | Sequence[int] | None) -> None:
    """Raise click.UsageError unless `net` makes images that a PNG file can hold, and knows the classes."""
    if net.img_channels not in (1, 3):
        raise click.UsageError(f'--network makes images of {net.img_channels} channels; PNG files hold 1 or 3')
    if class_idx is None:
        return
    largest = class_idx if isinstance(class_idx, int) else max(class_idx)
    if not net.label_dim:
        raise click.UsageError(f'--class={largest}: this network is unconditional; leave --class out')
    if largest >= net.label_dim:
        raise click.UsageError(f'--class={largest}: this network has the classes 0 to {net.label_dim - 1}')


def load_network(
    path: str, device: torch.device, trust_pickle: bool = False, option: str = '--network'
) -> torch.nn.Module:
    """The network, on `device`. Rank 0 loads first, so that it alone downloads, and alone says what is wrong.

    Raises:
        ValueError: on rank 0, that the file is missing, or no network that this project reads; it names the `option`.
    """
    loaded: list[torch.nn.Module] = []

    def load() -> None:
        try:
            loaded.append(network_io.load_network(path, trust_pickle=trust_pickle))
        except (OSError, ValueError) as err:
            raise ValueError(f'{option}{"=" if str(err).startswith(path) else ": "}{err}') from None

    dist.on_rank0(load)
    net = (loaded[0] if loaded else network_io.load_network(path, trust_pickle=trust_pickle)).to(device)
    return prepare_for_cpu(net) if device.type == 'cpu' else net


def prepare_for_cpu(net: torch.nn.Module) -> torch.nn.Module:
    """The same network, faster: benchmarks/cost.py measures by how much."""
    misc.keep_freed_memory()
    if isinstance(net, Precond):  # others' networks may lose their forward mode by it
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


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


class Networks:
    """What the sampler evaluates, and what that took.

    Attributes:
        net: the network of the command line, guided by --gnet where there is one.
        settings: what of the images depends on the networks and how they are run.
    """

    def __init__(self, opts: dnnlib.EasyDict, device: torch.device):
        self.settings: dict[str, Any] = {'network': None, 'gnet': None, 'guidance': opts.guidance}
        self.settings |= {'trust-pickle': opts.trust_pickle, 'compile': opts.compile_net, 'device': device.type}
        self._guide: sampler_2nd.CountCalls | None = None
        self._main = self._open('network', opts.network_pkl, opts, device)
        self.net: Any = self._main
        check_network(self.net, opts.class_idx)
        if opts.gnet is not None:
            self._guide = self._open('gnet', opts.gnet, opts, device)
            try:
                self.net = sampler_2nd.Guided(self._main, self._guide, opts.guidance)
            except ValueError as err:
                raise click.UsageError(f'--gnet={opts.gnet}: {err}') from None

    def _open(self, name: str, path: str, opts: dnnlib.EasyDict, device: torch.device) -> sampler_2nd.CountCalls:
        dist.print0(f'Loading {"guiding " if name == "gnet" else ""}network from {path} ...')
        net: Any = load_network(path, device, opts.trust_pickle, f'--{name}')
        self.settings[name] = run_record.fingerprint(net)
        own_fp16 = device.type == 'cuda' and getattr(net, 'use_fp16', False)
        self.settings['dtype'] = opts.dtype or ("the file's own fp16" if own_fp16 else 'fp32')
        if opts.dtype is not None:
            set_precision(net, device, opts.dtype)
        if opts.compile_net:
            net.compile()
        return sampler_2nd.CountCalls(net)

    def work_done(self, num_steps: int, num_batches: int) -> str:
        text = work_done(self._main, num_steps, num_batches)
        if self._guide is None:
            return text
        return f'{text}, and {self._guide.calls // num_batches} calls of the guiding network'


def work_done(net: sampler_2nd.CountCalls, num_steps: int, num_batches: int) -> str:
    """What an image cost."""
    calls, jvp_calls = net.calls // num_batches, net.jvp_calls // num_batches
    return f'{num_steps} steps: {calls} network calls, {jvp_calls} of them with a JVP'


# ----------------------------------------------------------------------------
# A run: what is missing is drawn, by all processes.

GRID_IMAGES = 100
TRAJECTORY_IMAGES = 8
TRAJECTORY_COLUMNS = 10


class Stopped(Exception):  # noqa: N818 (no error)
    """A signal has ended the run; the message is its name."""


def run(opts: dnnlib.EasyDict, networks: Networks, sampler: partial, device: torch.device) -> None:
    """Draw the batches that are not there, and then make of all images what was asked for."""
    output = open_output(opts, networks, sampler)
    if output is not None:
        output.finished = dist.on_rank0(partial(output.check, opts.seeds))
    scores = Scores(opts.metrics, opts.ref, opts.detector, device) if opts.metrics is not None else None
    first = FirstImages(opts.seeds, GRID_IMAGES if opts.grid is not None else 0)
    batches = split_seeds(opts.seeds, opts.max_batch_size)
    todo = batches if output is None else [batch for batch in batches if not output.finished.issuperset(batch)]

    start = time.perf_counter()
    if output is not None:
        kept = [batch for batch in batches if output.finished.issuperset(batch)]
        wanted = set(opts.seeds) if scores is not None else set(first.seeds)
        for batch in my_share(kept):
            if not wanted.isdisjoint(batch):
                give(batch, output.read(batch), scores, first)
    for seeds, images in draw(opts, networks.net, todo, sampler, device, output):
        give(seeds, images, scores, first)
    dist.barrier()
    report(opts, networks, todo, time.perf_counter() - start, device)

    if output is not None:
        classes = partial(classes_of, networks.net, batches, device, opts.class_idx)
        dist.on_rank0(partial(output.assemble, opts.seeds, classes))
        dist.print0(f'Saved in {os.path.abspath(output.path)}')
    for name, value in (scores.finish() if scores is not None else {}).items():
        dist.print0(f'{name} {value:g}')
    save_pictures(opts, networks.net, first, sampler, device)


def open_output(opts: dnnlib.EasyDict, networks: Networks, sampler: partial) -> Output | None:
    """Where the images go, with all that they depend on: a run with other settings may not add to them."""
    if opts.outdir is None:
        return None
    settings = {
        **networks.settings,
        'version of the samplers': SAMPLERS,
        'randn_like': opts.randn_like,
        **options_in_effect(sampler),
        'noise': opts.noise,
        'class': 'random' if opts.class_idx is None else opts.class_idx,
        'batch': opts.max_batch_size,
        'format': opts.format,
        'subdirs': opts.subdirs,
    }
    note = {'network': opts.network_pkl, 'gnet': opts.gnet, 'torch': torch.__version__}
    return Output(opts.outdir, settings, note, opts.format, opts.subdirs, opts.overwrite)


def my_share(batches: Sequence[list[int]]) -> Sequence[list[int]]:
    """The batches of this process; rank 0 has as many as any."""
    return batches[dist.get_rank() :: dist.get_world_size()]


def give(seeds: Sequence[int], images: np.ndarray, scores: Scores | None, first: FirstImages) -> None:
    first.add(seeds, images)
    if scores is not None:
        scores.add(seeds, images)


def draw(
    opts: dnnlib.EasyDict,
    net: Any,
    todo: list[list[int]],
    sampler: partial,
    device: torch.device,
    output: Output | None,
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """`generate_images` for this rank's share of the batches, into `output`, with a progress bar.

    Raises:
        Stopped: SIGINT or SIGTERM came; what was drawn before is on disk.
    """
    mine = my_share(todo)
    with (
        contextlib.nullcontext() if output is None else contextlib.closing(output),
        Interrupts() as interrupts,
        progress(len(opts.seeds), sum(map(len, todo)), len(mine) * opts.num_steps) as step_done,
    ):

        def callback(*_: Any) -> None:
            step_done()
            if interrupts.received is not None:
                raise Stopped(interrupts.received)

        watched = partial(sampler, callback=callback)
        for seeds, images in generate_images(net, mine, watched, device, opts.class_idx, opts.noise):
            yield seeds, images if output is None else output.add(seeds, images)
        if output is not None:
            output.start()  # for a rank without a batch


def report(
    opts: dnnlib.EasyDict, networks: Networks, todo: list[list[int]], seconds: float, device: torch.device
) -> None:
    drawn = sum(map(len, todo))
    before = len(opts.seeds) - drawn
    if not drawn:
        dist.print0(f'All {before} images were there already')
        return
    rest = f'; {before} were there already' if before else ''
    dist.print0(f'{drawn} images in {seconds:.1f} s ({drawn / seconds:.2f} images/s) on {device}{rest}')
    if my_share(todo):
        dist.print0(networks.work_done(opts.num_steps, len(my_share(todo))))


def save_pictures(opts: dnnlib.EasyDict, net: Any, first: FirstImages, sampler: partial, device: torch.device) -> None:
    """The files of --grid and --trajectory. For the latter, rank 0 draws the first images once more."""
    shown = first.finish() if opts.grid is not None else None
    if dist.get_rank() != 0:
        return
    if shown is not None:
        pictures.save_png(pictures.grid(shown), opts.grid)
        print(f'The first {len(shown)} images are in {opts.grid}')
    if opts.trajectory is not None:
        seeds = opts.seeds[:TRAJECTORY_IMAGES]
        frames = denoised_frames(net, seeds, sampler, device, class_idx=opts.class_idx, noise=opts.noise)
        if opts.trajectory.lower().endswith('.gif'):
            pictures.save_gif(frames, opts.trajectory)
        else:
            pictures.save_png(pictures.strip(frames, TRAJECTORY_COLUMNS), opts.trajectory)
        print(f'The denoised images of {len(frames)} steps, for the first {len(seeds)} seeds, are in {opts.trajectory}')


def explain(err: Exception, opts: dnnlib.EasyDict) -> str | None:
    """One line on what ended a run; None for an error that only its traceback explains."""
    if opts.compile_net and isinstance(err, torch._dynamo.exc.BackendCompilerFailed):
        return f'--compile: {dnnlib.util.one_line(err.inner_exception)}'
    if misc.is_out_of_memory(err):
        return f'out of memory: {dnnlib.util.one_line(err, 200)}; lower --batch'
    if isinstance(err, RuntimeError) and dist.lost_peer(err):
        return (
            f'rank {dist.get_rank()} lost contact with another process of this run, which has ended or is '
            'unreachable; see what that one says. The images drawn are safe: the same command continues'
        )
    return None


def stopped_line(opts: dnnlib.EasyDict, signal_name: str) -> str:
    """What to tell whoever sent the signal."""
    launched = dist.get_world_size() > 1
    if opts.outdir is None:
        return f'Stopped by {signal_name}; nothing is kept without --outdir'
    there = sum(1 for path in own_files(opts.outdir) if path.endswith('.png')) if os.path.isdir(opts.outdir) else 0
    sender = ', which launchers send when another process has ended,' if launched and signal_name == 'SIGTERM' else ''
    return f'Stopped by {signal_name}{sender} with {there} images in {opts.outdir}; the same command continues'


# ----------------------------------------------------------------------------
# Command line.


class IntList(click.ParamType):
    name = 'list'

    def __init__(self, example: str):
        self.example = example

    def convert(self, value, param, ctx):
        try:
            return parse_int_list(value)
        except ValueError as err:
            self.fail(f'{err}; {self.example}', param, ctx)


class ClassList(IntList):
    """One class is a number, several are a list."""

    def convert(self, value, param, ctx):
        if isinstance(value, int):
            return value
        classes = super().convert(value, param, ctx)
        return classes[0] if len(classes) == 1 else classes


positive = click.FloatRange(min=0, min_open=True)
non_negative = click.FloatRange(min=0)


# fmt: off
@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', 'network_pkl',    help='Network file', metavar='NAME|PATH|URL', default=str(SHIPPED_NETWORK), show_default='the shipped MNIST network')
@click.option('--outdir',                    help='Where to save the images; a run there is continued', metavar='DIR')
@click.option('--seeds',                     help='Random seeds, one per image', metavar='LIST', type=IntList('seeds look like 0-63 or 1,2,5-10'), default='0-63')
@click.option('--subdirs',                   help='One subfolder per 1000 seeds', is_flag=True)
@click.option('--format',                    help='PNG files, or OUTDIR/images.npz or .zip (a dataset)', type=click.Choice(FORMATS), default='png')
@click.option('--overwrite',                 help='Delete the images in --outdir, and start anew', is_flag=True)
@click.option('--class', 'class_idx',        help='Class label, or several that the seeds take in turns', metavar='LIST', type=ClassList('classes look like 3, 0-9 or 1,5,7-9'), show_default='random')
@click.option('--batch', 'max_batch_size',   help='Maximum batch size of a process', metavar='INT', type=click.IntRange(min=1), default=64)
@click.option('--metrics',                   help=f'Measure the images: some of {",".join(measure.METRICS)}', metavar='LIST')
@click.option('--ref',                       help='Reference statistics for --metrics, as for fid.py', metavar='NPZ|URL')
@click.option('--detector',                  help='Features for --metrics, as for fid.py', metavar='NAME', show_default='that of --ref')
@click.option('--grid',                      help=f'Picture of the first {GRID_IMAGES} images', metavar='PNG')
@click.option('--trajectory',                help=f'Denoised images along the way, of the first {TRAJECTORY_IMAGES} seeds: strip or animation', metavar='PNG|GIF')
@click.option('--device',                    help='cuda, mps or cpu', metavar='NAME', show_default='the first there is')
@click.option('--trust-pickle',              help='Run the code inside the network file', is_flag=True)
@click.option('--dtype',                     help='Precision inside the network; the state stays float64', type=click.Choice(['fp32', 'fp16', 'bf16']), show_default="fp32, or the file's own on CUDA")
@click.option('--compile', 'compile_net',    help='Compile the network first, for minutes; not with --scheme=taylor', is_flag=True)
@click.option('--gnet',                      help='Guiding network: a worse or unconditional one', metavar='NAME|PATH|URL')
@click.option('--guidance',                  help='Strength G: D = D_gnet + G (D_net - D_gnet)', metavar='FLOAT', type=float, show_default='1, none')
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
def main(**kwargs):
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
    # Ten digits of each class as a dataset zip, and a picture of them: a column for each class
    python generate.py --outdir=out/digits --format=zip --seeds=0-99 --class=0-9 --grid=out/digits.png

    \b
    # FID of 50,000 images that are never written
    python generate.py --seeds=0-49999 --metrics=fid --network=ckpts/edm-cifar10-32x32-cond-vp.pkl \\
        --ref=https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz
    """
    opts = dnnlib.EasyDict(kwargs)
    sampler = choose_sampler(opts.randn_like, {name: opts[name] for name in SAMPLER_OPTIONS})
    check_options(opts)
    try:
        device = dist.init(opts.device)
    except ValueError as err:
        raise click.ClickException(str(err)) from None
    try:
        networks = Networks(opts, device)
        run(opts, networks, sampler, device)
    except Stopped as stop:
        if dist.get_rank() == 0:
            click.echo(stopped_line(opts, str(stop)), err=True)
        raise SystemExit(128 + signal.Signals[str(stop)]) from None
    except dnnlib.util.FailedWriteError as err:
        raise click.ClickException(f'{err}; once this is mended, the same command continues') from None
    except (OSError, ValueError) as err:
        raise click.ClickException(str(err)) from None
    except (RuntimeError, MemoryError) as err:
        message = explain(err, opts)
        if message is None:
            raise
        raise click.ClickException(message) from None

# fmt: on


def check_options(opts: dnnlib.EasyDict) -> None:
    """What can be said without a network. Raises click.UsageError."""
    if opts.noise == 'path' and opts.randn_like != 'ddb':
        raise click.UsageError('--noise=path belongs to --randn_like=ddb')
    if opts.compile_net and opts.randn_like == 'ddb' and opts.scheme != 'rk':
        raise click.UsageError(
            '--compile does nothing for --scheme=taylor: PyTorch runs a compiled network uncompiled where it takes a '
            'JVP; use --scheme=rk'
        )
    if opts.outdir is None:
        for name, given in [('format', opts.format != 'png'), ('overwrite', opts.overwrite), ('subdirs', opts.subdirs)]:
            if given:
                raise click.UsageError(f'--{name} needs --outdir, the folder for the images')
        if all(opts[name] is None for name in ('metrics', 'grid', 'trajectory')):
            raise click.UsageError('--outdir is missing: the folder for the images')
    if opts.subdirs and opts.format != 'png':
        raise click.UsageError(f'--subdirs is for PNG files; --format={opts.format} is one file')
    if opts.format == 'npz' and max(opts.seeds) >= 2**63:
        raise click.UsageError(f'--seeds={max(opts.seeds)}: --format=npz holds seeds below 2^63')
    if (opts.metrics is None) != (opts.ref is None) or (opts.detector is not None and opts.ref is None):
        raise click.UsageError('--metrics and --ref go together (and --detector with them)')
    check_guidance(opts)
    check_picture('grid', opts.grid, ('.png',))
    check_picture('trajectory', opts.trajectory, ('.png', '.gif'))


def check_guidance(opts: dnnlib.EasyDict) -> None:
    if opts.guidance is not None and opts.gnet is None:
        raise click.UsageError(f'--guidance={opts.guidance:g} needs --gnet, the guiding network')
    if opts.gnet is not None and opts.guidance is None:
        raise click.UsageError('--gnet needs --guidance, such as --guidance=2')
    if opts.guidance is not None and not math.isfinite(opts.guidance):
        raise click.UsageError(f'--guidance={opts.guidance} is not a number to compute with')


def check_picture(option: str, path: str | None, endings: tuple[str, ...]) -> None:
    """Before hours of sampling, see that the picture can be written after them, and make its folder."""
    if path is None:
        return
    if not path.lower().endswith(endings):
        raise click.UsageError(f'--{option}={path}: the name ends in {" or ".join(endings)}')
    folder = os.path.dirname(path) or '.'
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as err:
        raise click.UsageError(f'--{option}={path}: cannot make the folder {folder}: {err.strerror}') from None


if __name__ == '__main__':
    main()
