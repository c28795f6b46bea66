"""Other people's samplers behind one call: run(denoise, x, sigmas, noise) → images.

    denoise(x, sigma)   the denoiser, with a 0-dim or 1-dim sigma of equal entries
    x                   the state at sigmas[0], any shape [N, …]
    sigmas              noise levels, the last one 0
    noise(time, next)   the increment of Brownian motion, divided by √|next − time|, in the time of the peer, σ
    noise.fresh(…)      a standard normal, independent of all others

They run as their authors ship them: k-diffusion 0.1.1, torchsde 0.2.6, diffusers 0.42. `INSTALL` says how to get them.
Those of comparison/rivals.py are written from the papers, and need no package.
"""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import click
import torch

import sampler_2nd
from comparison import rivals

# k-diffusion asks for wandb, clip-anytorch and torchvision, which its samplers do not use.
INSTALL = 'pip install -e ".[bench]" && pip install --no-deps k-diffusion'


# ----------------------------------------------------------------------------
# Noise.


class Columns:
    """Noise for exact arithmetic: each independent normal is a column, a row of x here: x has the shape [columns, d].

    Called as a peer's noise sampler, it is Brownian motion: what was asked for before is kept, and a new time gets a
    column of its own. Called without times, it is a fresh normal.
    """

    def __init__(self, count, dim):
        self._eye, self._dim, self._used = torch.eye(count, dtype=torch.float64), dim, 0
        self._times, self._values = [], []

    def fresh(self, *_):
        self._used += 1
        return self._eye[:, self._used - 1 : self._used].expand(-1, self._dim)

    def __call__(self, time, time_next):
        low, high = sorted((float(time), float(time_next)))
        sign = 1 if time < time_next else -1
        return (self.at(high) - self.at(low)) * (sign / math.sqrt(high - low))

    def at(self, time):
        """Brownian motion at `time`, given what is known of it: free beyond its ends, a bridge between."""
        below = [i for i, t in enumerate(self._times) if t <= time]
        above = [i for i, t in enumerate(self._times) if t > time]
        if below and self._times[below[-1]] == time:
            return self._values[below[-1]]
        if not self._times:
            value = 0 * self._eye[:, :1].expand(-1, self._dim)
        elif below and above:
            i, j = below[-1], above[0]
            t0, t1 = self._times[i], self._times[j]
            share = (time - t0) / (t1 - t0)
            value = (1 - share) * self._values[i] + share * self._values[j]
            value = value + math.sqrt((time - t0) * (t1 - time) / (t1 - t0)) * self.fresh()
        else:
            end = below[-1] if below else above[0]
            value = self._values[end] + math.sqrt(abs(time - self._times[end])) * self.fresh()
        self._times.insert(len(below), time)
        self._values.insert(len(below), value)
        return value


class SeededNoise(Columns):
    """Fresh normals, and Brownian motion, made of the random numbers of the seeds."""

    def __init__(self, x: torch.Tensor, randn_like: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__(count=1, dim=1)
        self._eye = self._eye.to(x)  # Brownian motion starts at 0 times this
        self._x, self._randn_like = x, randn_like

    def fresh(self, *_: Any) -> torch.Tensor:
        return self._randn_like(self._x)


class Normals:
    """Standard normals from one generator; a peer that asks by times gets independent increments."""

    def __init__(self, seed, shape):
        self._generator, self._shape = torch.Generator().manual_seed(seed), shape

    def fresh(self, *_):
        return torch.randn(self._shape, generator=self._generator, dtype=torch.float64)

    __call__ = fresh


# ----------------------------------------------------------------------------
# Packages.


def needs(module):
    """The module, or one line that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise click.ClickException(f'this sampler needs {module.split(".")[0]}: {INSTALL}') from None


# ----------------------------------------------------------------------------
# k-diffusion.


@functools.cache
def k_diffusion_sampling():
    """k_diffusion/sampling.py alone: the package wants wandb, clip and torchvision, which samplers do not need."""
    spec: Any = importlib.util.find_spec('k_diffusion') or needs('k_diffusion')
    package: Any = types.ModuleType('k_diffusion')
    utils: Any = types.ModuleType('k_diffusion.utils')
    package.__path__ = list(spec.submodule_search_locations)
    utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    package.utils, package.__spec__ = utils, spec
    sys.modules |= {'k_diffusion': package, 'k_diffusion.utils': utils}
    return needs('k_diffusion.sampling')


def k_diffusion(name, stochastic=True, **kwargs):
    def sampler(denoise, x, sigmas, noise):
        extra = {'noise_sampler': noise} if stochastic else {}
        levels = torch.tensor(sigmas, dtype=x.dtype, device=x.device)
        return getattr(k_diffusion_sampling(), name)(denoise, x, levels, disable=True, **extra, **kwargs)

    return sampler


# ----------------------------------------------------------------------------
# torchsde: strong order 1.5 for additive noise (Rößler's SRA1), the true rival in strong order.


def torchsde_srk(denoise, x, sigmas, noise):
    """`sdeint(method='srk')` for dy = D dτ + dB, with τ = 1/σ² and y = τx: its scheme for additive noise.

    It evaluates the first of its two stages twice, and once more to check shapes. We charge what the scheme needs: two.
    """
    torchsde: Any = needs('torchsde')
    taus = [sigma**-2 for sigma in sigmas[:-1]]

    class Equation(torch.nn.Module):
        noise_type, sde_type = 'additive', 'ito'

        def f(self, t, y):
            return denoise((y / t).reshape(x.shape), t**-0.5).reshape(y.shape)

        def g(self, t, y):
            return torch.ones(*y.shape, 1, dtype=y.dtype, device=y.device)

    class Source(torchsde.BaseBrownian):
        """ΔB and ΔZ/h − ΔB/2 = H of a step, from independent normals."""

        shape, dtype, device, levy_area_approximation = (x.numel(), 1), x.dtype, x.device, 'space-time'

        def __call__(self, ta, tb, return_U=False, return_A=False):
            h = float(tb - ta)
            dB, other = math.sqrt(h) * noise.fresh().reshape(self.shape), noise.fresh().reshape(self.shape)
            return (dB, h / 2 * dB + h**1.5 / math.sqrt(12) * other) if return_U else dB

        def __repr__(self):
            return 'Source'

        def size(self):
            return self.shape

    y = (x * taus[0]).reshape(-1, 1)
    source = Source()
    for tau, tau_next in itertools.pairwise(taus):
        ends = torch.tensor([tau, tau_next], dtype=x.dtype, device=x.device)
        dt = (tau_next - tau) * (1 + 1e-9)  # one step: rounded down, dt would leave a second one, with noise of its own
        y = torchsde.sdeint(Equation(), y, ends, bm=source, method='srk', dt=dt)[-1]
    return denoise((y / taus[-1]).reshape(x.shape), torch.tensor(sigmas[-2], dtype=x.dtype))


# ----------------------------------------------------------------------------
# diffusers.


def diffusers_dpm(denoise, x, sigmas, noise):
    """EDMDPMSolverMultistepScheduler, sde-dpmsolver++, order 2 (its order 3 takes no noise and fails; peers' defects).

    It wants F with D = c_skip x + c_out F, and scales its input itself. Its levels and its state are float32.
    """
    diffusers = needs('diffusers')
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=sigmas[-2], sigma_max=sigmas[0], sigma_data=0.5, algorithm_type='sde-dpmsolver++', solver_order=2
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    with drawing_from(noise, scheduler):
        for sigma, timestep in zip(sigmas[:-1], scheduler.timesteps, strict=True):
            c_skip = 0.25 / (0.25 + sigma**2)
            c_out = 0.5 * sigma / math.sqrt(0.25 + sigma**2)
            scheduler.scale_model_input(x, timestep)
            F = (denoise(x, torch.tensor(sigma, dtype=torch.float64)) - c_skip * x) / c_out
            x = scheduler.step(F, timestep, x).prev_sample
    return x


def diffusers_vp(name: str, stochastic: bool, **config: Any) -> Callable[..., torch.Tensor]:
    """A scheduler of diffusers for VP networks, at our levels, which it takes in the dtype of x.

    Its state is x/√(1 + σ²), and its λ = ln α_t − ln σ_t is −ln σ exactly. We call σ its timestep, for `tau_func`. It
    goes to the last level, with the lower orders that it has at its end, and x = D is the step from there to 0: in the
    words of UniPC's authors, `denoise_to_zero`. (SA-Solver has 0·∞ there.)
    """

    def sampler(denoise, x, sigmas, noise):
        scheduler = getattr(needs('diffusers'), name)(prediction_type='sample', **config)
        levels = torch.tensor(sigmas[:-1], dtype=x.dtype)
        scheduler.sigmas, scheduler.timesteps = levels, levels[:-1]  # in place of set_timesteps
        scheduler.num_inference_steps = len(levels) - 1
        scheduler.set_begin_index(0)
        scales = (1 + levels**2).sqrt().tolist()
        with drawing_from(noise, scheduler) if stochastic else contextlib.nullcontext():
            for sigma, (scale, scale_next) in zip(levels[:-1], itertools.pairwise(scales), strict=True):
                x = scale_next * scheduler.step(denoise(x, sigma), sigma, x / scale).prev_sample
        return denoise(x, levels[-1])

    return sampler


def tau_of_sa_solver(sigma: torch.Tensor) -> int:
    """Where SA-Solver adds noise, as diffusers ships it: from timestep 200 to 800 of its VP-SDE, these levels."""
    return int(0.7215 < sigma < 25.84)


@contextlib.contextmanager
def drawing_from(noise: Any, scheduler: Any) -> Iterator[None]:
    """Let a scheduler of diffusers take its normals from `noise`."""
    module: Any = sys.modules[type(scheduler).__module__]
    draw = module.randn_tensor
    module.randn_tensor = lambda *args, **kwargs: noise.fresh()
    try:
        yield
    finally:
        module.randn_tensor = draw


# ----------------------------------------------------------------------------
# The list.

PACKAGES = {'k-diffusion': 'k_diffusion', 'diffusers': 'diffusers', 'torchsde': 'torchsde'}  # name → module


# The orders that their authors recommend without guidance.
UNIPC = diffusers_vp('UniPCMultistepScheduler', False, solver_order=3)
SA_SOLVER = diffusers_vp('SASolverScheduler', True, predictor_order=3, corrector_order=4, tau_func=tau_of_sa_solver)


class Solver(NamedTuple):
    """`run` is the call of the head of this file."""

    run: Callable[..., torch.Tensor]
    stochastic: bool
    per_step: int = 1  # evaluations; a JVP counts as one more
    extra: int = 0  # evaluations besides

    def levels(self, evaluations):
        """The number of noise levels that `evaluations` pay for."""
        return (evaluations - self.extra) // self.per_step


PEERS = {
    'k-diffusion-dpmpp_2m_sde': Solver(k_diffusion('sample_dpmpp_2m_sde'), True),
    'k-diffusion-dpmpp_3m_sde': Solver(k_diffusion('sample_dpmpp_3m_sde'), True),
    'k-diffusion-dpmpp_sde': Solver(k_diffusion('sample_dpmpp_sde'), True, 2, -1),
    'k-diffusion-euler_ancestral': Solver(k_diffusion('sample_euler_ancestral'), True),
    'diffusers-EDM-dpm-2M-SDE': Solver(diffusers_dpm, True),
    'torchsde-srk': Solver(torchsde_srk, True, 2, -1),
    'k-diffusion-heun': Solver(k_diffusion('sample_heun', stochastic=False), False, 2, -1),
    'k-diffusion-dpmpp_2m': Solver(k_diffusion('sample_dpmpp_2m', stochastic=False), False),
    'er-sde-3': Solver(rivals.er_sde_3, True),
    'seeds-3': Solver(rivals.seeds_3, True, 3, -2),
    'diffusers-sa-solver': Solver(SA_SOLVER, True),
    'ipndm-3': Solver(rivals.ipndm_3, False),
    'ipndm-v-3': Solver(rivals.ipndm_v_3, False),
    'deis-3': Solver(rivals.deis_3, False),
    'dpm-solver-3': Solver(rivals.dpm_solver_3, False),
    'diffusers-unipc-3': Solver(UNIPC, False),
}


def package_of(name: str) -> str | None:
    """'k-diffusion-heun' → 'k-diffusion', as pip knows it; None: written here."""
    return next((package for package in PACKAGES if name.startswith(package)), None)


def installed() -> dict[str, Solver]:
    """The `PEERS` whose package is there."""
    missing = {package for package, module in PACKAGES.items() if importlib.util.find_spec(module) is None}
    return {name: sampler for name, sampler in PEERS.items() if package_of(name) not in missing}


def make(
    name: str,
    num_steps: int = 18,
    rho: float = 7,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    sigmas: Sequence[float] | None = None,
) -> Callable[..., torch.Tensor]:
    """A peer as `sampling.choose.make` makes ours: the same noise levels, and the random numbers of the seeds.

    Args:
        sigmas: noise levels instead of those of the options before, as for `sampler_2nd.ito_taylor_sampler`.
    """

    @torch.no_grad()
    def sampler(net, latents, class_labels=None, randn_like=torch.randn_like):
        if sigmas is None:
            levels = sampler_2nd.noise_levels(net, num_steps, sigma_min, sigma_max, rho)
        else:
            levels = sampler_2nd.given_levels(net, sigmas)
        network = sampler_2nd.Denoiser(net, class_labels)
        x = latents.to(sampler_2nd.state_dtype(latents.device)) * levels[0]

        def denoise(x, sigma):
            return network(x, torch.as_tensor(sigma).reshape(-1)[0])

        return PEERS[name].run(denoise, x, levels, SeededNoise(x, randn_like))

    return sampler
