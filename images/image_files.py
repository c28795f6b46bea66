"""The images of folders and archives as one sequence, each decoded when it is asked for."""

import hashlib
import os
from collections.abc import Iterable

import numpy as np

from dnnlib.util import one_line, printable
from images.archives import NpzArchive
from images.tree import DAMAGED, FileTree, channels_first, gray_or_rgb, open_image


class ImageFiles:
    """The images of folders (with subfolders), zip archives and generate.py's images.npz, in the order given.

    Within each by name; those of a folder that holds nothing but generate.py's archive are those of the archive. Gray
    images are repeated to three channels. An item is (position, uint8 [3, H, W], ''), or (position, None, what is
    wrong with it).

    Raises:
        OSError: a path is no such thing, or given twice.
    """

    def __init__(self, paths: Iterable[str]):
        paths = [archive_in(path) for path in paths]
        twice = next((path for i, path in enumerate(paths) if _same(path, paths[:i])), None)
        if twice is not None:
            raise OSError(f'{twice} is given twice; its images would count twice')
        self._trees = [NpzImages(path) if path.lower().endswith('.npz') else FileTree(path) for path in paths]
        self._names = [(tree, name) for tree in range(len(self._trees)) for name in self._trees[tree].image_names()]
        self._shape = next(
            (image.shape for _, image, _ in map(self._decode, range(len(self))) if image is not None), ()
        )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, position: int) -> tuple[int, np.ndarray | None, str]:
        _, image, problem = self._decode(position)
        if image is not None and image.shape != self._shape:
            problem = f'{printable(self.name(position))} has the shape {list(image.shape)}, others {list(self._shape)}'
        return position, None if problem else image, problem

    def name(self, position: int) -> str:
        tree, name = self._names[position]
        return os.path.join(self._trees[tree].path, name)

    def _decode(self, position: int) -> tuple[int, np.ndarray | None, str]:
        index, name = self._names[position]
        tree = self._trees[index]
        try:
            if isinstance(tree, NpzImages):
                pixels = tree.pixels(name)
            else:
                pixels = np.asarray(gray_or_rgb(open_image(tree.read(name))))
        except DAMAGED as err:
            name = printable(self.name(position))
            return position, None, f'cannot use {name}: {one_line(err, 200)} (dataset_tool.py says more)'
        image = channels_first(pixels)
        return position, np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:]))), ''


class NpzImages:
    """The images of an images.npz that generate.py wrote, by their seeds, as a `FileTree` has them by their names."""

    def __init__(self, path: str):
        self.path = path
        if not os.path.isfile(path):
            raise OSError(f'{path}: no such file')
        self._archive = NpzArchive(path)

    def image_names(self) -> list[str]:
        return [str(seed) for seed in self._archive.seeds]

    def pixels(self, name: str) -> np.ndarray:
        """uint8 [H, W, 1 or 3]"""
        return self._archive.read(int(name))

    def state(self) -> list[tuple[str, int, int]]:
        info = os.stat(self.path)
        return [(os.path.basename(self.path), info.st_size, info.st_mtime_ns)]


def archive_in(path: str) -> str:
    """The archive of a folder that generate.py filled with one; any other path as it is."""
    if not os.path.isdir(path):
        return path
    names = [name for name in os.listdir(path) if name not in ('generate.json',) and not name.startswith('.')]
    return os.path.join(path, names[0]) if names in (['images.npz'], ['images.zip']) else path


def content_state(paths: Iterable[str]) -> str:
    """A hash of the names, sizes and times of all files behind the paths: another one once they have changed.

    Raises:
        OSError: there are no images.
    """
    digest = hashlib.sha256()
    for path in map(archive_in, paths):
        tree = NpzImages(path) if path.lower().endswith('.npz') else FileTree(path)
        tree.image_names()
        digest.update(repr(tree.state()).encode(errors='surrogateescape'))
    return digest.hexdigest()[:16]


def _same(path: str, others: Iterable[str]) -> bool:
    return os.path.realpath(path) in map(os.path.realpath, others)


def holds_images(path: str) -> bool:
    """Whether a path names images, a folder or zip archive of them, and not statistics of images."""
    return os.path.isdir(path) or path.lower().endswith('.zip')
