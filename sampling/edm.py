"""EDM's sampler and its ablation sampler: Karras et al. 2022 (arXiv 2206.00364), as functions that read like the paper.

`edm_sampler` is algorithms 1 and 2. `ablation_sampler` leaves each choice of table 1 free: solver, time steps, noise
schedule σ(t), scaling s(t). Both take what `sampler_2nd.ito_taylor_sampler` takes: net, latents, class_labels,
randn_like, num_steps, the noise levels, a callback.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import sampler_2nd


@sampler_2nd.explain_extremes
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
    sigmas=None,
):
    """Heun's method on the probability-flow ODE, with noise added and removed again (churn).

    Karras et al. 2022 (arXiv 2206.00364), algorithm 2; without churn, algorithm 1. Evaluates `net` 2·num_steps − 1
    times. A step draws one normal, with or without churn, so that a seed means the same noise in either case. Arguments
    and `callback` are those of `sampler_2nd.ito_taylor_sampler`; S_churn spreads over the steps, at most √2 − 1 each.
    """
    sampler_2nd.check_noise_options(S_min, S_max, S_noise)
    denoise = sampler_2nd.Denoiser(net, class_labels)
    if sigmas is None:
        t_steps = sampler_2nd.noise_levels(net, num_steps, sigma_min, sigma_max, rho)
    else:
        t_steps = sampler_2nd.given_levels(net, sigmas)
        num_steps = len(t_steps) - 1
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
        sampler_2nd.check_finite(x, i, num_steps)
        if callback is not None:
            callback(i, x, D, t_cur)
    return x


def round_sigma(net, sigma: float) -> float:
    """The noise level nearest to `sigma` that the network knows."""
    rounded = sampler_2nd.property_of(net, 'round_sigma')
    return sigma if rounded is None else float(rounded(torch.tensor(sigma, dtype=torch.float64)))


# ----------------------------------------------------------------------------
# The ablation sampler: any noise schedule σ(t), scaling s(t) and choice of time steps.


@sampler_2nd.explain_extremes
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
    _check_choices(solver=solver, discretization=discretization, schedule=schedule, scaling=scaling)
    sampler_2nd.check_noise_options(S_min, S_max, S_noise)
    sigma_min, sigma_max = _ablation_range(net, discretization, sigma_min, sigma_max, epsilon_s)
    vp = _matched_vp_curve(sigma_min, sigma_max, epsilon_s)
    sigmas = {
        'vp': lambda: [vp.sigma(1 + u * (epsilon_s - 1)) for u in _ramp(num_steps)],
        've': lambda: [sigma_max * (sigma_min / sigma_max) ** u for u in _ramp(num_steps)],
        'iddpm': lambda: _iddpm_levels(num_steps, sigma_min, sigma_max, C_1, C_2, M),
        'edm': lambda: sampler_2nd.noise_levels(net, num_steps, sigma_min, sigma_max, rho)[:-1],
    }[discretization]()
    curve = {'vp': vp, 've': VE_CURVE, 'linear': LINEAR_CURVE}[schedule]
    s, slope = _scaled(curve, scaling == 'vp', sampler_2nd.Denoiser(net, class_labels))

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
        x, D = _ode_step(slope, x_hat, t_hat, t_next - t_hat, alpha if solver == 'heun' and t_next > 0 else None)
        sampler_2nd.check_finite(x, i, num_steps)
        if callback is not None:
            callback(i, x, D, sigma_cur)
    return x


def _ode_step(slope, x, t, h, alpha):
    """(x at t + h, D at t) by Euler's method, or with an `alpha` by Heun's: Karras et al. 2022, algorithm 3."""
    d_cur, D = slope(x, t)
    if alpha is None:
        return x + h * d_cur, D
    d_prime, _ = slope(x + alpha * h * d_cur, t + alpha * h)
    return x + h * ((1 - 1 / (2 * alpha)) * d_cur + 1 / (2 * alpha) * d_prime), D


def _scaled(curve, by_std, denoise):
    """s(t), which `by_std` makes of it 1/√(1 + σ²), else 1; and the function (x, t) → (dx/dt, D)."""

    def s(t):
        return 1 / math.sqrt(1 + curve.sigma(t) ** 2) if by_std else 1.0

    def s_deriv(t):
        return -curve.sigma(t) * curve.sigma_deriv(t) * s(t) ** 3 if by_std else 0.0

    def slope(x, t):
        sigma, sigma_deriv = curve.sigma(t), curve.sigma_deriv(t)
        D = denoise(x / s(t), sigma)
        return (sigma_deriv / sigma + s_deriv(t) / s(t)) * x - sigma_deriv * s(t) / sigma * D, D

    return s, slope


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
    low, high = defaults[discretization]
    low = max(low if sigma_min is None else sigma_min, sampler_2nd.property_of(net, 'sigma_min', 0))
    high = min(high if sigma_max is None else sigma_max, sampler_2nd.property_of(net, 'sigma_max', math.inf))
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


CHOICES = {
    'solver': ('euler', 'heun'),
    'discretization': ('vp', 've', 'iddpm', 'edm'),
    'schedule': ('vp', 've', 'linear'),
    'scaling': ('vp', 'none'),
}


def _check_choices(**chosen):
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f'{name}={value!r} is not one of {", ".join(CHOICES[name])}')
