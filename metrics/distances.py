"""Distances between two sets of feature vectors, float64.

`frechet_distance` needs their means and covariances only; the others take the features themselves, [n, d] each, real
ones second. Random choices (subsets, directions) come from fixed seeds: the same features give the same number.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Frechet(NamedTuple):
    """distance = mean_part + covariance_part; `rank` is that of the reference covariance."""

    distance: float
    mean_part: float
    covariance_part: float
    rank: int


def frechet_distance(mu: np.ndarray, sigma: np.ndarray, mu_ref: np.ndarray, sigma_ref: np.ndarray) -> Frechet:
    """‖μ − μ_r‖² + tr(Σ + Σ_r − 2 (Σ Σ_r)^½), the squared 2-Wasserstein distance of two normal distributions.

    tr (Σ Σ_r)^½ is computed as Σᵢ √λᵢ over the eigenvalues of the symmetric Fᵀ Σ F, where Σ_r = F Fᵀ and F has as many
    columns as Σ_r has rank. All of it is real and exact for singular covariances too (fewer images than dimensions),
    where the square root of the product Σ Σ_r turns complex. Dowson & Landau 1982; Heusel et al. 2017
    (arXiv 1706.08500).

    Args:
        mu, mu_ref: [d].
        sigma, sigma_ref: [d, d], symmetric, positive semi-definite.

    Raises:
        ValueError: the shapes differ, or a number is not finite.
    """
    arrays = [np.asarray(a, dtype=np.float64) for a in (mu, sigma, mu_ref, sigma_ref)]
    dim = arrays[0].size
    if [a.shape for a in arrays] != [(dim,), (dim, dim)] * 2:
        raise ValueError(f'means and covariances of different dimensions: {", ".join(str(a.shape) for a in arrays)}')
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError('means or covariances are not finite')
    mu, sigma, mu_ref, sigma_ref = arrays
    sigma, sigma_ref = (sigma + sigma.T) / 2, (sigma_ref + sigma_ref.T) / 2
    factor = _factor(sigma_ref)
    cross = np.sqrt(np.linalg.eigvalsh(factor.T @ sigma @ factor).clip(min=0)).sum()
    mean_part = float(((mu - mu_ref) ** 2).sum())
    covariance_part = float(np.trace(sigma) + np.trace(sigma_ref) - 2 * cross)
    return Frechet(mean_part + covariance_part, mean_part, covariance_part, factor.shape[1])


def _factor(sigma: np.ndarray) -> np.ndarray:
    """F with F Fᵀ = Σ, [d, rank]: Cholesky's where no pivot comes near rounding errors, else from the eigenvalues."""
    rounding = len(sigma) * np.finfo(np.float64).eps
    try:
        factor = np.linalg.cholesky(sigma)  # ten times as fast
        if factor.diagonal().min() ** 2 > rounding * sigma.diagonal().max():
            return factor
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(sigma)
    kept = values > rounding * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def kernel_distance(
    features: np.ndarray, real: np.ndarray, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x·y/d + 1)³ (KID), and its standard error.

    The mean over subsets of min(subset_size, n) vectors of each set, drawn without replacement, of the unbiased
    estimate Σ_{i≠j} k(xᵢ, xⱼ)/(m(m−1)) + the same for y − 2 Σ k(xᵢ, yⱼ)/m². It may be negative. The error is the
    standard deviation over the subsets by √num_subsets, as is usual: it tells of the choice of subsets, not of the
    choice of images. Where a subset takes all `features`, it is that of the choice of images, by the jackknife.
    Bińkowski et al. 2018 (arXiv 1801.01401).
    """
    rng = np.random.RandomState(seed)
    m = min(subset_size, len(features), len(real))
    if m < 2:
        raise ValueError('KID needs two images or more on both sides')
    values = []
    for _ in range(num_subsets):
        x = features[rng.choice(len(features), m, replace=False)]
        y = real[rng.choice(len(real), m, replace=False)]
        within = sum(k.sum() - np.trace(k) for k in (_kernel(x, x), _kernel(y, y))) / (m * (m - 1))
        values.append(within - 2 * _kernel(x, y).mean())
    if len(features) == m:
        error = _jackknife_error(features, real)
    else:
        error = np.std(values, ddof=1) / math.sqrt(num_subsets) if num_subsets > 1 else 0.0
    return float(np.mean(values)), float(error)


def _jackknife_error(features: np.ndarray, real: np.ndarray) -> float:
    """Standard error of the kernel distance of m `features` to `real`: √((m−1)/m Σᵢ (θᵢ − θ̄)²), θᵢ without the i-th."""
    m = len(features)
    if m < 3:
        return math.nan
    within = _kernel(features, features)
    np.fill_diagonal(within, 0)
    across = sum(_kernel(features, part).sum(axis=1) for part in np.array_split(real, len(real) // 1000 + 1)) / len(
        real
    )
    left_out = (within.sum() - 2 * within.sum(axis=1)) / ((m - 1) * (m - 2)) - 2 * (across.sum() - across) / (m - 1)
    return math.sqrt((m - 1) * left_out.var())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


class Coverage(NamedTuple):
    """See `precision_recall`."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(features: np.ndarray, real: np.ndarray, k: int = 5) -> Coverage:
    """Precision, recall, density and coverage by k nearest neighbours.

    The ball of a vector reaches to its k-th nearest other vector of the same set, which is outside (`<`).
    precision: share of `features` inside the ball of some real vector. recall: share of `real` inside the ball of some
    generated one. density: how many real balls hold a generated vector, on average, over k. coverage: share of real
    balls that hold a generated vector. Kynkäänniemi et al. 2019 (arXiv 1904.06991); Naeem et al. 2020 (2002.09797).
    """
    if min(len(features), len(real)) <= k:
        raise ValueError(f'precision and recall with k={k} need more than {k} images on both sides')
    radii, real_radii = _ball_radii(features, k), _ball_radii(real, k)
    recalled, covered, count = np.zeros(len(real), bool), np.zeros(len(real), bool), np.zeros(len(features))
    for rows, squares in _squared_distances(features, real):
        inside = squares < real_radii
        count[rows] = inside.sum(axis=1)
        covered |= inside.any(axis=0)
        recalled |= (squares < radii[rows, None]).any(axis=0)
    return Coverage(float((count > 0).mean()), float(recalled.mean()), float(count.mean() / k), float(covered.mean()))


def _ball_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each vector to its k-th nearest other one."""
    radii = np.empty(len(features))
    for rows, squares in _squared_distances(features, features):
        squares[np.arange(len(squares)), np.arange(len(features))[rows]] = np.inf  # not to itself
        radii[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return radii


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of x, their squared distances to all of y), about 64 MB at a time."""
    size = max(1, 2**23 // len(y))
    norms = (y**2).sum(axis=1)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        squares = (x[rows] ** 2).sum(axis=1)[:, None] + norms - 2 * x[rows] @ y.T
        yield rows, squares.clip(min=0)


def sliced_wasserstein(features: np.ndarray, real: np.ndarray, num_directions: int = 1000, seed: int = 0) -> float:
    """√ of the mean over random directions u of the squared 2-Wasserstein distance of u·features and u·real.

    In one dimension that is the mean squared difference of the sorted values; with different numbers of vectors, of the
    two quantile functions at the midpoints of the larger number. Bonneel et al. 2015.
    """
    rng = np.random.RandomState(seed)
    n = max(len(features), len(real))
    middle = (np.arange(n) + 0.5) / n
    total = 0.0
    for _ in range(num_directions):
        u = rng.standard_normal(features.shape[1])
        u /= np.linalg.norm(u)
        a, b = (np.sort(values @ u)[(middle * len(values)).astype(int)] for values in (features, real))
        total += float(((a - b) ** 2).mean())
    return math.sqrt(total / num_directions)
