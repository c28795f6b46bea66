"""What does it save to write PNG files in threads, beside the sampling of the next batch?

Batches of images go to files in two ways, in turns: one after the other in the thread that samples, and by the threads
of `images.files.Background`. Sampling is a stand-in: `wait` sleeps, as a process does that waits for its GPU; `compute`
multiplies matrices on one core, so often as would take an idle core that long.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import click
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from images import files


def multiply(times: int) -> None:
    matrix = torch.eye(512)
    for _ in range(times):
        matrix = matrix @ matrix


def make_work(seconds: float) -> dict[str, Callable[[], None]]:
    """Name → what sampling a batch is."""
    start = time.process_time()
    multiply(50)
    times = round(seconds / (time.process_time() - start) * 50)
    return {'wait': partial(time.sleep, seconds), 'compute': partial(multiply, times)}


def images_per_second(batches: list[np.ndarray], work: Callable[[], None], background: bool) -> float:
    with tempfile.TemporaryDirectory() as temp:
        folder = files.PngFolder(temp, subdirs=False)
        writer = files.Background(folder.write)
        start = time.perf_counter()
        for number, images in enumerate(batches):
            work()
            seeds = range(number * len(images), (number + 1) * len(images))
            if background:
                writer.add(seeds, images)
            else:
                for seed, image in zip(seeds, images, strict=True):
                    folder.write(seed, image)
        writer.close()
        return sum(map(len, batches)) / (time.perf_counter() - start)


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--num', help='Batches', metavar='INT', type=click.IntRange(min=1), default=10)
@click.option('--batch', help='Images in a batch', metavar='INT', type=click.IntRange(min=1), default=64)
@click.option('--resolution', help='Of the images, in colour', metavar='INT', type=click.IntRange(min=1), default=64)
@click.option('--ms', help='Sampling a batch takes so many milliseconds', metavar='FLOAT', type=float, default=200)
@click.option('--repeats', help='Runs of each kind', metavar='INT', type=click.IntRange(min=1), default=5)
def main(num: int, batch: int, resolution: int, ms: float, repeats: int) -> None:
    """Print images per second, each the median of the repeats.

    \b
    python benchmarks/write_images.py
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 200, [num, batch, resolution // 8, resolution // 8, 3], dtype=np.uint8)
    pictures = smooth.repeat(8, axis=2).repeat(8, axis=3)
    pictures += rng.integers(0, 8, pictures.shape, dtype=np.uint8)  # compresses about as photographs do
    for name, work in make_work(ms / 1000).items():
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(repeats):
            for background, seen in speeds.items():
                seen.append(images_per_second(list(pictures), work, background))
        before, after = statistics.median(speeds[False]), statistics.median(speeds[True])
        print(f'{name:<8} in turns {before:6.0f} images/s   in threads {after:6.0f} images/s   {after / before:.2f}x')


if __name__ == '__main__':
    main()
