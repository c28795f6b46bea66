"""Sample a diffusion model by integrating its reverse-time SDE to second order. One file; it needs PyTorch only.

    from sampler_2nd import ito_taylor_sampler
    images = ito_taylor_sampler(net, latents, class_labels, num_steps=40, rho=3)

`net(x, sigma, class_labels)` is a denoiser D(x; σ) = E[clean image | x], as EDM's networks are. The SDE, in λ = −ln σ,
which grows while sampling, with noise strength κ = η² (κ = 1: exact time reversal; κ = 0: probability-flow ODE):

    dx = (1 + κ)(D − x) dλ + σ √(2κ) dW                                                                     (1)

Why one Jacobian-vector product makes a second order: along (1) the exact denoiser drifts by (1 − κ) times its
derivative along the probability-flow ODE, and not at all if κ = 1 (E[x0 | x] is a martingale). No Laplacian is left:

    dD = (1 − κ) (dD/dλ)_ODE dλ + J_D σ √(2κ) dW                                                            (2)

Put into (1) with J_D frozen at the start of the step, (2) gives the step of `taylor`. It needs two Gaussian variables
per pixel, the increment N of x and the integral Z that it leaves in D: the pair that `ddb` stands for.

Where to enter: `ito_taylor_sampler` is the loop; a scheme is one function, `…_step`; `noise_pair` draws N and Z.

Sources: Karras et al. 2022 (arXiv 2206.00364), equations 1 and 6 for (1); Kloeden & Platen 1992, section 10.4 for
strong schemes of order 1.5; Montanari 2023 (arXiv 2305.10690) for the coordinates τ = 1/σ², y = τ x, where (1) with
κ = 1 reads dy = D dτ + dB.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ['SCHEMES', 'CountCalls', 'ito_taylor_sampler']

# ----------------------------------------------------------------------------
# The loop.


@torch.no_grad()
def ito_taylor_sampler(
    net: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_min: float = 0,
    S_max: float = float('inf'),
    S_noise: float = 1,
    eta: float = 1,
    scheme: str = 'taylor',
    dtype: torch.dtype | None = None,
    callback: Callable[[int, torch.Tensor, torch.Tensor, float], Any] | None = None,
) -> torch.Tensor:
    """Turn noise into images along the reverse-time SDE (1).

    | scheme | noise per step | network work per step            | strong / weak order       |
    |--------|----------------|----------------------------------|---------------------------|
    | euler  | 1 normal       | 1 evaluation                     | 1 / 1                     |
    | taylor | 2 normals      | 1 evaluation with 1 JVP          | 1.5 / 2                   |
    | rk     | 2 normals      | 1 evaluation                     | 1.5 / 2, for eta = 1 only |

    The last step, from the smallest noise level to zero, is x = D(x; σ) in every scheme. In all, `euler` and `taylor`
    evaluate the network `num_steps` times, `rk` once more (so does `taylor` if eta ≠ 1 in the first step).

    Args:
        net: denoiser; `net(x, sigma, class_labels)` with x of shape [N, …] and a 0-dim sigma returns D(x; σ). It is
            called in the dtype of its parameters, or of the state if it has none. Honoured where it has them:
            `sigma_min`, `sigma_max` (its range) and `round_sigma(sigma)` (the levels it knows).
        latents: standard normal, [N, …]; the first state is latents·σ_max.
        class_labels: passed on to `net`.
        randn_like: called as `randn_like(x)`, once per standard normal of shape and dtype of x that a step needs.
        num_steps: N ≥ 1 noise levels t_i = (σ_max^{1/ρ} + i/(N−1)·(σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, then 0.
        sigma_min, sigma_max, rho: see `num_steps`; 0 < sigma_min < sigma_max, rho > 0.
        S_min, S_max: noise is added in steps that start at S_min ≤ t_i ≤ S_max; outside, κ = 0.
        S_noise: factor on the noise.
        eta: κ = eta², ≥ 0.
        scheme: 'euler', 'taylor' or 'rk'.
        dtype: of the state; float64 by default, float32 on devices without it (mps).
        callback: called after step i as `callback(i, x, D, sigma)`: the new state, the denoised images that the step
            used, and the noise level it started from.

    Returns:
        Images, of the shape of `latents`, in `dtype`.

    Raises:
        ValueError: an argument is out of its range, or `rk` is asked for another κ than 1.
    """
    if scheme not in SCHEMES:
        raise ValueError(f'scheme={scheme!r} is not one of {", ".join(SCHEMES)}')
    if S_min > S_max:
        raise ValueError(f'S_min={S_min} is above S_max={S_max}')
    if eta < 0:
        raise ValueError(f'eta={eta} is negative')
    dtype = dtype or state_dtype(latents.device)
    sigmas = noise_levels(net, num_steps, sigma_min, sigma_max, rho)
    kappas = [eta**2 if S_min <= sigma <= S_max else 0.0 for sigma in sigmas[:-1]]
    if scheme == 'rk' and any(kappa != 1 for kappa in kappas[:-1]):
        raise ValueError("scheme='rk' needs eta=1 and no window (S_min, S_max) at every step; use scheme='taylor'")

    denoise = Denoiser(net, class_labels)
    x = latents.to(dtype) * sigmas[0]
    D = None
    for i in range(num_steps - 1):
        step, noise = SCHEMES[scheme], lambda x=x: S_noise * randn_like(x)
        x, D = step(denoise, x, D, sigmas[i], sigmas[i + 1], kappas[i], noise)
        if callback is not None:
            callback(i, x, D, sigmas[i])
    x = denoise(x, sigmas[num_steps - 1])
    if callback is not None:
        callback(num_steps - 1, x, x, sigmas[num_steps - 1])
    return x


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == 'mps' else torch.float64


def noise_levels(net: Any, num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """EDM's time steps σ_0 > … > σ_{N−1}, within the range of `net` and rounded to what it knows, then 0.

    One step starts at σ_max. Karras et al. 2022, equation 5.
    """
    sigma_min = max(sigma_min, getattr(net, 'sigma_min', 0))
    sigma_max = min(sigma_max, getattr(net, 'sigma_max', math.inf))
    if num_steps < 1:
        raise ValueError(f'num_steps={num_steps} is less than 1')
    if rho <= 0:
        raise ValueError(f'rho={rho} is not positive')
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f'noise levels from sigma_max={sigma_max} down to sigma_min={sigma_min} are not a range')
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    try:
        top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    except OverflowError:
        raise ValueError(f'rho={rho} is too small') from None
    sigmas = (top + ramp * (bottom - top)) ** rho
    if hasattr(net, 'round_sigma'):
        sigmas = torch.as_tensor(net.round_sigma(sigmas))
    return [*sigmas.tolist(), 0.0]


# ----------------------------------------------------------------------------
# Schemes. A step maps the state x at noise level `sigma` to the state at `sigma_next`, and returns the denoised images
# it used as well: the next step gets them as `D_lag` (None in the first). `noise()` is a fresh standard normal.


def euler_step(denoise, x, D_lag, sigma, sigma_next, kappa, noise):
    """D frozen over the step; the linear part of (1) is solved exactly."""
    h, a = math.log(sigma / sigma_next), 1 + kappa
    D = denoise(x, sigma)
    N_std = sigma_next * math.sqrt(-math.expm1(-2 * kappa * h))
    return math.exp(-a * h) * x - math.expm1(-a * h) * D + N_std * noise(), D


def taylor_step(denoise, x, D_lag, sigma, sigma_next, kappa, noise):
    """Itô–Taylor of strong order 1.5: D moves over the step as (2) says, with its Jacobian frozen.

        x' = e^{−ah} x + w D + N + J_D [Z + (1−κ) c (D* − x)] + ∂D/∂σ [−(1−κ) c σ]

    with h = ln(σ/σ'), a = 1 + κ, w = 1 − e^{−ah}, c = h − w/a. The brackets are the tangents of one forward-mode
    product. D*, the slope of the ODE, may be the previous step's D without loss of order.
    """
    h, a = math.log(sigma / sigma_next), 1 + kappa
    N, Z = noise_pair(noise(), noise(), kappa, sigma_next, h)
    tangent, sigma_tangent = Z, 0.0
    if kappa != 1:
        D_star = denoise(x, sigma) if D_lag is None else D_lag
        c = (1 - kappa) * a * h**2 * exp_difference(0, 0, -a * h)
        tangent, sigma_tangent = Z + c * (D_star - x), -c * sigma
    D, correction = denoise.jvp(x, sigma, tangent, sigma_tangent)
    return math.exp(-a * h) * x - math.expm1(-a * h) * D + N + correction, D


def rk_step(denoise, x, D_lag, sigma, sigma_next, kappa, noise):
    """The one-third rule, for κ = 1: one evaluation, at a node where Brownian motion has the variance of ΔZ/h.

        τ_m = τ + h/3,   y_m = y + (h/3) D_lag + ΔZ/h,   y' = y + h D(y_m/τ_m; τ_m^{−½}) + ΔB

    in τ = 1/σ², y = τx, with h = τ' − τ and ΔB = √h z₁, ΔZ = ∫(B − B_τ) dτ = h^{3/2} (z₁/2 + z₂/(2√3)).

    The node has the marginal law that the network was trained on, its mean is D (a martingale), and its noise enters
    D as the order 1.5 demands.
    """
    z1, z2 = noise(), noise()
    if D_lag is None:
        D_lag = denoise(x, sigma)
    tau, tau_next = sigma**-2, sigma_next**-2
    h = tau_next - tau
    tau_m = tau + h / 3
    dB, dZ_over_h = math.sqrt(h) * z1, math.sqrt(h) * (z1 / 2 + z2 / math.sqrt(12))
    D = denoise((tau * x + h / 3 * D_lag + dZ_over_h) / tau_m, tau_m**-0.5)
    return (tau * x + h * D + dB) / tau_next, D


SCHEMES = {'euler': euler_step, 'taylor': taylor_step, 'rk': rk_step}

# ----------------------------------------------------------------------------
# Noise.


def noise_pair(z1, z2, kappa, sigma_next, h):
    """The jointly normal pair (N, Z) of one step, made of two independent standard normals.

        N = σ' √(2κ) ∫ e^{−κq} dW_q,     Z = σ' √(2κ) ∫ (e^q − e^{−κq}) dW_q,     q from 0 to h = ln(σ/σ')

    N is the noise that reaches x; Z is the noise that entered D through x during the step, integrated over the rest
    of it.
    """
    var_N, cov, var_Z = noise_moments(kappa, h)
    if var_N == 0:
        return 0 * z1, 0 * z2
    std_N = math.sqrt(var_N)
    rest = math.sqrt(max(var_Z - cov**2 / var_N, 0))
    return sigma_next * std_N * z1, sigma_next * (cov / std_N * z1 + rest * z2)


def noise_moments(kappa, h):
    """Var N, Cov(N, Z), Var Z of `noise_pair`, for σ' = 1.

    They are sums of integrals of exponentials that cancel to order h² and h³; as divided differences they do not.
    """
    a = 1 + kappa
    nodes = [0, -2 * kappa * h, (1 - kappa) * h, 2 * h]
    var_N = -math.expm1(-2 * kappa * h)
    cov = 2 * kappa * a * h**2 * exp_difference(*nodes[:3])
    var_Z = 4 * kappa * a**2 * h**3 * exp_difference(*nodes)
    return var_N, cov, var_Z


def exp_difference(*nodes):
    """The divided difference exp[x_0, …, x_k], for example exp[0, x] = (eˣ − 1)/x; 1/k! if all nodes are 0.

    It is the corner of the exponential of the matrix with the nodes on its diagonal and ones above (Opitz 1964).
    Shifted to non-negative nodes that matrix has no negative entry, so nothing cancels, however close the nodes are.
    """
    low = min(nodes)
    matrix = torch.diag(torch.tensor([node - low for node in nodes], dtype=torch.float64))
    matrix += torch.diag(torch.ones(len(nodes) - 1, dtype=torch.float64), 1)
    return math.exp(low) * float(torch.linalg.matrix_exp(matrix)[0, -1])


# ----------------------------------------------------------------------------
# The network.


class Denoiser:
    """D(x; σ) of a network for fixed class labels, with x and D in the dtype of the state."""

    def __init__(self, net, class_labels=None):
        self._net = net
        self._class_labels = class_labels
        weight = next(net.parameters(), None) if hasattr(net, 'parameters') else None
        self._dtype = None if weight is None else weight.dtype

    def __call__(self, x, sigma):
        return self._call(self._cast(x), self._cast(sigma, x)).to(x.dtype)

    def jvp(self, x, sigma, dx, dsigma):
        """(D, J_D dx + ∂D/∂σ dsigma), by one forward-mode evaluation."""
        at, along = [self._cast(x), self._cast(sigma, x)], [self._cast(dx), self._cast(dsigma, x)]
        if dsigma == 0:  # a network need not be differentiable in σ
            D, dD = torch.func.jvp(lambda v: self._call(v, at[1]), (at[0],), (along[0],))[:2]
        else:
            D, dD = torch.func.jvp(self._call, tuple(at), tuple(along))[:2]
        return D.to(x.dtype), dD.to(x.dtype)

    def _call(self, x, sigma):
        return self._net(x, sigma, self._class_labels)

    def _cast(self, value, like=None):
        """A tensor of the network's dtype, on the device of `like`."""
        reference = value if like is None else like
        return torch.as_tensor(value, dtype=self._dtype or reference.dtype, device=reference.device)


class CountCalls:
    """A network that counts its work: `calls` evaluations, `jvp_calls` of them with a forward-mode product."""

    def __init__(self, net):
        self._net = net
        self.calls = 0
        self.jvp_calls = 0

    def __call__(self, x, *args, **kwargs):
        self.calls += 1
        self.jvp_calls += torch.autograd.forward_ad.unpack_dual(x).tangent is not None
        return self._net(x, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._net, name)
