"""How fast are datasets made and read, next to a plain loop with Pillow? Does memory grow with the number of images?

Making: each tool runs as its own process on the same folder, in turns; a ratio is the median over the pairs.
Reading: one process, items per second.
"""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import click
import numpy as np
import PIL.Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works uninstalled

DISTINCT = 20  # images that are drawn; the others are links to their files, as disks are not the question


def draw_images(folder: Path, count: int, size: int) -> None:
    """`count` PNG files of smooth colours with a little noise, size×size."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f'{i // 1000:05d}' / f'{i:08d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < DISTINCT:
            coarse = PIL.Image.fromarray(rng.integers(0, 256, [8, 8, 3], dtype=np.uint8))
            smooth = np.asarray(coarse.resize((size, size), PIL.Image.Resampling.BICUBIC))
            PIL.Image.fromarray(np.clip(smooth + rng.normal(0, 2, smooth.shape), 0, 255).astype(np.uint8)).save(path)
        else:
            os.link(folder / '00000' / f'{i % DISTINCT:08d}.png', path)


def pillow_loop(source: str, dest: str) -> None:
    """The rival: what one would write in a minute."""
    with zipfile.ZipFile(dest, 'w', zipfile.ZIP_STORED) as archive:
        for i, path in enumerate(sorted(Path(source).rglob('*.png'))):
            image = PIL.Image.open(path).convert('RGB')
            if image.size != (64, 64):
                image = image.resize((64, 64), PIL.Image.Resampling.LANCZOS)
            data = io.BytesIO()
            image.save(data, format='png', compress_level=0)
            archive.writestr(f'{i // 1000:05d}/img{i:08d}.png', data.getvalue())


def run(*command: str) -> float:
    """Seconds that a Python command takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - start


def options(folder: Path, source: Path, workers: int) -> list[str]:
    return [f'--source={source}', f'--dest={folder}/tool.zip', '--resolution=64x64', f'--workers={workers}']


def peak_memory(arguments: list[str]) -> float:
    """The most memory that dataset_tool.py, without its workers, ever has: MiB, from Linux's /proc."""
    code = (
        'import re, sys, dataset_tool\n'
        'dataset_tool.main(sys.argv[1:], standalone_mode=False)\n'
        'print("peak", re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, *arguments], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return int(done.stdout.split('peak ')[1]) / 1024


def pairs(folder: Path, source: Path, workers: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of the rival and of dataset_tool.py, and the median of their ratios."""
    rival, tool = [], []
    for _ in range(repeats):
        rival.append(run(__file__, '--rival', str(source), f'{folder}/rival.zip'))
        tool.append(run(str(ROOT / 'dataset_tool.py'), *options(folder, source, workers)))
    check_same_pixels(folder / 'rival.zip', folder / 'tool.zip')
    ratios = [a / b for a, b in zip(rival, tool, strict=True)]
    return statistics.median(rival), statistics.median(tool), statistics.median(ratios)


def check_same_pixels(a: Path, b: Path) -> None:
    """Both archives hold the same images in files of the same size, up to a few bytes of headers."""
    with zipfile.ZipFile(a) as zip_a, zipfile.ZipFile(b) as zip_b:
        for name in zip_a.namelist():
            data = [archive.read(name) for archive in (zip_a, zip_b)]
            assert abs(len(data[0]) - len(data[1])) < 0.01 * len(data[0]), name
            first, second = (np.asarray(PIL.Image.open(io.BytesIO(each))) for each in data)
            assert np.array_equal(first, second), name


def items_per_second(read, count: int) -> float:
    start = time.perf_counter()
    for i in range(count):
        read(i)
    return count / (time.perf_counter() - start)


def reading(path: Path, count: int) -> dict[str, float]:
    """Items per second of each way to read the dataset, the second time that it is read."""
    from training.dataset import ImageFolderDataset, pyspng

    archive = zipfile.ZipFile(path)
    names = sorted(name for name in archive.namelist() if name.endswith('.png'))

    def with_pillow(i: int) -> np.ndarray:
        return np.array(PIL.Image.open(io.BytesIO(archive.read(names[i])))).transpose(2, 0, 1)

    ways = {
        'Pillow, per item': with_pillow,
        'ImageFolderDataset, without pyspng': ImageFolderDataset(path, use_pyspng=False).__getitem__,
        'ImageFolderDataset, cache=True': ImageFolderDataset(path, cache=True).__getitem__,
    }
    if pyspng is not None:
        ways['ImageFolderDataset, with pyspng'] = ImageFolderDataset(path).__getitem__
    for read in ways.values():
        items_per_second(read, count)
    return {way: items_per_second(read, count) for way, read in ways.items()}


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--small', help='Number of 64x64 images', metavar='INT', type=click.IntRange(min=100), default=20000)
@click.option('--large', help='Number of 1024x1024 images', metavar='INT', type=click.IntRange(min=20), default=2000)
@click.option('--workers', help='Processes of dataset_tool.py', metavar='INT', type=click.IntRange(min=1), default=2)
@click.option('--repeats', help='Pairs of runs', metavar='INT', type=click.IntRange(min=1), default=5)
@click.option('--rival', help='Run the plain loop only', nargs=2, hidden=True)
def main(small: int, large: int, workers: int, repeats: int, rival: tuple[str, str] | None) -> None:
    """Print tables of how fast datasets are made and read, and of memory.

    \b
    python benchmarks/dataset.py                                        # a quarter of an hour on two cores
    python benchmarks/dataset.py --small=2000 --large=100 --repeats=3   # a minute
    """
    if rival:
        return pillow_loop(*rival)
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        draw_images(folder / 'small', small, 64)
        draw_images(folder / 'few', small // 4, 64)
        draw_images(folder / 'large', large, 1024)
        print('| making             | images | workers | plain loop, s | dataset_tool.py, s | ratio |')
        print('|--------------------|--------|---------|---------------|--------------------|-------|')
        for name, count, task in [('small', small, '64x64'), ('large', large, '1024x1024 to 64x64')]:
            for processes in sorted({1, workers}):
                loop, tool, ratio = pairs(folder, folder / name, processes, repeats)
                print(f'| {task:<18} | {count:>6} | {processes:>7} | {loop:>13.2f} | {tool:>18.2f} | {ratio:>5.2f} |')
        few, many = (peak_memory(options(folder, folder / name, workers)) for name in ('few', 'small'))
        growth = (many - few) * 1024**2 / (small - small // 4)
        print(f'\nPeak memory: {few:.1f} MiB for {small // 4} images, {many:.1f} MiB for {small}; each image more')
        print(f'takes {growth:.0f} bytes (its name, label and line in the archive), and has {64 * 64 * 3} of pixels.\n')
        print('| reading 64x64, one process          | items/s | ratio |')
        print('|-------------------------------------|---------|-------|')
        speeds = reading(folder / 'tool.zip', small)
        for way, speed in speeds.items():
            print(f'| {way:<35} | {speed:>7.0f} | {speed / speeds["Pillow, per item"]:>5.2f} |')


if __name__ == '__main__':
    main()
