"""Distances between feature sets, against closed forms and straightforward implementations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import distances
from metrics.distances import frechet_distance


@pytest.fixture
def rng():
    return np.random.RandomState(0)


def moments(features):
    return features.mean(axis=0), np.cov(features.T)


def correlated(rng, n, dim, shift=0.0):
    return np.maximum(rng.randn(n, dim) @ rng.randn(dim, dim) / math.sqrt(dim) + shift, 0)


def test_frechet_distance_of_commuting_covariances(rng):
    rotation, _ = np.linalg.qr(rng.randn(6, 6))
    a, b = rng.rand(2, 6)
    mu = rng.randn(6)
    sigma_a, sigma_b = (rotation @ np.diag(s**2) @ rotation.T for s in (a, b))
    result = frechet_distance(np.zeros(6), sigma_a, mu, sigma_b)
    assert result.mean_part == pytest.approx(mu @ mu, rel=1e-12)
    assert result.covariance_part == pytest.approx(((a - b) ** 2).sum(), rel=1e-10)
    assert result.distance == result.mean_part + result.covariance_part
    assert result.rank == 6


def test_frechet_distance_in_one_dimension():
    result = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]]))
    assert result.distance == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2, rel=1e-14)


@pytest.mark.parametrize('n', [20, 200])
def test_frechet_distance_of_a_set_to_itself_is_zero(rng, n):
    """Also with fewer vectors than the 64 dimensions, where a square root of the product of covariances fails."""
    mu, sigma = moments(correlated(rng, n, 64))
    assert abs(frechet_distance(mu, sigma, mu, sigma).distance) < 1e-9


def test_frechet_distance_of_singular_covariances_is_that_of_their_factors(rng):
    """tr (Σ Σ_r)^½ is the nuclear norm of A Bᵀ, with Σ = AᵀA and Σ_r = BᵀB."""
    x, y = correlated(rng, 20, 64), correlated(rng, 30, 64, shift=0.3)
    a, b = ((f - f.mean(axis=0)) / math.sqrt(len(f) - 1) for f in (x, y))
    nuclear = np.linalg.norm(a @ b.T, ord='nuc')
    difference = x.mean(axis=0) - y.mean(axis=0)
    expected = difference @ difference + (a**2).sum() + (b**2).sum() - 2 * nuclear
    result = frechet_distance(*moments(x), *moments(y))
    assert result.distance == pytest.approx(expected, rel=1e-8)
    assert result.rank == 29


def test_frechet_distance_equals_the_square_root_of_the_product(rng):
    linalg = pytest.importorskip('scipy.linalg')
    x, y = moments(correlated(rng, 500, 40)), moments(correlated(rng, 500, 40, shift=0.3))
    root = linalg.sqrtm(x[1] @ y[1])
    expected = ((x[0] - y[0]) ** 2).sum() + np.trace(x[1] + y[1] - 2 * root.real)
    assert frechet_distance(*x, *y).distance == pytest.approx(expected, rel=1e-8)


def test_symmetry_rotation_scale_and_shift(rng):
    x, y = correlated(rng, 90, 12), correlated(rng, 70, 12, shift=0.2)
    distance = frechet_distance(*moments(x), *moments(y)).distance
    rotation, _ = np.linalg.qr(rng.randn(12, 12))
    shift = rng.randn(12)
    for other, expected in [
        ((y, x), distance),
        ((x @ rotation, y @ rotation), distance),
        ((3 * x, 3 * y), 9 * distance),
        ((x + shift, y + shift), distance),
    ]:
        assert frechet_distance(*moments(other[0]), *moments(other[1])).distance == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(*moments(x + shift), *moments(x)).distance == pytest.approx(shift @ shift, rel=1e-9)


def test_a_constant_feature_adds_nothing(rng):
    x, y = correlated(rng, 50, 5), correlated(rng, 50, 5)
    wide = [np.hstack([f, np.full([50, 1], 7.0)]) for f in (x, y)]
    expected = frechet_distance(*moments(x), *moments(y)).distance
    assert frechet_distance(*moments(wide[0]), *moments(wide[1])).distance == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_refuses_what_is_not_finite_or_does_not_fit():
    eye = np.eye(2)
    with pytest.raises(ValueError, match='not finite'):
        frechet_distance(np.array([0, np.nan]), eye, np.zeros(2), eye)
    with pytest.raises(ValueError, match='different dimensions'):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), eye)


def kernel_distance_by_loops(x, y):
    d = x.shape[1]
    k = lambda a, b: (a @ b / d + 1) ** 3  # noqa: E731
    pairs = lambda f: np.mean([k(a, b) for a, b in itertools.permutations(f, 2)])  # noqa: E731
    return pairs(x) + pairs(y) - 2 * np.mean([k(a, b) for a, b in itertools.product(x, y)])


def test_kernel_distance_of_one_full_subset(rng):
    x, y = rng.randn(12, 5), rng.randn(12, 5) + 0.5
    value, error = distances.kernel_distance(x, y, num_subsets=1)
    assert value == pytest.approx(kernel_distance_by_loops(x, y), rel=1e-12)
    left_out = [kernel_distance_by_loops(np.delete(x, i, axis=0), y) for i in range(12)]
    assert error == pytest.approx(math.sqrt(11 * np.var(left_out)), rel=1e-9)


def test_error_of_the_kernel_distance_of_few_images_is_that_of_their_choice(rng):
    real = rng.randn(60, 3)
    found = [distances.kernel_distance(rng.randn(60, 3) + 0.5, real, num_subsets=1) for _ in range(400)]
    values, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def precision_recall_by_loops(x, y, k):
    distance = lambda a, b: np.linalg.norm(a - b)  # noqa: E731
    radius = lambda i, f: sorted(distance(f[i], g) for j, g in enumerate(f) if j != i)[k - 1]  # noqa: E731
    in_real = np.array([[distance(a, b) < radius(j, y) for j, b in enumerate(y)] for a in x])
    in_fake = np.array([[distance(a, b) < radius(i, x) for b in y] for i, a in enumerate(x)])
    return in_real.any(1).mean(), in_fake.any(0).mean(), in_real.sum(1).mean() / k, in_real.any(0).mean()


def test_precision_recall_density_coverage_against_loops(rng, monkeypatch):
    x, y = rng.randn(25, 3), 1.5 * rng.randn(31, 3) + 0.4
    expected = pytest.approx(precision_recall_by_loops(x, y, 3), rel=1e-12)
    assert distances.precision_recall(x, y, k=3) == expected
    blocks = distances._squared_distances
    monkeypatch.setattr(distances, '_squared_distances', lambda a, b: blocks_of_four(blocks, a, b))
    assert distances.precision_recall(x, y, k=3) == expected


def blocks_of_four(blocks, a, b):
    for start in range(0, len(a), 4):
        [(_, squares)] = blocks(a[start : start + 4], b)
        yield slice(start, start + 4), squares


def test_precision_recall_of_equal_and_of_distant_sets(rng):
    x = rng.randn(60, 4)
    near = distances.precision_recall(x, x + 1e-9)
    assert (near.precision, near.recall, near.coverage) == (1, 1, 1)
    assert distances.precision_recall(x, x + 100) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match='more than 5 images'):
        distances.precision_recall(x[:5], x)


def test_sliced_wasserstein_closed_forms(rng):
    x = rng.randn(500, 6)
    shift = rng.randn(6)
    assert distances.sliced_wasserstein(x, x) == 0
    expected = math.sqrt(shift @ shift / 6)  # E ⟨u, shift⟩² over directions
    assert distances.sliced_wasserstein(x + shift, x, num_directions=4000) == pytest.approx(expected, rel=0.05)
    one = x[:, :1]
    assert distances.sliced_wasserstein(3 * one, one) == pytest.approx(2 * math.sqrt((one**2).mean()), rel=1e-12)


def test_sliced_wasserstein_does_not_mind_repetition(rng):
    x, y = rng.randn(40, 3), rng.randn(40, 3)
    expected = distances.sliced_wasserstein(x, y)
    assert distances.sliced_wasserstein(np.repeat(x, 3, axis=0), y) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 20), st.integers(0, 10**6))
def test_frechet_distance_is_never_negative_nor_complex(n, m, dim, seed):
    rng = np.random.RandomState(seed)
    x, y = (np.atleast_2d(rng.randn(size, dim) ** 3) for size in (n, m))
    sigma = [np.atleast_2d(np.cov(f.T)) for f in (x, y)]
    forward = frechet_distance(x.mean(0), sigma[0], y.mean(0), sigma[1]).distance
    backward = frechet_distance(y.mean(0), sigma[1], x.mean(0), sigma[0]).distance
    scale = np.trace(sigma[0]) + np.trace(sigma[1]) + forward
    assert forward > -1e-9 * scale
    assert forward == pytest.approx(backward, abs=1e-7 * scale)
