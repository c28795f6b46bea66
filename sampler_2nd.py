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
per pixel, the increment N of x and the integral Z that it leaves in D: the pair that `ddb` stands for. `rk` has the
same orders without a derivative, by one evaluation inside the step, where D is in mean what the step needs.

Where to enter: `integrate` is the loop; a scheme is one function, `…_step`, and one line of `SCHEMES`; `noise_pair`
makes N and Z of two normals; `BrownianPath` is a source of noise that knows the whole path, so that the number of steps
may change; `Guided` makes one network of two, and `CountCalls` counts what one does.

Sources: Karras et al. 2022 (arXiv 2206.00364), equations 1 and 6 for (1); Kloeden & Platen 1992, section 10.4 for
strong schemes of order 1.5; Montanari 2023 (arXiv 2305.10690) for the coordinates τ = 1/σ², y = τ x, where (1) with
κ = 1 reads dy = D dτ + dB.
"""

import contextlib
import functools
import itertools
import math
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ['SCHEMES', 'BrownianPath', 'CountCalls', 'Guided', 'Scheme', 'ito_taylor_sampler']

F = TypeVar('F', bound=Callable)

# ----------------------------------------------------------------------------
# The loop.


def explain_extremes(sampler: F) -> F:
    """Make a ValueError of what float64 cannot compute of extreme settings, 1e200² say; not of a network's errors."""

    @functools.wraps(sampler)
    def explained(*args, **kwargs):
        try:
            return sampler(*args, **kwargs)
        except (ArithmeticError, torch.linalg.LinAlgError) as err:
            if any(frame.f_code is Denoiser._call.__code__ for frame, _ in traceback.walk_tb(err.__traceback__)):
                raise
            raise ValueError(
                f'rho, sigma_min, sigma_max or the noise is too extreme for float64: {err.args[-1]}'
            ) from err

    return cast(F, explained)


@explain_extremes
@torch.no_grad()
def ito_taylor_sampler(
    net: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    randn_like: 'Callable[[torch.Tensor], torch.Tensor] | BrownianPath' = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
    S_min: float = 0,
    S_max: float = float('inf'),
    S_noise: float = 1,
    eta: float | None = None,
    scheme: 'str | Scheme' = 'taylor',
    dtype: torch.dtype | None = None,
    callback: Callable[[int, torch.Tensor, torch.Tensor, float], Any] | None = None,
    init: torch.Tensor | None = None,
    sigmas: Sequence[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn noise into images along the reverse-time SDE (1), with `num_steps` evaluations of the network.

    Args:
        net: denoiser; `net(x, sigma, class_labels)` with x of shape [N, …] and a 0-dim sigma returns D(x; σ). It is
            called in the dtype of its parameters, or of the state if it has none. Honoured where it has them:
            `sigma_min`, `sigma_max` (its range) and `round_sigma(sigma)` (the levels it knows).
        latents: standard normal, [N, …]; the first state is latents·σ_max, on top of `init` if that is given.
        class_labels: passed on to `net`.
        randn_like: called as `randn_like(x)`, once per standard normal of shape and dtype of x that a step needs. Or a
            `BrownianPath`: then the noise depends on its seeds, not on the time steps.
        num_steps: N ≥ 1 noise levels t_i = (σ_max^{1/ρ} + i/(N−1)·(σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, then 0.
        sigma_min, sigma_max, rho: see `num_steps`; 0 < sigma_min < sigma_max, rho > 0. By default EDM's 0.002, 80
            and 7; `rk` with fewer than 32 steps ends higher, as `levels_for_steps` says, if none of the three is given.
        S_min, S_max: noise is added in steps that start at S_min ≤ t_i ≤ S_max; outside, κ = 0.
        S_noise: factor on the noise.
        eta: κ = eta², ≥ 0; for `rk` below √3. By default κ = 1, under guidance 1/guidance.
        scheme: a `Scheme`, or a name in `SCHEMES`, which has their orders: 'euler', 'taylor' or 'rk'.
        dtype: of the state; float64 by default, float32 on devices without it (mps).
        callback: called after step i = 0 … N−1 as `callback(i, x, D, sigma)`: the new state, the denoised images that
            the step used, and the noise level it started from. In the last step x is D.
        init: clean images to start from, floating point in [−1, 1], of the shape of `latents`; sigma_max says how much
            of them is forgotten: about 0.5 keeps most, 10 little of an image.
        sigmas: noise levels of your own in place of the six arguments above, falling and above 0; a last 0 may be left
            out. `tune.py` makes them for a network.

    Returns:
        Images, of the shape of `latents`, in `dtype`.

    Raises:
        ValueError: an argument is out of its range or float64's, or the network returns no image of its input's shape.
        NotFiniteError: an image is not finite after a step.
    """
    eta = usual_eta(property_of(net, 'guidance', 1)) if eta is None else eta
    chosen = choose_scheme(scheme, eta)
    check_noise_options(S_min, S_max, S_noise)
    ends = complete_levels(sigma_min, sigma_max, rho, num_steps if chosen.few_steps else math.inf)
    sigmas = noise_levels(net, num_steps, **ends) if sigmas is None else given_levels(net, sigmas)
    kappas = [eta**2 if S_min <= sigma <= S_max else 0.0 for sigma in sigmas[:-1]]
    x = first_state(latents.to(dtype or state_dtype(latents.device)), sigmas[0], init)
    return integrate(Denoiser(net, class_labels), x, sigmas, kappas, chosen, randn_like, S_noise, callback)


def integrate(denoise, x, sigmas, kappas, scheme, randn_like, S_noise=1, callback=None):
    """The loop: a step from each noise level to the next; the last one, to zero, is x = D(x; σ) in every scheme."""
    if not len(x):
        return x
    past: list[tuple[float, torch.Tensor]] = []
    num_steps = len(kappas)
    for i in range(num_steps - 1):
        interval = sigmas[i], sigmas[i + 1], kappas[i]
        normals = step_normals(randn_like, x, *interval, scheme.time_integral)
        x, D = scheme.step(denoise, x, past, *interval, lambda normals=normals: S_noise * next(normals))
        check_finite(x, i, num_steps)
        past = [*past[-1:], (sigmas[i], D)]
        if callback is not None:
            callback(i, x, D, sigmas[i])
    x = denoise(x, sigmas[num_steps - 1])
    check_finite(x, num_steps - 1, num_steps)
    if callback is not None:
        callback(num_steps - 1, x, x, sigmas[num_steps - 1])
    return x


def choose_scheme(name, eta):
    """The scheme of this name. Raises ValueError if there is none, or if it is not defined for this `eta`."""
    if not isinstance(name, Scheme) and name not in SCHEMES:
        raise ValueError(f'scheme={name!r} is not one of {", ".join(SCHEMES)}')
    scheme = name if isinstance(name, Scheme) else SCHEMES[name]
    if not 0 <= eta < scheme.eta_below:
        raise ValueError(f'scheme={name!r} needs an eta from 0 to below {scheme.eta_below:.4g}, and this is {eta:g}')
    return scheme


def usual_eta(guidance):
    """η where none is given: κ = 1 reverses time; guidance multiplies what noise does to D, so it gets 1/guidance."""
    return max(1.0, guidance) ** -0.5


def check_noise_options(S_min, S_max, S_noise):
    """Raise ValueError for a window that is none, and for a factor that nothing can be computed with."""
    if not math.isfinite(S_noise):
        raise ValueError(f'S_noise={S_noise} is not a number to compute with')
    if not S_min <= S_max:
        raise ValueError(f'S_min={S_min} is above S_max={S_max}')


class NotFiniteError(ValueError):
    """An image of the batch, number `row`, has become infinite or no number."""

    def __init__(self, row, step, num_steps):
        super().__init__(
            f'image {row} of the batch is not finite after step {step + 1} of {num_steps}: '
            'the network returns such numbers, or the steps are too long or the noise too strong'
        )
        self.row = row


def check_finite(x, step, num_steps):
    """Raise NotFiniteError for the first image that is not finite after a step."""
    if not torch.isfinite(x).all():
        raise NotFiniteError(torch.isfinite(x).flatten(1).all(dim=1).tolist().index(False), step, num_steps)


def first_state(latents, sigma, init=None):
    """latents·σ + init"""
    if init is None:
        return latents * sigma
    if init.shape != latents.shape or not init.is_floating_point():
        wanted = f'floating point in [−1, 1], {list(latents.shape)} as latents'
        raise ValueError(f'init is {init.dtype} {list(init.shape)}; it has to be {wanted}')
    return latents * sigma + init.to(latents)


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == 'mps' else torch.float64


def noise_levels(net: Any, num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """EDM's time steps (Karras et al. 2022, equation 5) in the range of `net`, rounded to what it knows, then 0."""
    sigma_min = max(sigma_min, float(property_of(net, 'sigma_min', 0)))
    sigma_max = min(sigma_max, float(property_of(net, 'sigma_max', math.inf)))
    if num_steps < 1:
        raise ValueError(f'num_steps={num_steps} is less than 1')
    if not 0 < rho < math.inf:
        raise ValueError(f'rho={rho} is not positive and finite')
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f'noise levels from sigma_max={sigma_max} down to sigma_min={sigma_min} are not a range')
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (top + ramp * (bottom - top)) ** rho
    if num_steps > 1:
        sigmas[-1] = sigma_min  # which small rho would lose by rounding
    return rounded_levels(net, sigmas)


def rounded_levels(net, sigmas):
    round_sigma = property_of(net, 'round_sigma')
    return [*(sigmas if round_sigma is None else torch.as_tensor(round_sigma(sigmas))).tolist(), 0.0]


def given_levels(net, sigmas):
    """Noise levels that someone has chosen, rounded to what `net` knows, and 0. ValueError if they cannot be."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device='cpu').flatten()
    levels = levels[:-1] if len(levels) and levels[-1] == 0 else levels
    if not len(levels) or not (levels.isfinite() & (levels > 0)).all() or not (levels.diff() < 0).all():
        raise ValueError(f'sigmas={levels.tolist()}: noise levels are finite, above 0, and fall')
    low, high = float(property_of(net, 'sigma_min', 0)), float(property_of(net, 'sigma_max', math.inf))
    if not low <= levels[-1] <= levels[0] <= high:
        raise ValueError(f'sigmas go from {levels[0]:g} to {levels[-1]:g}; this network knows {low:g} to {high:g}')
    return rounded_levels(net, levels)


EDM_LEVELS = {'sigma_min': 0.002, 'sigma_max': 80.0, 'rho': 7.0}
FEW_STEPS = [(6, 0.08, 30.0), (8, 0.02, 12.0), (12, 0.02, 12.0), (32, 0.002, 7.0)]  # N, sigma_min, rho (docs/method.md)


def levels_for_steps(num_steps):
    """sigma_min and rho for N steps of `rk`, those of `FEW_STEPS`; between them their logarithms are linear in ln N.

    The last step leaves what D cannot see below sigma_min, the others the more the longer they are.
    """
    num_steps = min(max(num_steps, FEW_STEPS[0][0]), FEW_STEPS[-1][0])
    low, high = next(pair for pair in itertools.pairwise(FEW_STEPS) if num_steps <= pair[1][0])
    share = math.log(num_steps / low[0]) / math.log(high[0] / low[0])
    sigma_min, rho = (a ** (1 - share) * b**share for a, b in zip(low[1:], high[1:], strict=True))
    return EDM_LEVELS | {'sigma_min': sigma_min, 'rho': rho}


def complete_levels(sigma_min, sigma_max, rho, num_steps):
    """The three by name: where all are None those for so many steps, where some are EDM's."""
    ends = {'sigma_min': sigma_min, 'sigma_max': sigma_max, 'rho': rho}
    given = {name: value for name, value in ends.items() if value is not None}
    return EDM_LEVELS | given if given else levels_for_steps(num_steps)


# ----------------------------------------------------------------------------
# Schemes. A step maps the state x at noise level `sigma` to the state at `sigma_next`, and returns the denoised images
# it used as well: the next steps get them in `past`, which lists (sigma, D) of the last two steps, or as many as there
# were, the latest last. `noise()` is a fresh standard normal.


def euler_step(denoise, x, past, sigma, sigma_next, kappa, noise):
    """D frozen over the step; the linear part of (1) is solved exactly."""
    h, a = math.log(sigma / sigma_next), 1 + kappa
    D = denoise(x, sigma)
    N_std = sigma_next * math.sqrt(-math.expm1(-2 * kappa * h))
    return math.exp(-a * h) * x - math.expm1(-a * h) * D + N_std * noise(), D


def taylor_step(denoise, x, past, sigma, sigma_next, kappa, noise):
    """Itô–Taylor of strong order 1.5: D moves over the step as (2) says, with its Jacobian frozen.

        x' = e^{−ah} x + w D + N + J_D [b Z + (1−κ) c (D* − x)] + ∂D/∂σ [−(1−κ) c σ]

    with h = ln(σ/σ'), a = 1 + κ, w = 1 − e^{−ah}, c = h − w/a and b of `tangent_weight`. The brackets are the tangents
    of one forward-mode product. D*, the slope of the ODE, may be the previous step's D without loss of order.
    """
    h, a = math.log(sigma / sigma_next), 1 + kappa
    N, Z = noise_pair(noise(), noise(), kappa, sigma_next, h)
    tangent, sigma_tangent = tangent_weight(kappa, h) * Z, 0.0
    if kappa != 1:
        D_star = past[-1][1] if past else guess_D(x, sigma)
        c = (1 - kappa) * a * h**2 * exp_difference(0, 0, -a * h)
        tangent, sigma_tangent = tangent + c * (D_star - x), -c * sigma
    D, correction = denoise.jvp(x, sigma, tangent, sigma_tangent)
    return math.exp(-a * h) * x - math.expm1(-a * h) * D + N + correction, D


def tangent_weight(kappa, h):
    """b = 1 + h/4 for κ ≤ 1, else 1: in long steps a frozen Jacobian brings too little variance (docs/method.md)."""
    return 1 + h / 4 if kappa <= 1 else 1.0


def rk_step(denoise, x, past, sigma, sigma_next, kappa, noise, bound=0.35):
    """One evaluation, at a node inside the step, for κ < 3.

        x' = e^{−ah} x + w D(x_m; σ_m) + N,     x_m = g x + (1 − g) D̂ + (σ_m/σ')^a Z/w

    with h, a, w of `taylor_step`, σ_m = σ e^{−h_m} and g of `rk_node`, and Z the time integral of `noise_pair`. For
    κ = 1 the node is at a third of the step in τ = 1/σ², for κ = 0 about the middle in λ. D̂ predicts D from the past
    steps, changing the last one by no more than `limited` allows.
    """
    h, a = math.log(sigma / sigma_next), 1 + kappa
    N, Z = noise_pair(noise(), noise(), kappa, sigma_next, h, time_integral=True)
    if past:
        D_last = past[-1][1]
        change = predict_D(past, sigma, kappa) - D_last
        D_hat = D_last + limited(change, D_last, sigma, bound * usual_eta(getattr(denoise, 'guidance', 1)))
    else:
        D_hat = guess_D(x, sigma)
    h_m, log_g, noise_weight = rk_node(kappa, h)
    x_m = math.exp(log_g) * x - math.expm1(log_g) * D_hat + noise_weight * Z
    D = denoise(x_m, sigma * math.exp(-h_m))
    return math.exp(-a * h) * x - math.expm1(-a * h) * D + N, D


@functools.lru_cache(maxsize=256)
def rk_node(kappa, h):
    """(h_m, ln g, weight of Z) of the node of `rk_step`: where the SDE (1) with another noise strength κ_m passes.

    So the node has the law that belongs to its noise level, whatever κ_m is, and D drifts to it by (1 − κ_m) h_m times
    its derivative along the ODE. Two conditions fix the node: D drifts as far as it does on average over the step, and
    the noise of the node is the one that the step's D needs:

        (1 − κ_m) h_m = (1 − κ) c/w,     1 − e^{−2u} = Var[(σ_m/σ')^a Z/w]/σ_m²,     u = κ_m h_m,     g = e^{−h_m−u}

    with c of `taylor_step`. In short steps h_m = (3 − κ) h/6. Newton's method finds u, from below.
    """
    a = 1 + kappa
    w = -math.expm1(-a * h)
    if h == 0:
        return 0.0, 0.0, 0.0
    drift = (1 - kappa) * a * h**2 * exp_difference(0, 0, -a * h) / w
    variance = noise_moments(kappa, h, time_integral=True)[2] / w**2 * math.exp(2 * kappa * (h - drift))
    u, change = 0.0, math.inf
    while change > 1e-15 * u:
        noise, lack = math.exp(-2 * u), variance * math.exp(-2 * kappa * u)
        change = (lack + math.expm1(-2 * u)) / (2 * noise + 2 * kappa * lack)
        u += change
    h_m = drift + u
    return h_m, -h_m - u, math.exp(a * (h - h_m)) / w


def predict_D(past, sigma, kappa):
    """D at `sigma`, extrapolated from what the last two steps of `rk` used, or the last one if alone.

        D̂ = D₁ + (ln(T/e₁) / ln(e₁/e₀)) (e₀ + e₁)/(2 √(e₀ e₁)) (D₁ − D₀),     T = σ^{−(1+κ)}

    A step's D has drifted, and is correlated with the noise of its step, as D at the middle e of the step would be. The
    first factor extrapolates from these times, so that D̂ has the mean of the true D and its covariance with x, up to
    second order; the last D alone has not, and nearly all of the error of `rk` would come from there. The second is
    1 for short steps. In long ones the node lacks the spread of the image itself, and it makes good for that: on
    Gaussian data of any variance, the result has the variance of the data (docs/method.md, section 5).
    """
    (sigma_0, D_0), (sigma_1, D_1) = past[0], past[-1]
    if len(past) == 1 or sigma_0 == sigma:  # a network that rounds its levels may repeat one
        return D_1
    T_0, T_1, T = (each ** -(1 + kappa) for each in (sigma_0, sigma_1, sigma))
    e_0, e_1 = (T_0 + T_1) / 2, (T_1 + T) / 2
    ahead = math.log(T / e_1) / math.log(e_1 / e_0) * (e_0 + e_1) / (2 * math.sqrt(e_0 * e_1))
    return D_1 + ahead * (D_1 - D_0)


def limited(change, D, sigma, bound):
    """`change`, in each image with a root mean square of at most bound·√(σ² + (0.7 rms D)²).

    The noise that is left bounds how far D can still go: E|D_later − D|² ≤ σ² tr J. An extrapolation that goes further
    errs, and where guidance multiplies it, step by step more. In short steps nothing is limited.
    """
    squares, D_squares = (each.reshape(len(D), -1).square().mean(1) for each in (change, D))
    allowed = bound * (sigma**2 + 0.49 * D_squares).sqrt()
    factor = (allowed / squares.sqrt().clamp_min(torch.finfo(D.dtype).tiny)).clamp_max(1)
    return change * factor.reshape(-1, *[1] * (D.ndim - 1))


def guess_D(x, sigma):
    """D of standard normal data, for a first step, which has no past: multiplied by h² J_D, it need not be good."""
    return x / (1 + sigma**2)


class Scheme(NamedTuple):
    """All that the loop asks of a scheme."""

    step: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # called as `euler_step` is
    time_integral: bool = False  # its Z is the plain time integral of `noise_moments`; a `BrownianPath` gives it that
    eta_below: float = math.inf  # it is defined for 0 ≤ eta < eta_below
    few_steps: bool = False  # by default its levels are those of `levels_for_steps`


SCHEMES = {  # and their strong / weak orders
    'euler': Scheme(euler_step),  # 1 / 1
    'taylor': Scheme(taylor_step),  # 1.5 / 2
    'rk': Scheme(rk_step, time_integral=True, eta_below=math.sqrt(3), few_steps=True),  # 1.5 / 2
}

# ----------------------------------------------------------------------------
# Noise.


def noise_pair(z1, z2, kappa, sigma_next, h, time_integral=False):
    """The jointly normal pair (N, Z) of one step, made of two independent standard normals.

        N = σ' √(2κ) ∫ e^{−κq} dW_q,     Z = σ' √(2κ) ∫ (e^q − e^{−κq}) dW_q,     q from 0 to h = ln(σ/σ')

    N is the noise that reaches x; Z is the noise that entered D through x during the step, integrated over the rest
    of it. With `time_integral`, Z is that of `rk`: see `noise_moments`.
    """
    if kappa == 0 or h == 0:
        return 0 * z1, 0 * z2
    (N1, _), (Z1, Z2) = noise_factor(kappa, h, time_integral)
    return sigma_next * N1 * z1, sigma_next * (Z1 * z1 + Z2 * z2)


@functools.lru_cache(maxsize=256)
def noise_moments(kappa, h, time_integral=False):
    """Var N, Cov(N, Z), Var Z of `noise_pair`, for σ' = 1.

    With `time_integral`, Z is the plain time integral ΔZ of `rk`, in units of x: ∫ (e^{−κq} − e^{−(κ+a)q}) dW with
    a = 1 + κ takes the place of ∫ (e^q − e^{−κq}) dW.

    They are sums of integrals of exponentials that cancel to order h² and h³; as divided differences they do not.
    """
    a = 1 + kappa
    top = -kappa if time_integral else 1
    var_N = -math.expm1(-2 * kappa * h)
    cov = 2 * kappa * a * h**2 * exp_difference(0, (top - kappa - a) * h, (top - kappa) * h)
    var_Z = 4 * kappa * a**2 * h**3 * exp_difference(0, 2 * (top - a) * h, (2 * top - a) * h, 2 * top * h)
    return var_N, cov, var_Z


def noise_factor(kappa, h, time_integral=False):
    """The lower triangle ((N1, 0), (Z1, Z2)) with N = N1 z₁, Z = Z1 z₁ + Z2 z₂, for σ' = 1."""
    var_N, cov, var_Z = noise_moments(kappa, h, time_integral)
    std_N = math.sqrt(var_N)
    return (std_N, 0.0), (cov / std_N, math.sqrt(max(var_Z - cov**2 / var_N, 0)))


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
# Noise that does not depend on the time steps.


def step_normals(randn_like, x, sigma, sigma_next, kappa, time_integral):
    """Iterate over the standard normals that a step may ask for."""
    if isinstance(randn_like, BrownianPath):
        yield from randn_like.normals(x, sigma, sigma_next, kappa, time_integral)
    else:
        while True:
            yield randn_like(x)


class BrownianPath:
    """Brownian motion in λ = −ln σ, a path per seed: one seed gives the same picture at 20 and at 40 steps.

    What a step sees of the path is its (N, Z) of `noise_pair`. The pairs of disjoint intervals are independent, and
    those of adjacent ones `chain`. So the path is a row of trees, one for each interval [k, k + 1] of λ: the root draws
    its (N, Z), and a node's halves theirs from the law that they have given the node's (a Brownian bridge of pairs).
    The normals for it are a hash of seed, interval, node and pixel. Nothing is stored; an answer depends on no other.
    Leaves have the length 2^−10; inside one, the cut is at the end of the step instead of the middle.

    Exact: the joint law of all steps of any grid with at most one level inside a leaf, and the chaining. Two grids
    share one path but for what happens inside a leaf where they have unequal levels, less than 1e-3 apart in ln σ. The
    path belongs to `kappa` and to the kind of Z: schemes share paths only if they share these.

    Args:
        seeds: an integer for each image of the batch; taken modulo 2^64.
    """

    DEPTH = 10

    def __init__(self, seeds):
        self._seeds = [(int(seed) + 2**63) % 2**64 - 2**63 for seed in seeds]

    def normals(self, x, sigma, sigma_next, kappa, time_integral=False):
        """The two standard normals, of shape, dtype and device of x, that make the (N, Z) of this step."""
        h = grid_lambda(sigma_next) - grid_lambda(sigma)
        if kappa == 0 or h == 0:
            return torch.zeros_like(x), torch.zeros_like(x)
        N, Z = (value / sigma_next for value in self.pair(x, sigma, sigma_next, kappa, time_integral))
        (N1, _), (Z1, Z2) = noise_factor(kappa, h, time_integral)
        z1 = N / N1
        return z1.to(x), ((Z - Z1 * z1) / Z2).to(x)

    def pair(self, x, sigma, sigma_next, kappa, time_integral=False):
        """(N, Z) of the step from `sigma` to `sigma_next`, of the shape of x, in float64.

        Raises:
            ValueError: x has another number of rows than there are seeds.
        """
        if len(x) != len(self._seeds):
            raise ValueError(f'{len(x)} images, but the path has {len(self._seeds)} seeds')
        kind, start, stop = (kappa, time_integral), grid_lambda(sigma), grid_lambda(sigma_next)
        total = None
        for k in range(math.floor(start), math.ceil(stop)):
            z1, z2 = self._node_normals((k, 0), x)
            (N1, _), (Z1, Z2) = noise_factor(kappa, 1, time_integral)
            value = math.exp(-k - 1) * N1 * z1, math.exp(-k - 1) * (Z1 * z1 + Z2 * z2)
            part = self._part(x, (start, stop), kind, (k, 1), (k, k + 1), value)
            total = part if total is None else chain(total, part, kind, min(stop, k + 1) - k)
        return total

    def _part(self, x, query, kind, node, interval, value):
        """(N, Z) over the part of the `query` that lies in the interval of a node, given the node's (N, Z)."""
        (start, stop), (low, high) = query, interval
        if start <= low and high <= stop:
            return value
        tree, index = node
        cut = (low + high) / 2
        if index >= 2**self.DEPTH:
            cut = start if start > low else stop
        children = self._bridge(x, kind, node, (low, cut, high), value)
        parts = [
            self._part(x, query, kind, (tree, 2 * index + i), ends, child)
            for i, (ends, child) in enumerate(zip([(low, cut), (cut, high)], children, strict=True))
            if start < ends[1] and ends[0] < stop
        ]
        return parts[0] if len(parts) == 1 else chain(parts[0], parts[1], kind, min(stop, high) - cut)

    def _bridge(self, x, kind, node, cuts, value):
        """(N, Z) of the two children of a node: the first from its normal law given their sum, the second by `chain`.

        With C₁, C₂ their covariances and (N, Z) = G (N, Z)₁ + (N, Z)₂, the precision is P = C₁⁻¹ + Gᵀ C₂⁻¹ G and the
        mean P⁻¹ Gᵀ C₂⁻¹ (N, Z).
        """
        low, cut, high = cuts
        inverse_1, inverse_2 = (inverse_covariance(kind, *ends) for ends in [(low, cut), (cut, high)])
        G = chain_matrix(kind, high - cut)
        covariance = torch.linalg.inv(inverse_1 + G.T @ inverse_2 @ G)
        (m11, m12), (m21, m22) = (covariance @ G.T @ inverse_2).tolist()
        (s11, _), (s21, s22) = torch.linalg.cholesky(covariance).tolist()
        z1, z2 = self._node_normals(node, x)
        N, Z = value
        N_1, Z_1 = m11 * N + m12 * Z + s11 * z1, m21 * N + m22 * Z + s21 * z1 + s22 * z2
        (g11, _), (g21, g22) = G.tolist()
        return (N_1, Z_1), (N - g11 * N_1, Z - g21 * N_1 - g22 * Z_1)

    def _node_normals(self, node, x):
        """Two standard normals per pixel of x, by Box and Muller from 53 bits of a hash each."""
        device = 'cpu' if x.device.type == 'mps' else x.device  # mps has no float64
        key = torch.tensor(self._seeds, dtype=torch.int64, device=device)
        for part in node:
            key = mix(key) + part
        stream = mix(key)[:, None] + torch.arange(2 * math.prod(x.shape[1:]), device=device)
        uniform = ((mix(stream) >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
        u1, u2 = uniform.reshape(len(x), 2, *x.shape[1:]).unbind(1)
        radius, angle = (-2 * u1.log()).sqrt_(), 2 * math.pi * u2
        return radius * angle.cos(), radius * angle.sin()


def grid_lambda(sigma):
    """λ = −ln σ to 2^−30: rounding errors of equal levels must not make intervals of their own."""
    return round(-math.log(sigma) * 2**30) / 2**30


def chain(first, second, kind, h):
    """(N, Z) of two adjacent intervals together; the second has length h in λ."""
    (g11, _), (g21, g22) = chain_matrix(kind, h).tolist()
    return g11 * first[0] + second[0], g21 * first[0] + g22 * first[1] + second[1]


def chain_matrix(kind, h):
    """G with (N, Z) = G (N, Z)₁ + (N, Z)₂ for adjacent intervals, the second of length h in λ."""
    kappa, time_integral = kind
    r = math.exp(-(1 + kappa) * h)
    G = [[r, 0], [r * (1 - r), r * r]] if time_integral else [[r, 0], [1 - r, 1]]
    return torch.tensor(G, dtype=torch.float64)


def inverse_covariance(kind, low, high):
    """Of (N, Z) over the interval from λ = low to high."""
    kappa, time_integral = kind
    var_N, cov, var_Z = (math.exp(-2 * high) * m for m in noise_moments(kappa, high - low, time_integral))
    return torch.linalg.inv(torch.tensor([[var_N, cov], [cov, var_Z]], dtype=torch.float64))


def mix(bits):
    """Hash of int64 tensors: the finalizer of SplitMix64 (Steele, Lea & Flood 2014), after one step of its counter."""
    bits = bits * -7046029254386353131 + -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return bits ^ ((bits >> 31) & (2**33 - 1))


# ----------------------------------------------------------------------------
# The network.


class Denoiser:
    """D(x; σ) of a network for fixed class labels, with x and D in the dtype of the state."""

    def __init__(self, net, class_labels=None):
        self._net = net
        self._class_labels = class_labels
        self._dtype = network_dtype(net)
        self.guidance = property_of(net, 'guidance', 1)

    def __call__(self, x, sigma):
        return self._call(self._cast(x), self._cast(sigma, x)).to(x.dtype)

    def jvp(self, x, sigma, dx, dsigma):
        """(D, J_D dx + ∂D/∂σ dsigma), by one forward-mode evaluation.

        Of PyTorch's attention kernels only the plain one has a forward mode, so that one is used. In inference mode
        there is none at all, so it is left, with copies of what was made in it. Raises ValueError where a layer of the
        network has no forward mode, or cuts the derivative.
        """
        leave = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
        with leave, torch.no_grad():
            at, along = [self._cast(x), self._cast(sigma, x)], [self._cast(dx), self._cast(dsigma, x)]
            at, along = ([value.clone() if value.is_inference() else value for value in each] for each in (at, along))
            try:
                with sdpa_kernel(SDPBackend.MATH), UncutDerivative(len(x)):
                    if dsigma == 0:  # a network need not be differentiable in σ
                        D, dD = torch.func.jvp(lambda v: self._call(v, at[1]), (at[0],), (along[0],))[:2]
                    else:
                        D, dD = torch.func.jvp(self._call, tuple(at), tuple(along))[:2]
            except RuntimeError as err:
                if re.search(NO_FORWARD_MODE, str(err)) is None:
                    raise
                cut = f' ({err})' if str(err).startswith(CUT) else ''
                raise ValueError(
                    f"{failed_layer(err)} has no forward-mode derivative{cut}, which scheme='taylor' needs; "
                    "use scheme='rk' (in generate.py: --sampler=rk)"
                ) from err
        return D.to(x.dtype), dD.to(x.dtype)

    def _call(self, x, sigma):
        try:
            D = self._net(x, sigma, self._class_labels)
        except RuntimeError as err:
            if re.search(OTHER_DTYPE, str(err)) is None:
                raise
            raise ValueError(
                f'the network does not compute in {x.dtype} ({err}); give the network itself instead of a function, '
                'cast x and sigma in the function, or pass dtype=torch.float32'
            ) from err
        if not torch.is_tensor(D):
            raise ValueError(f'the network returned a {type(D).__name__}; denoised images are a tensor')
        if D.shape != x.shape:
            raise ValueError(f'the network returned the shape {list(D.shape)} for images of {list(x.shape)}')
        return D

    def _cast(self, value, like=None):
        """A tensor of the network's dtype, on the device of `like`."""
        reference = value if like is None else like
        return torch.as_tensor(value, dtype=self._dtype or reference.dtype, device=reference.device)


CUT = 'it is cut by'
CUTS = {torch.Tensor.detach: 'detach', torch.detach: 'detach', torch.Tensor.data.__get__: 'data'}  # type: ignore[attr-defined]
# What PyTorch says in forward mode of: an operation without a rule; an autograd.Function without `jvp` or without
# `setup_context`; a kernel from outside PyTorch, which asks for the memory of a tensor that stands for two; group
# norm, of an input that is not contiguous (channels_last, or after attention).
NO_FORWARD_MODE = f'forward (mode )?AD|functorch|(have|access) storage|view size is not compatible|{CUT}'
OTHER_DTYPE = 'same dtype|scalar type|should be the same'  # of a float32 network in a function that gets float64


class UncutDerivative(TorchFunctionMode):
    """Raises RuntimeError for what would take the tangent of images, not of a number for each, away without a word."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        way = 'inference mode' if torch.is_inference_mode_enabled() else CUTS.get(func)
        given = [each for each in (*args, *(kwargs or {}).values()) if torch.is_tensor(each)]
        if way and any(each.numel() > self.batch and has_tangent(each) for each in given):
            raise RuntimeError(f'{CUT} {way}')
        return func(*args, **(kwargs or {}))


def has_tangent(value):
    with torch.inference_mode(False):
        return torch.autograd.forward_ad.unpack_dual(value).tangent is not None


def failed_layer(err):
    """Words for the innermost module that `err` was raised in: its name in the outermost one, and its class."""
    entered = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(err.__traceback__)]
    modules = [each for each in entered if isinstance(each, torch.nn.Module) and not isinstance(each, Wrapper)]
    if not modules:
        return 'the network'
    names = {module: name for name, module in modules[0].named_modules()}
    return f'layer {names.get(modules[-1]) or "(no name)"} of the network, a {type(modules[-1]).__name__},'


def property_of(net, name, default=None):
    """An attribute of a network, also behind DataParallel, DistributedDataParallel or torch.compile, which hide it."""
    while not hasattr(net, name):
        net = getattr(net, 'module', getattr(net, '_orig_mod', None))
        if net is None:
            return default
    return getattr(net, name)


def network_dtype(net):
    """The dtype that a network computes in: of its first floating-point weight of over a byte; None without one."""
    weights = net.parameters() if hasattr(net, 'parameters') else ()
    return next((each.dtype for each in weights if each.is_floating_point() and each.element_size() > 1), None)


class Wrapper(torch.nn.Module):
    """A module around a network (module or function) with the attributes of both; the network's are read only."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith('__') or 'net' not in {**self.__dict__, **self.__dict__.get('_modules', {})}:
                raise  # while a copy or a pickle is being filled
            return getattr(self.net, name)


class CountCalls(Wrapper):
    """A network that counts its work: `calls` evaluations, `jvp_calls` of them with a forward-mode product."""

    def __init__(self, net):
        super().__init__(net)
        self.calls = 0
        self.jvp_calls = 0

    def forward(self, x, *args, **kwargs):
        self.calls += 1
        self.jvp_calls += has_tangent(x)
        return self.net(x, *args, **kwargs)


class Guided(Wrapper):
    """A network steered away from a worse one, `gnet`: its denoiser is D = D_gnet + guidance·(D_net − D_gnet).

    Karras et al. 2024 (arXiv 2406.02507). With an unconditional `gnet` this is classifier-free guidance,
    with a smaller or less trained one autoguidance. All attributes are those of `net`: its noise levels, its dtype;
    `gnet` is evaluated in its own dtype.

        net, gnet = CountCalls(net), CountCalls(gnet)    # so that net.calls + gnet.calls is the work done
        images = ito_taylor_sampler(Guided(net, gnet, 1.5), latents, class_labels)

    A guided D is no posterior mean, so the orders of `taylor` and `rk` do not hold (docs/method.md, "Guidance").

    Args:
        net, gnet: networks as for `ito_taylor_sampler`; `gnet` is called without labels if its `label_dim` is 0.
        guidance: any number; 0 is `gnet`, 1 is `net` (then `gnet` is not called).

    Raises:
        ValueError: the two networks say that their images or labels differ.
    """

    def __init__(self, net, gnet, guidance):
        for name, spare in [('img_resolution', []), ('img_channels', []), ('label_dim', [0])]:
            expected, found = (property_of(each, name) for each in (net, gnet))
            if None not in (expected, found) and found not in [expected, *spare]:
                raise ValueError(f'gnet has {name}={found}, but net has {name}={expected}')
        super().__init__(net)
        self.gnet, self.guidance = gnet, guidance

    def forward(self, x, sigma, class_labels=None, **kwargs):
        D = self.net(x, sigma, class_labels, **kwargs)
        if self.guidance == 1:
            return D
        dtype = network_dtype(self.gnet) or x.dtype
        labels = None if property_of(self.gnet, 'label_dim') == 0 else class_labels
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device)
        D_gnet = self.gnet(x.to(dtype), sigma, labels, **kwargs).to(D.dtype)
        return D_gnet + self.guidance * (D - D_gnet)
