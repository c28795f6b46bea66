"""Under guidance the schemes fall to the orders that docs/method.md derives, and the missing drift is what lacks."""

import math

import pytest
import torch
from click.testing import CliRunner

import sampler_2nd
from benchmarks import guidance, orders

STEPS = (32, 64)


def test_taylor_and_rk_lose_their_weak_order_and_the_drift_restores_it():
    """Gaussian data, exact arithmetic. `rk` misses h/6 of the drift where `taylor` misses h/2: a third of the error."""
    w = 2
    errors = {scheme: guidance.gaussian_errors(scheme, w, STEPS) for scheme in ('taylor', 'rk')}
    assert errors['rk'].slope == pytest.approx(1, abs=0.02)
    assert errors['taylor'].slope == pytest.approx(1, abs=0.15)
    assert errors['taylor'].errors[-1] / errors['rk'].errors[-1] == pytest.approx(3, rel=0.15)
    corrected = {scheme: guidance.gaussian_errors(scheme, w, STEPS) for scheme in ('taylor + drift', 'rk + drift')}
    assert corrected['rk + drift'].slope == pytest.approx(2, abs=0.25)  # that of `taylor` changes its sign
    assert all(result.errors[-1] < errors['rk'].errors[-1] / 5 for result in corrected.values())


def test_guidance_one_is_no_guidance():
    assert guidance.gaussian_errors('rk', 1, STEPS).slope == pytest.approx(3.5, abs=0.4)
    for scheme in ('taylor', 'rk'):
        plain = orders.weak_convergence(scheme, guidance.GAUSSIAN_STDS[0], STEPS).errors
        assert guidance.gaussian_errors(scheme, 1, STEPS).errors == pytest.approx(plain, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize('w', [1, 1.5, 3])
def test_variance_of_the_guided_equation(w):
    """Its closed form against V' = 4 (r_w − 1) V + 2σ² in λ, by 20,000 midpoint steps."""
    steps = 20_000
    h = math.log(orders.SIGMA_MAX / orders.SIGMA_MIN) / steps
    variance = orders.SIGMA_MAX**2

    def slope(variance, sigma):
        net, gnet = (s**2 / (s**2 + sigma**2) for s in guidance.GAUSSIAN_STDS)
        return 4 * (gnet + w * (net - gnet) - 1) * variance + 2 * sigma**2

    for i in range(steps):
        sigma = orders.SIGMA_MAX * math.exp(-i * h)
        middle = variance + h / 2 * slope(variance, sigma)
        variance += h * slope(middle, sigma * math.exp(-h / 2))
    assert guidance.guided_variance(w) == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize(('pair', 'w'), [('smeared', 1.5), ('class', 3)])
def test_drift_of_the_guided_denoiser(pair, w):
    """∂D/∂λ + 2 J_D (D − x) + σ²ΔD = 2w(w − 1)(J_net − J_gnet)(D_net − D_gnet) for κ = 1, by finite differences."""
    net, gnet = guidance.PAIRS[pair]
    guided = sampler_2nd.Guided(net, gnet, w)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, eps = 0.8, 1e-4

    def along(network, v):
        return (network(x + eps * v, sigma) - network(x - eps * v, sigma)) / (2 * eps)

    D, v = guided(x, sigma), net(x, sigma) - gnet(x, sigma)
    in_lambda = (guided(x, sigma * math.exp(-eps)) - guided(x, sigma * math.exp(eps))) / (2 * eps)
    laplacian = sum(guided(x + eps * e, sigma) - 2 * D + guided(x - eps * e, sigma) for e in torch.eye(2).double())
    drift = in_lambda + 2 * along(guided, D - x) + sigma**2 * laplacian / eps**2
    expected = 2 * w * (w - 1) * (along(net, v) - along(gnet, v))
    torch.testing.assert_close(drift, expected, rtol=1e-5, atol=1e-6)
    assert float(expected.abs().max()) > 0.1


def test_strong_errors_on_shared_paths():
    """A short form of the table: what guidance adds is small against the error of order 1.5 at few steps."""
    path = orders.Path(200, 2)
    schemes = ('heun', 'euler', 'rk', 'rk + drift')
    results = guidance.convergence('smeared', 1.5, path, schemes, steps=(16, 32, 64), fine=256)
    slopes = {scheme: strong.slope for scheme, (strong, _) in results.items()}
    expected = {'heun': 2, 'euler': 0.95, 'rk': 1.65, 'rk + drift': 1.65}
    assert slopes == pytest.approx(expected, abs=0.3)


def test_command_prints_the_tables(monkeypatch):
    monkeypatch.setattr(guidance, 'GUIDANCE', (2,))
    monkeypatch.setattr(guidance, 'SCHEMES', {'heun': 0.0, 'euler': 1.0, 'rk': 1.0})
    monkeypatch.setattr(guidance.convergence, '__defaults__', (guidance.SCHEMES, guidance.STEPS, 128))
    run = CliRunner().invoke(guidance.main, ['--paths=4'], catch_exceptions=False)
    assert run.exit_code == 0
    assert [line for line in run.output.splitlines() if '| w = 2 |' in line] == [
        f'| {title} | w = 2 |'
        for title in ('gaussian, weak', 'smeared, strong', 'smeared, weak', 'class, strong', 'class, weak')
    ]
