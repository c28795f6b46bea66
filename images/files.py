"""PNG files, one per seed: their names, writing them whole and in the background, reading them back."""

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import PIL.Image

import dnnlib
from images import pictures
from images.tree import DAMAGED

WRITERS = 4  # threads that encode and write PNG files; docs/generation.md has what they save

# What generate.py writes into a folder, and what is left of it by a kill. Nothing else is ever deleted.
_FILE = re.compile(r'\d{6,}\.png|images\.(zip|npz)')
_LEFT_OVER = re.compile(r'\.tmp_[0-9a-f]{32}_(\d{6,}\.png|images\.(zip|npz)|generate\.json)')
_FOLDER = re.compile(r'\d{3,}000|images\.(zip|npz)\.partial')


def image_path(outdir: str, seed: int, subdirs: bool) -> str:
    """outdir/000123.png, with `subdirs` outdir/000000/000123.png: a folder for each thousand seeds."""
    folder = os.path.join(outdir, f'{seed - seed % 1000:06d}') if subdirs else outdir
    return os.path.join(folder, f'{seed:06d}.png')


def decode_png(data: bytes) -> np.ndarray:
    """uint8 [H, W, 1 or 3]. Raises what `damaged` turns into an OSError."""
    with PIL.Image.open(io.BytesIO(data), formats=['PNG']) as image:
        pixels = np.array(image)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


class PngFolder:
    """folder/000123.png and so on. Methods may be called from any thread, and from several processes."""

    def __init__(self, folder: str, subdirs: bool):
        self.folder = folder
        self._subdirs = subdirs

    def path(self, seed: int) -> str:
        return image_path(self.folder, seed, self._subdirs)

    def paths(self, seeds: Iterable[int]) -> set[str]:
        return {self.path(seed) for seed in seeds}

    def finished(self, seeds: Iterable[int]) -> set[int]:
        """Those of the seeds whose file is there."""
        listing = functools.cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
        parts = ((seed, *os.path.split(self.path(seed))) for seed in seeds)
        return {seed for seed, folder, name in parts if name in listing(folder)}

    def write(self, seed: int, image: np.ndarray) -> None:
        path = self.path(seed)
        with dnnlib.util.explain_failed_write(path):
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        pictures.save_png(image, path)

    def read_bytes(self, seed: int) -> bytes:
        with open(self.path(seed), 'rb') as file:
            return file.read()

    def read(self, seed: int) -> np.ndarray:
        """uint8 [H, W, 1 or 3]; OSError for a damaged file."""
        with damaged(self.path(seed)):
            return decode_png(self.read_bytes(seed))


class Background:
    """Calls `write(seed, image)` in threads, for at most two batches at a time; its errors come out of later calls.

    PNG encoding and waiting for the disk happen beside sampling: both leave Python's lock to others.
    """

    def __init__(self, write: Callable[[int, np.ndarray], None]):
        self._write = write
        self._pool = ThreadPoolExecutor(WRITERS)
        self._jobs: list[Future] = []

    def add(self, seeds: Sequence[int], images: Sequence[np.ndarray]) -> None:
        before = self._jobs
        self._jobs = [self._pool.submit(self._write, seed, image) for seed, image in zip(seeds, images, strict=True)]
        _wait(before)

    def close(self) -> None:
        """Write what is left."""
        self._pool.shutdown()
        _wait(self._jobs)


def _wait(jobs: list[Future]) -> None:
    for job in jobs:
        job.result()


def own_files(folder: str) -> Iterator[str]:
    """The images and archives that generate.py has below `folder`, and what kills left half-written."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir(follow_symlinks=False) and _FOLDER.fullmatch(name):
                yield from own_files(entry.path)
            elif entry.is_file(follow_symlinks=False) and (_FILE.fullmatch(name) or _LEFT_OVER.fullmatch(name)):
                yield entry.path


def final_path(path: str) -> str:
    """What a file that was being written would have become; for any other file the path itself."""
    folder, name = os.path.split(path)
    match = _LEFT_OVER.fullmatch(name)
    return os.path.join(folder, match[1]) if match else path


def delete(paths: Iterable[str]) -> None:
    """Delete files, and the folders of ours that this empties."""
    folders = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        folders.add(os.path.dirname(path))
    while folders:
        folder = folders.pop()
        if _FOLDER.fullmatch(os.path.basename(folder)) and not os.listdir(folder):
            os.rmdir(folder)
            folders.add(os.path.dirname(folder))


# ----------------------------------------------------------------------------
# Errors.


@contextlib.contextmanager
def damaged(path: str | os.PathLike) -> Iterator[None]:
    """Around what reads a file of ours: whatever a damaged one raises becomes an OSError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (*DAMAGED, KeyError) as err:
        raise OSError(
            f'{path} is damaged ({dnnlib.util.one_line(err, 200)}); delete it, and the same command makes it again'
        ) from err
