"""The second-order sampler: noise moments, steps by hand, init, guidance, calls, and that the file stands alone."""

import ast
import copy
import functools
import itertools
import math
import pathlib
import pickle
import shutil
import subprocess
import sys

import mpmath
import pytest
import torch

import sampler_2nd
from sampler_2nd import SCHEMES, CountCalls, Guided, ito_taylor_sampler

SOURCE = pathlib.Path(sampler_2nd.__file__)


class Gaussian:
    """The exact denoiser of N(0, s²)."""

    def __init__(self, s=0.5):
        self.s = s

    def __call__(self, x, sigma, class_labels=None):
        return x * self.s**2 / (self.s**2 + sigma**2)


# ----------------------------------------------------------------------------
# Noise.


def moments_by_quadrature(kappa, h, time_integral):
    """Var N, Cov(N, Z), Var Z from their integrals, in 30 digits."""
    with mpmath.workdps(30):
        kappa, h = mpmath.mpf(kappa), mpmath.mpf(h)
        cuts = [h * i / 16 for i in range(17)]

        def n(q):
            return mpmath.exp(-kappa * q)

        def z(q):
            if time_integral:
                return -mpmath.exp(-kappa * q) * mpmath.expm1(-(1 + kappa) * q)
            return mpmath.exp(-kappa * q) * mpmath.expm1((1 + kappa) * q)

        products = [lambda q: n(q) ** 2, lambda q: n(q) * z(q), lambda q: z(q) ** 2]
        return [float(2 * kappa * mpmath.quad(product, cuts)) for product in products]


@pytest.mark.parametrize('time_integral', [False, True])
@pytest.mark.parametrize('kappa', [0.01, 0.25, 1, 1 + 1e-9, 2.25, 4])
@pytest.mark.parametrize('h', [1e-8, 1e-4, 1e-2, 0.3, 1, 5, 20])
def test_noise_moments_are_exact_at_every_step_size(kappa, h, time_integral):
    expected = moments_by_quadrature(kappa, h, time_integral)
    assert sampler_2nd.noise_moments(kappa, h, time_integral) == pytest.approx(expected, rel=1e-12, abs=0)


def test_noise_moments_against_the_closed_form_for_exact_time_reversal():
    """κ = 1, h = ln 2: the integrals of 2e^{−2q}, 2(1 − e^{−2q}) and 2(e^q − e^{−q})²."""
    var_N, cov, var_Z = sampler_2nd.noise_moments(1, math.log(2))
    log2 = math.log(2)
    assert var_N == pytest.approx(3 / 4, rel=1e-14)
    assert cov == pytest.approx(2 * log2 - 3 / 4, rel=1e-13)
    assert var_Z == pytest.approx(15 / 4 - 4 * log2, rel=1e-13)


def test_noise_pair_has_the_moments():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 400_000, dtype=torch.float64)
    N, Z = sampler_2nd.noise_pair(z1, z2, kappa=0.49, sigma_next=3.0, h=0.7)
    expected = [9 * m for m in sampler_2nd.noise_moments(0.49, 0.7)]
    found = [float(N.var()), float((N * Z).mean()), float(Z.var())]
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize('count', [1, 2, 3, 4])
def test_divided_difference_of_equal_nodes_is_one_over_a_factorial(count):
    assert sampler_2nd.exp_difference(*[0.0] * count) == pytest.approx(1 / math.factorial(count - 1), rel=1e-15)
    assert sampler_2nd.exp_difference(0, 1) == pytest.approx(math.e - 1, rel=1e-15)


# ----------------------------------------------------------------------------
# Exact results for Gaussian data. The orders of convergence are in test_orders.py.


def final_variance(steps, s=0.5, **kwargs):
    """Variance of the sampler's result for Gaussian data, in exact arithmetic: a column per independent normal."""
    columns = iter(torch.eye(2 * steps + 1, dtype=torch.float64))
    latents = next(columns)
    out = ito_taylor_sampler(Gaussian(s), latents, randn_like=lambda x: next(columns), num_steps=steps, **kwargs)
    return float(out.square().sum())


def test_noise_factor_scales_the_noise_only():
    plain, doubled, ode = (final_variance(9, scheme='taylor', **kw) for kw in ({}, {'S_noise': 2}, {'S_noise': 0}))
    assert doubled - ode == pytest.approx(4 * (plain - ode), rel=1e-12)


@pytest.mark.parametrize(('eta', 'scheme'), [(0, 'euler'), (0, 'taylor'), (1, 'euler'), (1, 'taylor'), (1, 'rk')])
def test_images_from_init_have_the_mean_and_variance_of_the_equation(eta, scheme):
    """Given x = c + σn, the SDE with η = 1 draws x₀ from N(rx, rσ²), r = s²/(s²+σ²); the ODE maps x to √r x."""
    steps, s, sigma, c = 300, 0.5, 0.8, 0.7
    columns = iter(torch.eye(2 * steps + 2, dtype=torch.float64))
    init, latents = c * next(columns), next(columns)
    ends = {'sigma_max': sigma, 'sigma_min': 1e-3}
    out = ito_taylor_sampler(
        Gaussian(s), latents, None, lambda x: next(columns), steps, eta=eta, scheme=scheme, init=init, **ends
    )
    r = s**2 / (s**2 + sigma**2)
    mean, variance = (c * r, r**2 * sigma**2 + r * sigma**2) if eta else (c * math.sqrt(r), r * sigma**2)
    tolerance = 0.02 if scheme == 'euler' else 2e-4
    assert float(out[0]) == pytest.approx(mean, rel=tolerance)
    assert float(out[1:].square().sum()) == pytest.approx(variance, rel=tolerance)


def test_an_init_of_zeros_changes_nothing():
    latents, images = torch.randn(2, 1, 4, 4), []
    for init in (None, torch.zeros(2, 1, 4, 4)):
        torch.manual_seed(0)
        images.append(ito_taylor_sampler(Gaussian(), latents, init=init))
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ('init', 'message'),
    [
        (torch.zeros(1, 1, 4, 4), r'init is torch.float32 \[1, 1, 4, 4\].*\[2, 1, 4, 4\] as latents'),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), r'init is torch.uint8.*floating point in \[−1, 1\]'),
    ],
)
def test_an_init_that_does_not_fit_is_refused(init, message):
    with pytest.raises(ValueError, match=message):
        ito_taylor_sampler(Gaussian(), torch.randn(2, 1, 4, 4), init=init)


# ----------------------------------------------------------------------------
# Guidance.


@pytest.mark.parametrize('guidance', [-0.5, 0, 1, 1.5, 3])
def test_two_linear_denoisers_guide_to_a_linear_one(guidance):
    """D = r x with r = r₀ + w (r₁ − r₀), r_i = s_i²/(s_i² + σ²); so J_D = r and ∂D/∂σ = r' x."""
    x, dx = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).double(), torch.tensor([[0.3, 1.0], [-1.0, 2.0]]).double()
    sigma, dsigma = 0.7, 0.4
    net, gnet = CountCalls(Gaussian(0.5)), CountCalls(Gaussian(1.5))
    r1, r0 = (s**2 / (s**2 + sigma**2) for s in (0.5, 1.5))
    r = r0 + guidance * (r1 - r0)
    slope1, slope0 = (-2 * sigma * s**2 / (s**2 + sigma**2) ** 2 for s in (0.5, 1.5))
    slope = slope0 + guidance * (slope1 - slope0)

    D, dD = sampler_2nd.Denoiser(Guided(net, gnet, guidance)).jvp(x, sigma, dx, dsigma)
    torch.testing.assert_close(D, r * x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dD, r * dx + slope * x * dsigma, rtol=1e-13, atol=1e-14)
    assert (net.calls, net.jvp_calls) == (1, 1)
    assert (gnet.calls, gnet.jvp_calls) == ((0, 0) if guidance == 1 else (1, 1))


def test_calls_under_guidance_are_counted_for_each_network():
    net, gnet = CountCalls(Gaussian(0.5)), CountCalls(Gaussian(1.5))
    pairs = CountCalls(Guided(net, gnet, 2))
    ito_taylor_sampler(pairs, torch.randn(2, 1, 4, 4), num_steps=10)
    assert [(each.calls, each.jvp_calls) for each in (net, gnet, pairs)] == [(10, 9)] * 3
    alone = CountCalls(Gaussian(1.5))
    ito_taylor_sampler(Guided(net, alone, 1), torch.randn(2, 1, 4, 4), num_steps=10)
    assert (net.calls, alone.calls) == (20, 0)


def test_guidance_one_is_the_network_to_the_bit():
    latents = torch.randn(2, 1, 4, 4)
    guided, plain = (
        ito_taylor_sampler(net, latents, eta=0) for net in (Guided(Gaussian(), Gaussian(2), 1), Gaussian())
    )
    assert torch.equal(guided, plain)


class LabelledNet(torch.nn.Linear):
    """Remembers the labels that it was called with."""

    def __init__(self, label_dim=None, **attributes):
        super().__init__(4, 4)
        self.seen = []
        if label_dim is not None:
            self.label_dim = label_dim
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, sigma, class_labels=None, gain=1):
        self.seen.append((x.dtype, class_labels, gain))
        return super().forward(x)


@pytest.mark.parametrize(('label_dim', 'gets_labels'), [(None, True), (3, True), (0, False)])
def test_the_guiding_network_gets_labels_if_it_knows_any(label_dim, gets_labels):
    labels, net, gnet = torch.eye(3), LabelledNet(3, sigma_min=0.1), LabelledNet(label_dim)
    guided = Guided(net, gnet, 2)
    guided(torch.randn(3, 4), torch.tensor(1.0), labels, gain=2)
    assert net.seen == [(torch.float32, labels, 2)]
    assert gnet.seen == [(torch.float32, labels if gets_labels else None, 2)]
    assert (guided.label_dim, guided.sigma_min) == (3, 0.1)
    ito_taylor_sampler(guided, torch.randn(3, 4), labels, num_steps=3)  # the state is float64, the networks are not
    assert gnet.seen[-1][0] == torch.float32


@pytest.mark.parametrize(
    ('net', 'gnet', 'message'),
    [
        (LabelledNet(3), LabelledNet(2), 'gnet has label_dim=2, but net has label_dim=3'),
        (LabelledNet(img_channels=3), LabelledNet(img_channels=1), 'gnet has img_channels=1'),
        (LabelledNet(img_resolution=8), LabelledNet(img_resolution=4), 'gnet has img_resolution=4'),
    ],
)
def test_networks_for_other_images_cannot_guide(net, gnet, message):
    with pytest.raises(ValueError, match=message):
        Guided(net, gnet, 2)


def test_wrapped_networks_copy_and_pickle():
    net = Guided(CountCalls(LabelledNet(3)), LabelledNet(3), 2)
    net(torch.randn(3, 4), torch.tensor(1.0), torch.eye(3))
    for other in (copy.copy(net), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert (type(other), other.guidance, other.label_dim, other.calls) == (Guided, 2, 3, 1)
        x = torch.randn(2, 4)
        assert torch.equal(other(x, torch.tensor(1.0)), net(x, torch.tensor(1.0)))
        assert other.net.calls == net.net.calls or copy.copy(net).net is net.net


def test_wrapped_networks_are_modules():
    """What PyTorch does to a module it does to both networks, and the guidance stays."""
    net = Guided(CountCalls(LabelledNet(3)), LabelledNet(3), 2)
    assert len(list(net.parameters())) == 4
    for moved in (net.eval(), net.to(torch.float64), net.requires_grad_(False), net.double()):
        assert moved is net
    assert {each.dtype for each in net.parameters()} == {torch.float64}
    assert not any(each.training for each in net.modules())
    with pytest.raises(AttributeError, match='no_such_thing'):
        _ = net.no_such_thing


def test_each_network_of_a_guided_pair_computes_in_its_own_dtype():
    net, gnet = LabelledNet(3), LabelledNet(3).double()
    ito_taylor_sampler(Guided(net, gnet, 2), torch.randn(3, 4), torch.eye(3), num_steps=3)
    assert (net.seen[-1][0], gnet.seen[-1][0]) == (torch.float32, torch.float64)


@pytest.mark.parametrize(
    'wrap', [torch.nn.DataParallel, CountCalls, lambda net: torch.nn.DataParallel(CountCalls(net))]
)
def test_the_range_of_a_network_is_read_through_wrappers(wrap):
    """Of a network with levels from 0.05 to 5; DataParallel hands no attribute on."""

    class Narrow(torch.nn.Linear):
        sigma_min, sigma_max = 0.05, 5.0

        def round_sigma(self, sigma):
            return 2 * sigma

    levels = sampler_2nd.noise_levels(wrap(Narrow(2, 2)), 4, 0.002, 80, 7)
    assert (levels[0], levels[-2]) == pytest.approx((10, 0.1))
    assert sampler_2nd.property_of(wrap(Narrow(2, 2)), 'label_dim', 7) == 7


# ----------------------------------------------------------------------------
# Calls and arguments.


@pytest.mark.parametrize(
    ('kwargs', 'jvp_calls', 'draws'),
    [
        ({'scheme': 'euler'}, 0, 9),
        ({'scheme': 'taylor'}, 9, 18),
        ({'scheme': 'rk'}, 0, 18),
        ({'scheme': 'taylor', 'eta': 0.5}, 9, 18),
        ({'scheme': 'taylor', 'eta': 0}, 9, 18),
    ],
)
def test_each_scheme_evaluates_once_per_step(kwargs, jvp_calls, draws):
    net, drawn = CountCalls(Gaussian()), []

    def randn_like(x):
        drawn.append(x)
        return torch.randn_like(x)

    ito_taylor_sampler(net, torch.randn(2, 1, 4, 4), randn_like=randn_like, num_steps=10, **kwargs)
    assert (net.calls, net.jvp_calls, len(drawn)) == (10, jvp_calls, draws)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_one_step_denoises_at_sigma_max(scheme):
    latents = torch.randn(2, 1, 4, 4)
    out = ito_taylor_sampler(Gaussian(), latents, num_steps=1, scheme=scheme)
    assert torch.equal(out, latents.double() * 80 * 0.25 / (0.25 + 6400))


def test_two_steps_by_hand():
    """κ = 1, σ: 2 → 1 → 0, all normals 1, with D(x; σ) = x/5 at σ = 2 and x/2 at σ = 1 (s = 1)."""
    out = ito_taylor_sampler(
        Gaussian(1.0), torch.ones(1), randn_like=torch.ones_like, num_steps=2, sigma_min=1, sigma_max=2
    )
    var_N, cov, var_Z = 3 / 4, 2 * math.log(2) - 3 / 4, 15 / 4 - 4 * math.log(2)
    N = math.sqrt(var_N)
    Z = cov / N + math.sqrt(var_Z - cov**2 / var_N)
    x1 = 2 / 4 + 3 / 4 * (2 / 5) + N + (1 + math.log(2) / 4) * Z / 5
    assert float(out) == pytest.approx(x1 / 2, rel=1e-12)


def test_rk_by_hand():
    """τ: 1/4 → 1, so h = 3/4 and τ_m = 1/2."""
    out = ito_taylor_sampler(
        Gaussian(1.0), torch.ones(1), randn_like=torch.ones_like, num_steps=2, sigma_min=1, sigma_max=2, scheme='rk'
    )
    y_m = 2 / 4 + 1 / 4 * (2 / 5) + math.sqrt(3 / 4) * (1 / 2 + 1 / math.sqrt(12))
    D_m = y_m / (1 / 2) / 3
    y1 = 2 / 4 + 3 / 4 * D_m + math.sqrt(3 / 4)
    assert float(out) == pytest.approx(y1 / 2, rel=1e-12)


def test_rk_by_hand_for_the_ode():
    """κ = 0, T = 1/σ: 1/2 → 1, so the node is at the mean of ln σ over T, ln 2 − (1 − ln 2)."""
    out = ito_taylor_sampler(Gaussian(1.0), torch.ones(1), num_steps=2, sigma_min=1, sigma_max=2, scheme='rk', eta=0)
    sigma_m = math.exp(1 - math.log(2))
    x_m = sigma_m / 2 * 2 + (1 - sigma_m / 2) * (2 / 5)
    D_m = x_m / (1 + sigma_m**2)
    assert float(out) == pytest.approx((1 / 2 * 2 + 1 / 2 * D_m) / 2, rel=1e-12)


@pytest.mark.parametrize('h', [1e-8, 0.3, 1.0, 3.0, 20.0])
def test_node_of_rk_is_at_a_third_of_the_step_in_tau(h):
    tau_m = 1 + math.expm1(2 * h) / 3
    h_m, log_g, weight = sampler_2nd.rk_node(1.0, h)
    assert h_m == pytest.approx(math.log(tau_m) / 2, rel=1e-12)
    assert log_g == pytest.approx(-math.log(tau_m), rel=1e-12)
    assert weight == pytest.approx(math.exp(2 * h) / tau_m / -math.expm1(-2 * h), rel=1e-12)


@pytest.mark.parametrize('kappa', [0.0, 0.25, 0.7, 1.0, 1.7, 2.9])
def test_node_of_rk_in_short_steps(kappa):
    h_m, log_g, _ = sampler_2nd.rk_node(kappa, 1e-7)
    assert h_m / 1e-7 == pytest.approx((3 - kappa) / 6, abs=1e-6)
    assert -log_g / 1e-7 == pytest.approx((3 - kappa) / 6 + kappa / 3, abs=1e-6)


@pytest.mark.parametrize('h', [0.01, 0.5, 3.0])
@pytest.mark.parametrize('kappa', [0.25, 0.7, 1.3, 2.5])
def test_node_of_rk_has_the_law_of_its_level_and_the_mean_drift_of_the_step(kappa, h):
    """By quadrature in T = σ^{−a}, for σ' = 1: there dy = D dT + dM, and a step's D needs the noise ∫ (T' − T) dM/H."""
    a = 1 + kappa
    T = torch.linspace(math.exp(-a * h), 1, 200_001, dtype=torch.float64)
    H, lam = float(T[-1] - T[0]), T.log() / a
    drift = float(torch.trapezoid(lam - lam[0], T)) / H
    rate = 2 * kappa * T ** (2 * kappa / a - 1) / a  # of Var M, per unit of T
    variance = float(torch.trapezoid((1 - T) ** 2 * rate, T)) / H**2
    h_m, log_g, _ = sampler_2nd.rk_node(kappa, h)
    kappa_m, sigma_m = (-log_g - h_m) / h_m, math.exp(h - h_m)
    assert (1 - kappa_m) * h_m == pytest.approx((1 - kappa) * drift, rel=1e-6)
    assert sigma_m**2 * -math.expm1(-2 * kappa_m * h_m) == pytest.approx(sigma_m ** (2 * a) * variance, rel=1e-6)


def test_predicted_D_by_hand():
    """Steps from τ = 1 to 3 and from there to 5 have their middles at 2 and 4. For κ = 0, T = √τ takes its place."""
    for kappa, exponent in [(1.0, -0.5), (0.0, -1.0)]:
        past = [(1.0, torch.tensor([3.0])), (3**exponent, torch.tensor([5.0]))]
        expected = 5 + 2 * math.log(5 / 4) / math.log(4 / 2) * (2 + 4) / (2 * math.sqrt(2 * 4))
        assert float(sampler_2nd.predict_D(past, 5**exponent, kappa)) == pytest.approx(expected, rel=1e-7)
        assert sampler_2nd.predict_D(past[:1], 3**exponent, kappa) is past[0][1]


@pytest.mark.parametrize('scheme', SCHEMES)
def test_the_ode_is_what_a_window_that_excludes_everything_gives(scheme):
    latents, windows = torch.randn(3, 1, 2, 2), ({'eta': 0}, {'S_min': 100}, {'S_max': 0.001})
    runs = [ito_taylor_sampler(Gaussian(), latents, scheme=scheme, **window) for window in windows]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_network_is_called_in_its_own_dtype_and_the_state_is_float64():
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x, sigma, class_labels=None):
            seen.append((x.dtype, sigma.dtype, class_labels))
            return super().forward(x)

    labels = torch.eye(3)
    out = ito_taylor_sampler(Net(4, 4), torch.randn(3, 4), labels, num_steps=3)
    assert out.dtype == torch.float64
    assert {(x, sigma) for x, sigma, _ in seen} == {(torch.float32, torch.float32)}
    assert all(given is labels for _, _, given in seen)
    assert ito_taylor_sampler(Net(4, 4), torch.randn(3, 4), num_steps=3, dtype=torch.float32).dtype == torch.float32


def test_noise_levels_by_head():
    """ρ = 2, from 100 to 1 in three: the square roots 10, 5.5, 1 are evenly spaced."""
    assert sampler_2nd.noise_levels(None, 3, 1, 100, 2) == pytest.approx([100, 30.25, 1, 0])


def test_noise_levels_keep_to_what_the_network_knows():
    class Net:
        sigma_min, sigma_max = 0.5, 20

        def round_sigma(self, sigma):
            return sigma.round()

    assert sampler_2nd.noise_levels(Net(), 3, 0.002, 80, 1) == [20, 10, 0, 0]


@pytest.mark.parametrize('noise', [torch.randn_like, sampler_2nd.BrownianPath([0, 1])])
@pytest.mark.parametrize('scheme', SCHEMES)
def test_levels_that_the_network_rounds_to_one_are_steps_of_no_length(scheme, noise):
    net = Gaussian()
    net.round_sigma = lambda sigmas: torch.tensor([8.0, 8, 8, 2, 2, 2, 2, 0.5], dtype=torch.float64)
    out = ito_taylor_sampler(net, torch.randn(2, 1, 4, 4), randn_like=noise, num_steps=8, scheme=scheme)
    assert out.isfinite().all()


def test_callback_sees_every_step():
    seen = []
    out = ito_taylor_sampler(Gaussian(), torch.randn(1, 1, 2, 2), num_steps=4, callback=lambda *args: seen.append(args))
    assert [i for i, *_ in seen] == [0, 1, 2, 3]
    assert [sigma for *_, sigma in seen] == sampler_2nd.noise_levels(None, 4, 0.002, 80, 7)[:4]
    assert torch.equal(seen[-1][1], out)
    assert torch.equal(seen[-1][2], out)
    before = seen[-2][1]  # the state that the last step started from
    assert torch.equal(out, Gaussian()(before, seen[-1][3]))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'scheme': 'heun'}, 'euler, taylor, rk'),
        ({'num_steps': 0}, 'num_steps=0'),
        ({'S_min': 2, 'S_max': 1}, 'S_min=2 is above S_max=1'),
        ({'eta': -1}, 'needs an eta from 0 to below inf, and this is -1'),
        ({'rho': 0}, 'rho=0'),
        ({'rho': 0.001}, 'too extreme for float64'),
        ({'sigma_min': 90}, 'sigma_max=80'),
        ({'scheme': 'rk', 'eta': 1.8}, 'below 1.732, and this is 1.8'),
    ],
)
def test_arguments_out_of_range_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ito_taylor_sampler(Gaussian(), torch.randn(1, 1, 2, 2), **kwargs)


class OldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x


class NewFunction(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def norm_of_channels_last(x):
    x = x.repeat(1, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.group_norm(x, 2)[:, :1]


def foreign_kernel(x):
    return torch.from_numpy(2 * x.numpy())


class Layer(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, *args):
        return self.function(x)


class LayeredNet(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.enc = torch.nn.ModuleDict(
            {'4x4_in': torch.nn.Identity(), '4x4_block': torch.nn.Sequential(Layer(function))}
        )
        self.out = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x, sigma, class_labels=None):
        for layer in self.enc.values():
            x = layer(x)
        return self.out(x)


@pytest.mark.parametrize('eta', [1, 0.5])
@pytest.mark.parametrize('function', [OldFunction.apply, NewFunction.apply, norm_of_channels_last, foreign_kernel])
def test_a_layer_without_a_forward_mode_is_named(function, eta):
    net, latents = LayeredNet(function), torch.randn(2, 1, 4, 4)
    for each in (net, CountCalls(net), lambda x, *args: net(x.float(), *args)):
        with pytest.raises(
            ValueError, match=r"layer enc\.4x4_block\.0 of the network, a Layer, .*'taylor'.*scheme='rk'"
        ):
            ito_taylor_sampler(each, latents, eta=eta)
    assert ito_taylor_sampler(net, latents, scheme='rk').isfinite().all()


def test_forward_mode_of_pytorchs_attention():
    """Its fused kernels have none."""

    def fused(x, sigma, class_labels=None):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    def by_hand(x, sigma, class_labels=None):
        return (x @ x.mT / 2).softmax(-1) @ x

    x, dx = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match='forward AD'):
        torch.func.jvp(lambda x: fused(x, 1), (x,), (dx,))
    one, other = (sampler_2nd.Denoiser(net).jvp(x, 1.0, dx, 0) for net in (fused, by_hand))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_network_of_one_piece_without_a_forward_mode():
    for net, words in [
        (Layer(NewFunction.apply), r'layer \(no name\) of the network, a Layer,'),
        (lambda x, *args: foreign_kernel(x), 'the network has'),
    ]:
        with pytest.raises(ValueError, match=words):
            ito_taylor_sampler(net, torch.randn(2, 1, 4, 4))


@pytest.mark.parametrize(
    'error',
    [RuntimeError('out of memory'), NotImplementedError('no such layer'), ValueError('labels'), ZeroDivisionError()],
)
def test_other_errors_of_the_network_pass_unchanged(error):
    def fail(x):
        raise error

    with pytest.raises(type(error)) as raised:
        ito_taylor_sampler(LayeredNet(fail), torch.randn(2, 1, 4, 4))
    assert raised.value is error


def test_the_file_imports_torch_and_the_standard_library_only():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split('.')[0])
    assert imported - sys.stdlib_module_names == {'torch'}


def test_the_file_works_alone(tmp_path):
    shutil.copy(SOURCE, tmp_path)
    (tmp_path / 'use.py').write_text(
        'import torch\n'
        'from sampler_2nd import ito_taylor_sampler\n'
        'net = lambda x, sigma, class_labels: x / (1 + sigma**2)\n'
        'torch.manual_seed(0)\n'
        'print(float(ito_taylor_sampler(net, torch.randn(4, 1, 64, 64), num_steps=60).std()))\n'
    )
    run = subprocess.run([sys.executable, 'use.py'], cwd=tmp_path, capture_output=True, text=True)
    assert float(run.stdout) == pytest.approx(1, abs=0.03), run.stderr


# ----------------------------------------------------------------------------
# What cannot be right is refused.


class Cut(torch.nn.Module):
    """D = x/2 with a layer that takes the derivative away: all of it, or half."""

    def __init__(self, way, share):
        super().__init__()
        self.inner, self.share = WithoutTangent(way), share

    def forward(self, x, sigma, class_labels=None):
        return self.share * self.inner(x) / 2 + (1 - self.share) * x / 2


class WithoutTangent(torch.nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        if self.way == 'inference mode':
            with torch.inference_mode():
                return x + 0
        return x.detach() + 0 if self.way == 'detach' else x.data + 0


@pytest.mark.parametrize('share', [1, 0.5])
@pytest.mark.parametrize('way', ['detach', 'data', 'inference mode'])
def test_a_network_that_cuts_the_derivative_is_refused(way, share):
    net = CountCalls(Cut(way, share))
    with pytest.raises(ValueError, match=f'layer inner of the network, .*cut by {way}.*--sampler=rk'):
        ito_taylor_sampler(net, torch.randn(2, 3), num_steps=3)
    assert torch.isfinite(ito_taylor_sampler(net, torch.randn(2, 3), num_steps=3, scheme='rk')).all()


@pytest.mark.parametrize('eta', [0, 1])
def test_a_noise_level_may_be_looked_up(eta):
    """By detached numbers, one for each image; the rest of the derivative in σ is there."""

    def net(x, sigma, class_labels=None):
        table = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        torch.searchsorted(table, sigma.detach())
        return x / (1 + sigma**2)

    images = ito_taylor_sampler(net, torch.ones(2, 3), num_steps=400, eta=eta, randn_like=torch.zeros_like)
    exact = ito_taylor_sampler(Gaussian(1), torch.ones(2, 3), num_steps=400, eta=eta, randn_like=torch.zeros_like)
    assert torch.allclose(images, exact, rtol=1e-9)


def test_constants_may_be_detached():
    """What has no tangent loses none."""

    def net(x, sigma, class_labels=None):
        return x / (1 + sigma.detach() ** 2).data

    assert torch.isfinite(ito_taylor_sampler(net, torch.randn(2, 3), num_steps=4)).all()


def test_inference_mode_around_the_sampler_changes_nothing():
    """Labels, latents and weights made in it included."""

    def images(net):
        rng = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 4, generator=rng)
        return ito_taylor_sampler(net, latents, randn_like=lambda x: torch.randn(x.shape, generator=rng), num_steps=6)

    torch.manual_seed(3)
    net = LabelledNet(0)
    expected = images(net)
    with torch.inference_mode():
        assert torch.equal(images(net), expected)
        same = LabelledNet(0)
        same.load_state_dict(net.state_dict())
        assert torch.equal(images(same), expected)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'rho': math.nan}, 'rho=nan'),
        ({'rho': math.inf}, 'rho=inf'),
        ({'rho': 1e-300}, 'rho, sigma_min, sigma_max or the noise is too extreme'),
        ({'eta': math.nan}, 'and this is nan'),
        ({'eta': math.inf, 'scheme': 'taylor'}, 'and this is inf'),
        ({'S_noise': math.nan}, 'S_noise=nan'),
        ({'S_noise': -math.inf}, 'S_noise=-inf'),
        ({'S_min': math.nan}, 'S_min=nan'),
        ({'sigma_max': math.nan}, 'are not a range'),
    ],
)
def test_numbers_that_nothing_can_be_computed_with(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ito_taylor_sampler(Gaussian(), torch.randn(2, 3), **kwargs)


@pytest.mark.parametrize(
    'kwargs',
    [
        {'scheme': 'rk', 'sigma_max': 1e200},  # σ²
        {'scheme': 'euler', 'eta': 1e200},  # η²
        {'scheme': 'rk', 'sigma_min': 1e-320, 'randn_like': sampler_2nd.BrownianPath([0, 1])},  # e^{−2λ}
    ],
)
def test_settings_that_lead_out_of_the_range_of_float64(kwargs):
    with pytest.raises(ValueError, match='noise is too extreme'):
        ito_taylor_sampler(Gaussian(), torch.randn(2, 3), num_steps=4, **kwargs)


@pytest.mark.parametrize('rho', [0.2, 0.25, 0.33, 1, 7, 50])
def test_the_last_level_is_exact_for_every_rho(rho):
    levels = sampler_2nd.noise_levels(None, 9, 0.002, 80, rho)
    assert levels[-2:] == [0.002, 0.0]
    assert all(high > low for high, low in itertools.pairwise(levels))


@pytest.mark.parametrize('scheme', SCHEMES)
def test_the_first_image_that_is_not_finite_ends_it(scheme):
    """The network fails for the second image of three, at low noise."""

    def net(x, sigma, class_labels=None):
        bad = torch.tensor([0.0, 1.0, 0.0])[:, None] * (0.0 if sigma > 1 else 1.0)
        return x / (1 + sigma**2) + torch.where(bad > 0, math.inf, 0.0)

    with pytest.raises(
        sampler_2nd.NotFiniteError, match=r'image 1 of the batch is not finite after step \d of 8'
    ) as info:
        ito_taylor_sampler(net, torch.randn(3, 2), num_steps=8, scheme=scheme)
    assert info.value.row == 1


@pytest.mark.parametrize(
    ('net', 'message'),
    [
        (lambda x, sigma, labels: {'sample': x}, 'returned a dict; denoised images are a tensor'),
        (lambda x, sigma, labels: x[:, :1], r'returned the shape \[2, 1\] for images of \[2, 4\]'),
        (lambda x, sigma, labels: x.sum(), r'returned the shape \[\] for images'),
    ],
)
def test_a_network_that_returns_no_images_is_told_so(net, message):
    with pytest.raises(ValueError, match=message):
        ito_taylor_sampler(net, torch.randn(2, 4), num_steps=3)


def test_a_float32_network_inside_a_function_is_told_what_to_do():
    inner, latents = torch.nn.Linear(4, 4), torch.randn(2, 4)

    def net(x, sigma, class_labels):
        return inner(x)

    with pytest.raises(ValueError, match=r'does not compute in torch\.float64.*pass dtype=torch\.float32'):
        ito_taylor_sampler(net, latents, num_steps=3)
    assert ito_taylor_sampler(net, latents, num_steps=3, dtype=torch.float32).dtype == torch.float32


def test_storage_of_one_byte_is_not_what_a_network_computes_in():
    net = torch.nn.Module()
    for name, dtype in [('a', torch.int8), ('b', torch.float8_e4m3fn), ('c', torch.bfloat16), ('d', torch.float32)]:
        setattr(net, name, torch.nn.Parameter(torch.zeros(2).to(dtype), requires_grad=False))
    assert sampler_2nd.network_dtype(net) == torch.bfloat16
    assert sampler_2nd.network_dtype(torch.nn.Identity()) is None


@pytest.mark.parametrize('scheme', SCHEMES)
def test_an_empty_batch_gives_no_images(scheme):
    path = sampler_2nd.BrownianPath([])
    assert ito_taylor_sampler(Gaussian(), torch.zeros(0, 1, 4, 4), scheme=scheme, randn_like=path).shape == (0, 1, 4, 4)
    assert [z.shape for z in path.normals(torch.zeros(0, 3), 2.0, 1.0, 1.0)] == [(0, 3)] * 2


# ----------------------------------------------------------------------------
# Few steps.


def test_levels_for_steps():
    """Those that were measured; EDM's from 32 steps on; between them they end lower the more steps there are."""
    rows = {n: sampler_2nd.levels_for_steps(n) for n in (1, 6, 7, 8, 10, 12, 20, 31, 32, 1000)}
    ends = {n: (row['sigma_min'], row['rho']) for n, row in rows.items()}
    assert ends[6] == ends[1] == pytest.approx((0.08, 30))
    assert ends[8] == ends[10] == ends[12] == pytest.approx((0.02, 12))
    assert ends[32] == ends[1000] == (0.002, 7)
    share = math.log(20 / 12) / math.log(32 / 12)
    assert ends[20] == pytest.approx((0.02 * 0.1**share, 12 * (7 / 12) ** share))
    assert list(ends.values()) == sorted(ends.values(), reverse=True)
    assert ends[31] == pytest.approx(ends[32], rel=0.1)


def gaussian_net(x, sigma, class_labels=None):
    return x / (1 + sigma**2)


def draw(**options):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    return ito_taylor_sampler(
        gaussian_net, latents, randn_like=lambda x: torch.randn(x.shape, generator=generator).to(x), **options
    )


def test_given_levels_are_those_of_the_other_options():
    levels = sampler_2nd.noise_levels(None, 7, 0.01, 50, 4)
    wanted = draw(scheme='rk', num_steps=7, sigma_min=0.01, sigma_max=50, rho=4)
    for sigmas in (levels, levels[:-1], torch.tensor(levels, dtype=torch.float64)):
        assert torch.equal(draw(scheme='rk', sigmas=sigmas), wanted)


def test_rk_has_levels_of_its_own_and_options_win():
    few = sampler_2nd.noise_levels(None, 8, 0.02, 80, 12)
    edm_levels = sampler_2nd.noise_levels(None, 8, 0.002, 80, 7)
    assert torch.allclose(draw(scheme='rk', num_steps=8), draw(scheme='rk', sigmas=few))
    assert torch.equal(draw(scheme='rk', num_steps=8, sigma_max=80), draw(scheme='rk', sigmas=edm_levels))
    assert torch.equal(draw(scheme='taylor', num_steps=8), draw(scheme='taylor', sigmas=edm_levels))


@pytest.mark.parametrize('sigmas', [[], [1, 2], [2, 2], [math.inf, 1], [2, -1], [2, math.nan], [0], [2, 0, 0]])
def test_levels_that_are_none(sigmas):
    with pytest.raises(ValueError, match='noise levels are finite, above 0, and fall'):
        draw(sigmas=sigmas)


def test_levels_that_the_network_does_not_know():
    def net(x, sigma, class_labels=None):
        return x

    net.sigma_max = 50
    with pytest.raises(ValueError, match='sigmas go from 80 to 1; this network knows 0 to 50'):
        ito_taylor_sampler(net, torch.zeros(1, 2), sigmas=[80, 1])


def test_noise_under_guidance():
    """κ = 1/w, unless eta is given; guidance below 1 is none."""
    latents = torch.randn(3, 2, dtype=torch.float64)

    def run(guidance, eta=None):
        net = sampler_2nd.Guided(gaussian_net, lambda x, sigma, labels=None: x / (4 + sigma**2), guidance)
        generator = torch.Generator().manual_seed(0)
        noise = lambda x: torch.randn(x.shape, generator=generator).to(x)  # noqa: E731
        return ito_taylor_sampler(net, latents, randn_like=noise, num_steps=6, scheme='taylor', eta=eta)

    assert torch.equal(run(4), run(4, eta=0.5))
    assert torch.equal(run(0.5), run(0.5, eta=1))
    assert not torch.allclose(run(4), run(4, eta=1))


def test_the_bound_on_a_change_of_D():
    """bound·√(σ² + (0.7 rms D)²) per image; smaller changes, and those of other images, stay."""
    D = torch.full([3, 2, 5], 2.0, dtype=torch.float64)
    change = torch.ones_like(D) * torch.tensor([0.1, 3.0, 0.0]).double()[:, None, None]
    limited = sampler_2nd.limited(change, D, 1.0, 0.25)
    allowed = 0.25 * math.sqrt(1 + 1.4**2)
    assert torch.equal(limited[0], change[0])
    assert torch.allclose(limited[1], torch.full([2, 5], allowed, dtype=torch.float64))
    assert torch.equal(limited[2], change[2])


def test_the_bound_leaves_gaussian_images_alone_from_12_evaluations_on(monkeypatch):
    """Of 64 pixels with standard deviations 1/k: the distance with and without it, on the same noise."""
    stds = 1 / torch.arange(1, 65, dtype=torch.float64)

    def net(x, sigma, class_labels=None):
        return x * (stds**2 / (stds**2 + sigma**2))

    def distance(num_steps):
        generator = torch.Generator().manual_seed(0)
        noise = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
        x = ito_taylor_sampler(net, noise(torch.zeros(2000, 64)), None, noise, num_steps, rho=7, scheme='rk')
        return float((x.square().mean(0).sqrt() - stds).square().sum())

    with_bound = [distance(n) for n in (12, 16, 24)]
    monkeypatch.setattr(sampler_2nd, 'limited', lambda change, D, sigma, bound: change)
    without = [distance(n) for n in (12, 16, 24)]
    assert with_bound == pytest.approx(without, rel=0.03)


def pair_of_densities():
    """Denoisers of normals of standard deviation 0.12 around 120 images of three kinds, and around those of the first.

    As digits, kinds have pixels in common, and images of one kind differ less than kinds do.
    """
    generator = torch.Generator().manual_seed(1)
    sizes = [1, 1], [3, 1], [3, 40]
    common, kinds, images = (torch.randn(*n, 64, generator=generator, dtype=torch.float64) for n in sizes)
    points = (0.6 * common + 0.4 * kinds + 0.4 * images).clamp(-1, 1)

    def around(points):
        def net(x, sigma, class_labels=None):
            center = (-torch.cdist(x, points).square() / (2 * (0.0144 + sigma**2))).softmax(1) @ points
            return center + 0.0144 / (0.0144 + sigma**2) * (x - center)

        return net

    return around(points[0]), around(points.flatten(0, 1))


@pytest.mark.parametrize('guidance', [4, 7.5, 15])
def test_guidance_does_not_diverge(guidance):
    """No pixel grows beyond 1.3 times those of the fine solution, with few steps or many."""

    def largest(num_steps, scheme='rk', **options):
        generator = torch.Generator().manual_seed(2)
        latents = torch.randn(300, 64, generator=generator, dtype=torch.float64)
        noise = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
        net = sampler_2nd.Guided(*pair_of_densities(), guidance)
        return float(ito_taylor_sampler(net, latents, None, noise, num_steps, scheme=scheme, **options).abs().max())

    limit = largest(96)
    assert max(largest(num_steps) for num_steps in (4, 6, 8, 12, 24, 64)) < 1.3 * limit
    without = sampler_2nd.SCHEMES['rk']._replace(step=functools.partial(sampler_2nd.rk_step, bound=math.inf))
    assert largest(8, scheme=without, eta=1, rho=7) > 4 * limit
