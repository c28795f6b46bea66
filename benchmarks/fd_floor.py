"""What Fréchet distance do two sets of real images have? Random halves of the same dataset.

    python fid.py ref --data=datasets/mnist-32x32.zip --dest=out/digits.npz \\
        --detector=efficientnet-lite0 --with-features
    python benchmarks/fd_floor.py out/digits.npz
"""

import os
import sys

import click
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from metrics.distances import frechet_distance
from metrics.statistics import read_reference


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(x.mean(axis=0), np.cov(x.T), y.mean(axis=0), np.cov(y.T)).distance


@click.command()
@click.argument('features', metavar='NPZ')
@click.option('--splits', type=click.IntRange(min=2), default=5, show_default=True)
def main(features: str, splits: int) -> None:
    """Halves: each against the other. Resampled: as many images as there are, drawn with repetition, against all."""
    real = read_reference(features).features
    if real is None:
        raise click.ClickException(f'{features} has no features; make it with fid.py ref --with-features')
    rng = np.random.RandomState(0)
    halves, resampled = [], []
    for _ in range(splits):
        order = rng.permutation(len(real))
        halves.append(distance(real[order[::2]], real[order[1::2]]))
        resampled.append(distance(real[rng.randint(len(real), size=len(real))], real))
    for name, values in [(f'halves of {len(real) // 2}', halves), (f'{len(real)} resampled', resampled)]:
        print(f'{name:<20} {np.mean(values):.4g} ± {np.std(values, ddof=1):.2g} over {splits} splits')


if __name__ == '__main__':
    main()
