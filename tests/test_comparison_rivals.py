"""Rivals for few evaluations: their authors' numbers, their orders, and the packages that have the same scheme."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import sampler_2nd
from comparison import peers, rivals

GOLDEN = json.loads((Path(__file__).parent / 'data' / 'rivals-golden.json').read_text())
NAMES = {
    'iPNDM-3': 'ipndm-3',
    'DPM-Solver-3 (eps, multistep)': 'dpm-solver-3',
    'ER-SDE-3': 'er-sde-3',
    'SEEDS-3': 'seeds-3',
    'DPM++ 2M SDE (midpoint, eta 1)': 'k-diffusion-dpmpp_2m_sde',
}
NEW = [
    'er-sde-3',
    'seeds-3',
    'diffusers-sa-solver',
    'ipndm-3',
    'ipndm-v-3',
    'deis-3',
    'dpm-solver-3',
    'diffusers-unipc-3',
]
NEEDS_DIFFUSERS = pytest.mark.skipif('diffusers-unipc-3' not in peers.installed(), reason='needs diffusers')
NEEDS_K_DIFFUSION = pytest.mark.skipif('k-diffusion-heun' not in peers.installed(), reason='needs k-diffusion')


def named(names):
    """Parameters that are left out where their package is missing."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in peers.installed(), reason='needs its package'))
        for name in names
    ]


def column(values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def levels(num_levels, sigma_min=0.5, sigma_max=10, rho=7):
    return sampler_2nd.noise_levels(None, num_levels, sigma_min, sigma_max, rho)


class Rows:
    """Normals that are given."""

    def __init__(self, rows):
        self._rows = iter(rows)

    def __call__(self, *times):
        return column(next(self._rows))

    fresh = __call__


def two_points(x, sigma):
    """The exact denoiser of data at −1 and 1 with equal weight."""
    return torch.tanh(x / sigma.reshape(-1)[:1] ** 2)


X = 10 * column([-1.5, -0.6, 0.1, 0.45, 1.2])  # at level 10


def states(run, denoise, x, sigmas, noise=None):
    """[(sigma, x) of each evaluation], the last one at the last level; and the result."""
    seen = []

    def watched(x, sigma):
        seen.append((float(sigma.reshape(-1)[0]), x))
        return denoise(x, sigma)

    result = run(watched, x, sigmas, noise)
    return seen, result


# ---- the authors' numbers


@pytest.mark.parametrize(
    'case', GOLDEN['cases'], ids=lambda case: f'{case["sampler"]} {case["levels"]} {case["num_levels"]}'
)
def test_agrees_with_the_authors_code(case):
    """ER-SDE's as well, because it has the same rectangles for its integrals."""
    name = NAMES[case['sampler']]
    if name not in peers.installed():
        pytest.skip(f'needs {peers.package_of(name)}')
    rho, sigma_max, sigma_min = {'rho 7, 80 to 0.002': (7, 80, 0.002), 'rho 12, 80 to 0.02': (12, 80, 0.02)}[
        case['levels']
    ]
    sigmas = levels(case['num_levels'], sigma_min, sigma_max, rho)
    x = sigmas[0] * column(GOLDEN['start'])
    seen, result = states(peers.PEERS[name].run, two_points, x, sigmas, Rows(GOLDEN['normals']))
    assert len(seen) == case['evaluations']
    assert seen[-1][0] == pytest.approx(sigma_min, rel=1e-12)
    assert (seen[-1][1] - column(case['x_at_last_level'])).abs().max() < 1e-9
    assert (result - column(case['result'])).abs().max() < 1e-9


# ---- work


@pytest.mark.parametrize('name', named(NEW))
@pytest.mark.parametrize('num_levels', [2, 3, 6, 20])
def test_work_is_what_is_charged(name, num_levels):
    """N evaluations for N levels, from the first to the last, and the result is the last D. SEEDS has stages, too."""
    solver, sigmas = peers.PEERS[name], levels(num_levels)
    seen, result = states(solver.run, two_points, 10 * column([-1.0, 0.3]), sigmas, peers.Normals(0, (2, 1)))
    assert len(seen) == solver.per_step * num_levels + solver.extra
    assert solver.levels(len(seen)) == num_levels
    assert [sigma for sigma, _ in seen[:: solver.per_step]] == pytest.approx(sigmas[:-1], rel=1e-12)
    assert torch.equal(result, two_points(seen[-1][1], torch.tensor([sigmas[-2]], dtype=torch.float64)))


@NEEDS_DIFFUSERS
def test_levels_of_a_vp_scheduler_are_ours():
    """Its conversions lose nothing of σ from 80 to 0.002: the change of variables gives them back."""
    scheduler = peers.needs('diffusers').UniPCMultistepScheduler()
    sigmas = torch.tensor(levels(10, 0.002, 80)[:-1], dtype=torch.float64)
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigmas)
    assert torch.allclose(torch.exp(torch.log(sigma) - torch.log(alpha)), sigmas, rtol=1e-12, atol=0)


@NEEDS_DIFFUSERS
def test_noise_of_sa_solver_is_where_diffusers_has_it():
    scheduler = peers.needs('diffusers').SASolverScheduler()
    assert [scheduler.tau_func(t) for t in (199, 200, 800, 801)] == [0, 1, 1, 0]
    assert [peers.tau_of_sa_solver(scheduler.sigmas[t]) for t in (199, 200, 800, 801)] == [0, 1, 1, 0]


# ---- exact cases


@pytest.mark.parametrize('name', named(NEW))
def test_noise_around_a_point_is_exact(name):
    """Data in one point, 3: x stays N(3, σ²), whatever the steps, and without noise on a straight line."""
    solver, sigmas = peers.PEERS[name], levels(6, 0.002, 80)
    noise = peers.Columns(20, 1)
    D = torch.zeros(20, 1, dtype=torch.float64)
    D[-1] = 3  # the last row is the mean, the others belong to one normal each
    x = D + 80 * noise.fresh()
    seen, _ = states(solver.run, lambda x, sigma: D, x, sigmas, noise)
    x = seen[-1][1]
    assert float(x[-1]) == pytest.approx(3, rel=1e-9)
    assert float(x[:-1].square().sum()) == pytest.approx(0.002**2, rel=1e-9)
    if not solver.stochastic:
        assert float(x[0]) == pytest.approx(0.002, rel=1e-9)


@pytest.mark.parametrize(
    ('step', 'integral', 'integrand'),
    [
        (rivals.ipndm_v_step, lambda s: s**3 / 3 - s**2, lambda s: s**2 - 2 * s),
        (
            rivals.deis_step,
            lambda s: s * (math.log(s) ** 2 - math.log(s) + 1),
            lambda s: math.log(s) ** 2 + math.log(s),
        ),
    ],
)
def test_polynomials_are_integrated_exactly(step, integral, integrand):
    """ε of second degree, in σ for iPNDM with variable steps and in ln σ for DEIS."""
    x = torch.zeros(1, dtype=torch.float64)
    nodes = [rivals.Node(s, x, x + integrand(s)) for s in (2.0, 3.1, 7.0)]
    assert float(step(x, nodes, 0.7, None)) == pytest.approx(integral(0.7) - integral(2.0), rel=1e-12)


def test_ipndm_has_the_weights_of_equal_steps():
    x = column([0.7, -0.2])
    sigmas = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    one, other = (states(run, two_points, x, sigmas)[0][-1][1] for run in (rivals.ipndm_3, rivals.ipndm_v_3))
    assert torch.allclose(one, other, rtol=1e-12)


# ---- orders


@pytest.mark.parametrize(
    ('step', 'order'),
    [
        (rivals.ipndm_step, 2),  # the weights of equal steps, at levels of equal ratios
        (rivals.ipndm_v_step, 3),
        (rivals.deis_step, 3),
        (rivals.dpm_solver_step, 2),  # a factor 2 is left out
    ],
)
def test_order_of_a_step(step, order):
    """On x = √(1 + σ²), the ODE of normal data, with exact history. (A whole run has a first step of order 1, too.)"""

    def error(h):
        levels = [math.exp(j * h) for j in (0, 1, 2, -1)]
        x = [torch.tensor([math.sqrt(1 + s**2)], dtype=torch.float64) for s in levels]
        nodes = [rivals.Node(s, y / (1 + s**2), y * s / (1 + s**2)) for s, y in zip(levels[:3], x, strict=False)]
        return float((step(x[0], nodes, levels[3], None) - x[3]).abs())

    assert math.log2(error(0.01) / error(0.005)) == pytest.approx(order + 1, abs=0.2)


def test_dpm_solver_with_its_factor_would_be_deis():
    sigmas, t = (2.0, 3.1, 7.0), 0.7
    x = torch.tensor([0.4], dtype=torch.float64)
    nodes = [rivals.Node(s, x, x + math.sin(s)) for s in sigmas]
    h = math.log(sigmas[0] / t)
    (r_0, d_0), (r_1, d_1) = (rivals.slope(*pair, h) for pair in itertools.pairwise(nodes))
    phi_3 = (math.expm1(h) / h - 1) / h - 1 / 2
    left_out = -t * phi_3 * (d_0 - d_1) / (r_0 + r_1)
    both = rivals.dpm_solver_step(x, nodes, t, None) + left_out, rivals.deis_step(x, nodes, t, None)
    assert float(both[0]) == pytest.approx(float(both[1]), rel=1e-12)


@NEEDS_DIFFUSERS
def test_order_of_unipc():
    """Before its last two steps, 3 and one more by the corrector: the ODE keeps the share of the law below x."""

    def share_below(x, sigma):
        return (torch.special.ndtr((x - 1) / sigma) + torch.special.ndtr((x + 1) / sigma)) / 2

    def error(steps):
        sigma, x = states(peers.PEERS['diffusers-unipc-3'].run, two_points, X, levels(steps + 1))[0][-3]
        return float((share_below(x, sigma) - share_below(X, 10)).abs().max())

    assert math.log2(error(160) / error(640)) / 2 == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize(
    ('name', 'steps', 'order'),
    [
        ('er-sde-3', 20, 2),  # later its 200 rectangles decide, which are of order 1
        ('seeds-3', 80, 2),
        pytest.param('diffusers-sa-solver', 80, 2, marks=NEEDS_DIFFUSERS),
    ],
)
def test_order_of_the_variance_of_gaussian_data(name, steps, order):
    stds = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)

    def wrong(steps):
        noise = peers.Columns(3 * steps + 1, 3)
        x = noise.fresh() * (stds**2 + 100).sqrt()
        seen, _ = states(
            peers.PEERS[name].run, lambda x, sigma: x * stds**2 / (stds**2 + sigma**2), x, levels(steps + 1), noise
        )
        return float((seen[-1][1].square().sum(0) - stds**2 - 0.25).abs().max())

    assert math.log2(wrong(steps) / wrong(2 * steps)) == pytest.approx(order, abs=0.2)


# ---- the same scheme in two places


def difference(run, other, steps, noise=None):
    """After so many steps of 19."""
    one, two = (states(each, two_points, X, levels(20), noise)[0][steps][1] for each in (run, other))
    return float((one - two).abs().max())


@NEEDS_K_DIFFUSION
def test_ipndm_v_is_the_linear_multistep_method_of_k_diffusion():
    assert difference(rivals.ipndm_v_3, peers.k_diffusion('sample_lms', stochastic=False, order=3), 19) < 1e-9


@NEEDS_DIFFUSERS
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_deis_is_that_of_diffusers():
    assert difference(rivals.deis_3, peers.diffusers_vp('DEISMultistepScheduler', False, solver_order=3), 19) < 1e-9


@NEEDS_DIFFUSERS
@pytest.mark.filterwarnings('ignore:.*algorithm_type:FutureWarning')
def test_dpm_solver_is_that_of_diffusers():
    """Whose state is float32, and which lowers the order of the last steps in another way."""
    config = {'algorithm_type': 'dpmsolver', 'solver_order': 3, 'final_sigmas_type': 'sigma_min'}
    assert (
        difference(rivals.dpm_solver_3, peers.diffusers_vp('DPMSolverMultistepScheduler', False, **config), 17) < 2e-6
    )


@NEEDS_DIFFUSERS
def test_sa_solver_without_noise_is_unipc():
    """Of data prediction, with B(h) = h: two files of diffusers that our levels and states reach in the same way."""
    sa_solver = peers.diffusers_vp(
        'SASolverScheduler', True, predictor_order=3, corrector_order=4, tau_func=lambda sigma: 0
    )
    unipc = peers.diffusers_vp('UniPCMultistepScheduler', False, solver_order=3, solver_type='bh1')
    assert difference(sa_solver, unipc, 19, peers.Normals(0, X.shape)) < 1e-6
