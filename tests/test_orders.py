"""Every scheme reaches its strong and weak order, and schemes that lack one of its reasons do not.

`python benchmarks/orders.py` prints the table, and so does `pytest -s tests/test_orders.py`.
"""

import math

import pytest
import torch

import sampler_2nd
from benchmarks import orders


@pytest.fixture(scope='module')
def cache():
    return {}


@pytest.mark.parametrize('row', orders.ROWS, ids=lambda row: row.name)
def test_order(row, cache):
    result = orders.convergence_of(row, cache)
    print(orders.format_row(row, result))
    assert result.slope == pytest.approx(row.order, abs=row.tolerance)


def test_a_scheme_that_is_one_function_and_one_line_in_the_table_has_its_order(cache, monkeypatch):
    """The loop knows nothing of it but what stands in its `Scheme`: not its name either."""
    (row,) = find('strong', 'rk', 'mixture')
    monkeypatch.setitem(sampler_2nd.SCHEMES, 'mine', sampler_2nd.Scheme(sampler_2nd.rk_step, time_integral=True))
    result = orders.convergence_of(row._replace(scheme='mine'), cache)
    assert result.errors == pytest.approx(orders.convergence_of(row, cache).errors, rel=1e-9)
    assert result.slope == pytest.approx(row.order, abs=row.tolerance)


@pytest.mark.parametrize('row', orders.ABLATION_ROWS, ids=lambda row: row.name)
def test_ablation_misses_the_order_of_its_scheme(row, cache):
    result = orders.convergence_of(row, cache)
    print(orders.format_row(row, result))
    assert result.slope == pytest.approx(row.order, abs=row.tolerance)
    whole = orders.convergence_of(row._replace(scheme=row.scheme.split(',')[0]), cache)
    assert math.isnan(whole.slope) or result.slope < whole.slope - 0.3  # nan: lost in Monte Carlo noise
    assert result.errors[-1] > (10 if math.isnan(whole.slope) else 2) * whole.errors[-1]


def find(kind, scheme, problem):
    wanted = (kind, scheme, problem, 1, math.inf, 'cells')
    return [r for r in orders.ROWS if (r.kind, r.scheme, r.problem, r.eta, r.S_max, r.path) == wanted]


def test_errors_are_those_of_the_prototype(cache):
    """Measured earlier by an independent program, with 12,000 paths: 32 to 128 steps on the mixture."""
    for scheme, expected in [('euler', [6.2e-2, 3.2e-2, 1.6e-2]), ('taylor', [8.9e-3, 3.3e-3, 1.2e-3])]:
        (row,) = find('strong', scheme, 'mixture')
        assert orders.convergence_of(row, cache).errors[:3] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize('sigma_max', [0.5, 2.0])
def test_the_guess_in_the_first_step_of_rk_is_worth_an_evaluation(sigma_max, monkeypatch):
    """From images with a little noise, where the guess matters most."""
    net, paths = orders.PROBLEMS['mixture 2-D'], 500
    torch.manual_seed(0)
    of = torch.multinomial(net.weights, paths, replacement=True)
    spread = net.variances[of].sqrt() * torch.randn(paths, 2, dtype=torch.float64)
    images = net.means[of] + torch.einsum('nde,ne->nd', net.axes[of], spread)
    latents = torch.randn_like(images)

    def sample(num_steps):
        path = sampler_2nd.BrownianPath(range(paths))
        ends = {'sigma_min': 0.02, 'sigma_max': sigma_max, 'init': images}
        return sampler_2nd.ito_taylor_sampler(net, latents, None, path, num_steps, scheme='rk', **ends)

    solution, guessed = sample(200), sample(8)
    monkeypatch.setattr(sampler_2nd, 'guess_D', lambda x, sigma: net(x, torch.tensor(sigma)))
    evaluated, for_the_same_work = (orders.rms(sample(num_steps) - solution) for num_steps in (8, 7))
    assert orders.rms(guessed - solution) < min(1.05 * evaluated, 0.85 * for_the_same_work)


def test_fit_drops_points_at_the_floor():
    result = orders.fit([1, 2, 4, 8], [1, 0.25, 0.0625, 0.05], [0.02] * 4)
    assert result.slope == pytest.approx(-math.log(0.0625 / 1) / math.log(4))
    assert math.isnan(orders.fit([1, 2], [1, 1], [0, 1]).slope)


def test_denoiser_of_the_rotated_mixture_is_the_gradient_of_its_log_density():
    """D = x + σ² ∇ log p, with p from torch.distributions."""
    problem, sigma = orders.PROBLEMS['mixture 2-D'], 0.6
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    covariances = problem.axes @ torch.diag_embed(problem.variances + sigma**2) @ problem.axes.mT
    components = torch.distributions.MultivariateNormal(problem.means, covariances)
    density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(problem.weights), components)
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    assert torch.allclose(problem(x, sigma), x + sigma**2 * score, atol=1e-12)


def test_the_bound_on_a_change_of_D_vanishes_in_short_steps(monkeypatch):
    """Of paths of one pixel, where it acts most: the largest difference that it makes falls to none at all."""
    path = orders.Path(400, 1)

    def solutions():
        return [orders.solve('rk', 'mixture', path, steps) for steps in (8, 64, 1024)]

    bounded = solutions()
    monkeypatch.setattr(sampler_2nd, 'limited', lambda change, D, sigma, bound: change)
    differences = [float((a - b).abs().max()) for a, b in zip(bounded, solutions(), strict=True)]
    assert differences[0] > 0.05
    assert differences[1] < 0.1 * differences[0]
    assert differences[2] == 0
