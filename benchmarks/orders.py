"""Which order does each scheme reach? Strong: distance from the solution on the same Brownian path. Weak: moments.

`convergence_of` is the one helper: a row of the table (scheme, problem, noise path, steps) → errors and slope. `ROWS`
says what is expected; tests/test_orders.py asserts it. Each problem has an exact denoiser, and the integration ends at
σ = 0.1: the last step, to σ = 0, is no step of the SDE.
"""

import itertools
import math
import os
import sys
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import click
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import sampler_2nd
from sampling import edm

SIGMA_MAX, SIGMA_MIN = 3.0, 0.1

# ----------------------------------------------------------------------------
# Problems: exact denoisers.


class Mixture:
    """The exact denoiser of a mixture of normals in d dimensions: x [paths, d], weights [k], means [k, d],
    covariances [k, d, d]."""

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, weights, means, covariances):
        self.weights, self.means, covariances = (
            torch.tensor(value, dtype=torch.float64) for value in (weights, means, covariances)
        )
        self.variances, self.axes = torch.linalg.eigh(covariances)  # [k, d], [k, d, d]
        self.dim = self.means.shape[1]

    def __call__(self, x, sigma, class_labels=None):
        total = self.variances + sigma**2
        distance = torch.einsum('kde,pkd->pke', self.axes, x[:, None] - self.means)
        log_density = self.weights.log() - (total.log() + distance**2 / total).sum(-1) / 2
        shrunk = torch.einsum('kde,pke->pkd', self.axes, distance * (self.variances / total))
        return (log_density.softmax(-1)[..., None] * (self.means + shrunk)).sum(1)

    def round_sigma(self, sigma):
        return sigma


def rotated(angle, std_1, std_2):
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return (turn @ torch.diag(torch.tensor([std_1**2, std_2**2], dtype=torch.float64)) @ turn.T).tolist()


PROBLEMS = {
    'gaussian': Mixture([1.0], [[0.0]], [[[0.7**2]]]),
    'mixture': Mixture([0.5, 0.2, 0.3], [[-1.0], [0.2], [0.9]], [[[0.3**2]], [[0.25**2]], [[0.35**2]]]),
    'mixture 2-D': Mixture(
        [0.4, 0.35, 0.25],
        [[-0.8, -0.3], [0.7, 0.6], [0.3, -0.9]],
        [rotated(0.5, 0.5, 0.2), rotated(-0.9, 0.4, 0.25), rotated(1.3, 0.3, 0.6)],
    ),
}

# ----------------------------------------------------------------------------
# Noise.


class Path:
    """Brownian motion in λ from σ = 3 to 0.1, known by its increment and first moment ∫ (q − q_mid) dW on each cell.

    An integral ∫ w(q) dW over any number of cells is exact but for the curvature of w within a cell. Unlike
    sampler_2nd.BrownianPath, one path serves every η and both kinds of Z, so that all schemes share one solution.
    """

    CELLS = 2048

    def __init__(self, paths, dim, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.cell = math.log(SIGMA_MAX / SIGMA_MIN) / self.CELLS
        normals = torch.randn(2, self.CELLS, paths * dim, generator=generator, dtype=torch.float64)
        self.increments, self.moments = normals[0] * self.cell**0.5, normals[1] * (self.cell**3 / 12) ** 0.5
        self.latents = torch.randn(paths, dim, generator=generator, dtype=torch.float64)

    def integral(self, exponents, steps):
        """∫ Σ c e^{bq} dW, (c, b) of `exponents`, over each of `steps` equal steps; q counts from a step's end."""
        per_step = self.CELLS // steps
        q = (torch.arange(per_step).double().flip(0) + 0.5) * self.cell
        w = sum(c * (b * q).exp() for c, b in exponents)
        slope = sum(-c * b * (b * q).exp() for c, b in exponents)  # the path runs towards q = 0
        cells = [values.reshape(steps, per_step, -1) for values in (self.increments, self.moments)]
        total = torch.einsum('skp,k->sp', cells[0], w) + torch.einsum('skp,k->sp', cells[1], slope)
        return total.reshape(steps, *self.latents.shape)

    def normals(self, steps, kappa, time_integral):
        """For each step the two standard normals that make its (N, Z) that of this path."""
        if kappa == 0:
            return [torch.zeros_like(self.latents)] * (2 * steps)
        a, top = 1 + kappa, -kappa if time_integral else 1
        N = math.sqrt(2 * kappa) * self.integral([(1, -kappa)], steps)
        Z = math.sqrt(2 * kappa) * self.integral([(1, top), (-1, top - a)], steps)
        (N1, _), (Z1, Z2) = sampler_2nd.noise_factor(kappa, self.cell * self.CELLS / steps, time_integral)
        z1 = N / N1
        return torch.stack([z1, (Z - Z1 * z1) / Z2], dim=1).flatten(0, 1)


class TreePath:
    """sampler_2nd.BrownianPath as the source of noise: the one that users get."""

    def __init__(self, paths, dim, seed=0):
        self.source = sampler_2nd.BrownianPath([seed])
        self.latents = torch.randn(paths, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def normals(self, steps, kappa, time_integral):
        levels = equal_levels(steps).tolist()
        like = self.latents[None]
        pairs = (self.source.normals(like, *ends, kappa, time_integral) for ends in itertools.pairwise(levels))
        return [z[0] for pair in pairs for z in pair]


# ----------------------------------------------------------------------------
# Schemes that must fail: each lacks one of the reasons for the order.


def rk_increment_only(denoise, x, past, sigma, sigma_next, kappa, noise):
    """`rk` with h ΔB/2 in the place of ΔZ."""
    z1, z2 = noise(), noise()
    pair = iter([z1, 0 * z2])
    return sampler_2nd.rk_step(denoise, x, past, sigma, sigma_next, kappa, lambda: next(pair))


def rk_node_at_one_half(denoise, x, past, sigma, sigma_next, kappa, noise):
    """`rk` with its node at τ + h/2 and the noise of τ + h/3."""
    z1, z2 = noise(), noise()
    D_hat = sampler_2nd.predict_D(past, sigma, kappa) if past else denoise(x, sigma)
    tau, tau_next = sigma**-2, sigma_next**-2
    h, tau_m = tau_next - tau, (tau + tau_next) / 2
    y_m = tau * x + h / 2 * D_hat + math.sqrt(h) * (z1 / 2 + z2 / math.sqrt(12))
    D = denoise(y_m / tau_m, tau_m**-0.5)
    return (tau * x + h * D + math.sqrt(h) * z1) / tau_next, D


def rk_node_with_kappa(denoise, x, past, sigma, sigma_next, kappa, noise):
    """`rk` with its node where the SDE of the step itself, not one with another κ, has the noise of the node."""
    h_m, log_g, noise_weight = sampler_2nd.rk_node(kappa, math.log(sigma / sigma_next))
    h_m = (-log_g - h_m) / kappa
    with mock.patch.object(sampler_2nd, 'rk_node', return_value=(h_m, -(1 + kappa) * h_m, noise_weight)):
        return sampler_2nd.rk_step(denoise, x, past, sigma, sigma_next, kappa, noise)


def taylor_without_laplacian(denoise, x, past, sigma, sigma_next, kappa, noise):
    """`taylor` with the derivative of D along the drift, as if D were smooth: Itô's ½ΔD is missing."""
    h, a = math.log(sigma / sigma_next), 1 + kappa
    N, Z = sampler_2nd.noise_pair(noise(), noise(), kappa, sigma_next, h)
    c = h + math.expm1(-a * h) / a
    tangent = sampler_2nd.tangent_weight(kappa, h) * Z + a * c * (denoise(x, sigma) - x)
    D, correction = denoise.jvp(x, sigma, tangent, -c * sigma)
    return math.exp(-a * h) * x - math.expm1(-a * h) * D + N + correction, D


RK, TAYLOR = sampler_2nd.SCHEMES['rk'], sampler_2nd.SCHEMES['taylor']
ABLATIONS = {
    'rk, pair (ΔB, hΔB/2)': RK._replace(step=rk_increment_only),
    'rk, node at 1/2': RK._replace(step=rk_node_at_one_half),
    'rk, node with κ_m = κ': RK._replace(step=rk_node_with_kappa),
    'taylor, no Laplacian': TAYLOR._replace(step=taylor_without_laplacian),
}

# ----------------------------------------------------------------------------
# Solutions.


ODE_SAMPLERS = {'heun': edm.edm_sampler, 'ablation, euler': partial(edm.ablation_sampler, solver='euler')}


def equal_levels(steps):
    return torch.linspace(math.log(SIGMA_MAX), math.log(SIGMA_MIN), steps + 1, dtype=torch.float64).exp()


def before_last_step(sampler, net, latents, steps, **kwargs):
    """The state at σ_min of a sampler that goes on to σ = 0."""
    states: list[torch.Tensor] = []
    ends = {'sigma_max': SIGMA_MAX, 'sigma_min': SIGMA_MIN}
    sampler(net, latents, num_steps=steps + 1, callback=lambda i, x, *_: states.append(x), **ends, **kwargs)
    return states[steps - 1]


def solve(scheme, problem, path, steps, eta=1.0, S_max=math.inf):
    """The state at σ = 0.1 of the scheme on the path, after `steps` steps of equal length in ln σ."""
    net = PROBLEMS[problem]
    if scheme in ODE_SAMPLERS:
        return before_last_step(ODE_SAMPLERS[scheme], net, path.latents, steps, randn_like=torch.zeros_like)
    normals = path.normals(steps, eta**2, time_integral=(sampler_2nd.SCHEMES | ABLATIONS)[scheme].time_integral)
    if scheme == 'euler':
        normals = normals[::2]
    draws = iter(normals)
    options = {'randn_like': lambda x: next(draws), 'scheme': scheme, 'eta': eta, 'S_max': S_max}
    with (
        mock.patch.dict(sampler_2nd.SCHEMES, ABLATIONS),
        mock.patch.object(net, 'round_sigma', lambda sigmas: equal_levels(len(sigmas) - 1)),
    ):
        return before_last_step(sampler_2nd.ito_taylor_sampler, net, path.latents, steps, **options)


def reference_scheme(scheme, path, eta):
    """What solves the same equation on the same path best."""
    if scheme in ODE_SAMPLERS:
        return 'heun'
    if isinstance(path, TreePath):
        return 'rk' if scheme.startswith('rk') else 'taylor'
    return 'rk' if eta == 1 else 'taylor'


# ----------------------------------------------------------------------------
# Errors and slopes.


class Convergence(NamedTuple):
    steps: list[int]
    errors: list[float]
    slope: float  # least squares in the logarithms, over the points that count


def fit(steps, errors, floors) -> Convergence:
    """A point counts if its error is at least 4 times its floor, the error of what it is compared with."""
    counted = [(math.log(n), math.log(e)) for n, e, floor in zip(steps, errors, floors, strict=True) if e > 4 * floor]
    if len(counted) < 2:
        return Convergence(steps, errors, math.nan)
    n, e = torch.tensor(counted, dtype=torch.float64).T
    n = n - n.mean()
    return Convergence(steps, errors, -float((n * e).sum() / (n * n).sum()))


def convergence(scheme, problem, path, steps, eta, S_max, references) -> Convergence:
    """Strong errors: root mean square, over the paths, of the distance from the solution with 4 times the last steps.

    `references` keeps solutions for other calls.
    """
    solution, floor = solution_on(path, scheme, problem, 4 * steps[-1], eta, S_max, references)
    errors = [rms(solve(scheme, problem, path, n, eta, S_max) - solution) for n in steps]
    return fit(steps, errors, [floor] * len(steps))


def moment_convergence(scheme, problem, path, steps, eta, S_max, references) -> Convergence:
    """Weak errors, |E x² − E x*²| with x* the solution on the same path; their floors are the Monte Carlo noise."""
    solution, _ = solution_on(path, scheme, problem, 1024, eta, S_max, references)
    gaps = [(solve(scheme, problem, path, n, eta, S_max).square() - solution.square()).sum(-1) for n in steps]
    return fit(steps, [abs(float(g.mean())) for g in gaps], [float(g.std()) / math.sqrt(len(g)) for g in gaps])


def solution_on(path, scheme, problem, steps, eta, S_max, references):
    """(solution, an estimate of its own error)"""
    solver = reference_scheme(scheme, path, eta)
    key = solver, problem, steps, eta, S_max, id(path)
    if key not in references:
        fine, coarse = (solve(solver, problem, path, n, eta, S_max) for n in (steps, steps // 2))
        references[key] = fine, rms(fine - coarse) / (2**1.5 - 1)
    return references[key]


def rms(x):
    return float(x.square().mean().sqrt())


def weak_convergence(scheme, std, steps, eta=1.0, S_max=math.inf) -> Convergence:
    """Error of the variance for data N(0, std²), in exact arithmetic: a column of x for each independent normal.

    The sampler starts with variance σ_max², lacking std². From σ to σ' along the SDE a lack shrinks by
    ((std² + σ'²)/(std² + σ²))^{1+κ}.
    """
    s2, low, high = std**2, SIGMA_MIN**2, SIGMA_MAX**2
    middle = min(S_max**2, high)
    exact = s2 + low - s2 * (s2 + middle) / (s2 + high) * ((s2 + low) / (s2 + middle)) ** (1 + eta**2)
    net = Mixture([1.0], [[0.0]], [[[s2]]])
    errors = []
    for n in steps:
        columns = iter(torch.eye(2 * n + 1, dtype=torch.float64)[..., None])
        net.round_sigma = lambda sigmas: equal_levels(len(sigmas) - 1)  # type: ignore[method-assign]
        options = {'randn_like': lambda x, columns=columns: next(columns), 'scheme': scheme, 'eta': eta, 'S_max': S_max}
        with mock.patch.dict(sampler_2nd.SCHEMES, ABLATIONS):
            x = before_last_step(sampler_2nd.ito_taylor_sampler, net, next(columns), n, **options)
        errors.append(abs(float(x.square().sum()) - exact))
    return fit(steps, errors, [1e-13] * len(steps))


# ----------------------------------------------------------------------------
# The table.


class Row(NamedTuple):
    """A scheme with the order that it has to show."""

    kind: str  # strong; weak: Gaussian data, in exact arithmetic; moment: E x² of the mixture, by Monte Carlo
    scheme: str
    problem: str
    order: float
    eta: float = 1.0
    path: str = 'cells'
    steps: tuple[int, ...] = (32, 64, 128)
    tolerance: float = 0.2
    S_max: float = math.inf

    @property
    def name(self):
        return f'{self.kind}-{self.scheme}-{self.problem}-eta{self.eta:g}-S_max{self.S_max:g}-{self.path}'


COARSE, MEDIUM, FINE = (4, 8, 16, 32), (16, 32, 64, 128), (64, 128, 256)
MIDDLE = math.sqrt(SIGMA_MAX * SIGMA_MIN) * (1 + 1e-9)  # a level of every grid, rounded up
ROWS = [
    Row('strong', 'ablation, euler', 'mixture', 1, eta=0),
    Row('strong', 'heun', 'mixture', 2, eta=0),
    *(Row('strong', 'euler', problem, 1) for problem in PROBLEMS),
    # What limits the order to 1.5 is how D's Jacobian fluctuates; for Gaussian data it does not.
    Row('strong', 'taylor', 'gaussian', 2),
    Row('strong', 'taylor', 'mixture', 1.5),
    Row('strong', 'taylor', 'mixture 2-D', 1.5),
    Row('strong', 'rk', 'gaussian', 2),
    # The part of order 2 is large: the slope falls from 2 at few steps to 1.5 at many.
    Row('strong', 'rk', 'mixture', 1.5, steps=FINE, tolerance=0.3),
    Row('strong', 'rk', 'mixture 2-D', 1.5, steps=FINE, tolerance=0.3),
    Row('strong', 'taylor', 'mixture', 2, eta=0),
    # Little noise: the error of order 2 of the equation without noise still shows.
    Row('strong', 'taylor', 'mixture', 1.5, eta=0.5, tolerance=0.4),
    Row('strong', 'taylor', 'mixture', 1.5, eta=1.5),
    # Without noise the order is 2; with little of it, the part of order 2 shows at many steps still.
    *(Row('strong', 'rk', problem, 2, eta=0) for problem in ('mixture', 'mixture 2-D')),
    *(
        Row('strong', 'rk', problem, 1.5, eta=0.5, steps=(128, 256, 512), tolerance=0.3)
        for problem in ('mixture', 'mixture 2-D')
    ),
    *(Row('strong', 'rk', problem, 1.5, eta=1.5) for problem in ('mixture', 'mixture 2-D')),
    # Noise in the second half of the way only.
    *(Row('strong', 'taylor', problem, 1.5, S_max=MIDDLE) for problem in ('mixture', 'mixture 2-D')),
    *(Row('strong', 'rk', problem, 1.5, S_max=MIDDLE, steps=FINE) for problem in ('mixture', 'mixture 2-D')),
    # The tree is slow for thousands of paths, hence so few steps, where the part of order 2 in `rk` still shows.
    Row('strong', 'taylor', 'mixture', 1.5, path='tree', steps=(16, 32, 64)),
    Row('strong', 'rk', 'mixture', 1.5, path='tree', steps=(16, 32, 64), tolerance=0.4),
    Row('strong', 'rk', 'mixture', 1.5, eta=1.3, path='tree', steps=(16, 32, 64), tolerance=0.4),
    Row('weak', 'euler', 'gaussian', 1, steps=MEDIUM),
    *(Row('weak', 'taylor', 'gaussian', 2, eta=eta, steps=MEDIUM) for eta in (0, 0.5, 1.5)),
    # Its weight makes the error of few steps so small that it changes its sign, at 25.
    Row('weak', 'taylor', 'gaussian', 2, steps=(64, 128, 256, 512)),
    # The extrapolated D makes it 3 on Gaussian data. In general it is 2, and here too where no error is left but that
    # of the first step's guess, which has the other sign.
    Row('weak', 'rk', 'gaussian', 3.5, steps=(8, 16, 32, 64), tolerance=0.6),
    Row('weak', 'rk', 'gaussian', 2, steps=(512, 1024, 2048)),
    *(Row('weak', 'rk', 'gaussian', 2, eta=eta, steps=MEDIUM) for eta in (0, 0.5)),
    Row('weak', 'rk', 'gaussian', 2, eta=1.5, steps=FINE),
    *(Row('weak', scheme, 'gaussian', 2, S_max=MIDDLE, steps=FINE) for scheme in ('taylor', 'rk')),
    Row('moment', 'euler', 'mixture', 1, steps=COARSE),
    *(Row('moment', 'taylor', 'mixture', 2, eta=eta, steps=COARSE) for eta in (0.5, 0.7)),  # less than the noise for 1
    Row('moment', 'rk', 'mixture', 2, eta=0.5, steps=(8, 16, 32, 64)),
    Row('moment', 'rk', 'mixture', 2, eta=0.7, steps=(8, 16, 32, 64)),
]
# Each has to miss the order of the scheme that it was made of.
ABLATION_ROWS = [
    Row('strong', 'rk, pair (ΔB, hΔB/2)', 'mixture', 1, steps=FINE),
    Row('strong', 'rk, node at 1/2', 'mixture', 1, steps=FINE),
    Row('strong', 'rk, node with κ_m = κ', 'mixture', 1, eta=0.5, steps=FINE),
    Row('weak', 'rk, node with κ_m = κ', 'gaussian', 1, eta=1.5, steps=FINE),
    Row('strong', 'taylor, no Laplacian', 'mixture', 1),
    Row('moment', 'taylor, no Laplacian', 'mixture', 1, steps=COARSE, tolerance=0.4),
]


def convergence_of(row, cache, paths=1500) -> Convergence:
    """`cache` keeps paths and solutions from row to row."""
    if row.kind == 'weak':
        return weak_convergence(row.scheme, 0.7, row.steps, row.eta, row.S_max)
    dim = PROBLEMS[row.problem].dim
    key = row.path, dim
    if key not in cache:
        cache[key] = Path(paths, dim) if row.path == 'cells' else TreePath(paths // 2, dim)
    helper = {'strong': convergence, 'moment': moment_convergence}[row.kind]
    return helper(row.scheme, row.problem, cache[key], row.steps, row.eta, row.S_max, cache.setdefault('solutions', {}))


def format_row(row, result):
    errors = ' '.join(f'{n}: {e:.1e}' for n, e in zip(result.steps, result.errors, strict=True))
    noise = f'eta {row.eta:g}' + (f' to {row.S_max:.3g}' if row.S_max < math.inf else '')
    name = f'{row.kind:<7}{row.scheme:<22}{row.problem:<12} {noise:<15}{row.path:<6}'
    return f'{name} order {row.order:<4g}slope {result.slope:5.2f}   {errors}'


@click.command(context_settings={'show_default': True})
@click.option('--paths', help='Paths; half as many trees', type=click.IntRange(min=4), metavar='INT', default=1500)
def main(paths: int) -> None:
    """Print the table of orders.

    \b
    python benchmarks/orders.py
    """
    cache: dict[Any, Any] = {}
    for row in [*ROWS, *ABLATION_ROWS]:
        print(format_row(row, convergence_of(row, cache, paths)), flush=True)


if __name__ == '__main__':
    main()
