"""How fast and how exact is the Fréchet distance, next to the usual one with scipy's matrix square root?

python benchmarks/frechet.py
"""

import os
import sys
import time

import click
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from metrics.distances import frechet_distance


def features(rng: np.random.RandomState, n: int, dim: int, shift: float) -> np.ndarray:
    """Correlated and not negative, as features after a ReLU are."""
    return np.maximum(rng.randn(n, dim) @ rng.randn(dim, dim) / np.sqrt(dim) + shift, 0)


def with_sqrtm(mu: np.ndarray, sigma: np.ndarray, mu_ref: np.ndarray, sigma_ref: np.ndarray) -> float:
    from scipy import linalg

    root = linalg.sqrtm(sigma @ sigma_ref)
    return float(((mu - mu_ref) ** 2).sum() + np.trace(sigma + sigma_ref - 2 * np.real(root)))


@click.command()
@click.option('--dim', type=click.IntRange(min=2), default=2048, show_default=True)
@click.option('--rounds', type=click.IntRange(min=1), default=1, show_default=True)
def main(dim: int, rounds: int) -> None:
    """Both ways take turns; seconds are the best of the rounds."""
    rng = np.random.RandomState(0)
    print('| images | ours | `sqrtm` | times as fast | ours of a set to itself |\n|---|---|---|---|---|')
    for n in (2 * dim, dim // 4):
        moments = []
        for shift in (0.0, 0.2):
            x = features(rng, n, dim, shift)
            moments += [x.mean(axis=0), np.cov(x.T)]
        times: dict[str, list[float]] = {}
        values: dict[str, float] = {}
        for _ in range(rounds):
            for name, call in [('ours', lambda *a: frechet_distance(*a).distance), ('sqrtm', with_sqrtm)]:
                start = time.perf_counter()
                values[name] = call(*moments)
                times.setdefault(name, []).append(time.perf_counter() - start)
        same = frechet_distance(*moments[:2], *moments[:2]).distance
        ours, theirs = min(times['ours']), min(times['sqrtm'])
        cells = f'{values["ours"]:.9g} in {ours:.1f} s | {values["sqrtm"]:.9g} in {theirs:.1f} s | {theirs / ours:.1f}'
        print(f'| {n:,} | {cells} | {same:.1e} |')


if __name__ == '__main__':
    main()
