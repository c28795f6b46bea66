"""The images of folders and zip archives as one sequence, each decoded when it is asked for."""

import os
from collections.abc import Iterable

import numpy as np

from training.file_tree import DAMAGED, FileTree, open_image


class ImageFiles:
    """The images of folders (with subfolders) and zip archives: in the order given, by name within each.

    An item is (position, uint8 [1 or 3, H, W], ''), or (position, None, what is wrong with it).
    """

    def __init__(self, paths: Iterable[str]):
        self._trees = [FileTree(path) for path in paths]
        self._names = [(tree, name) for tree in range(len(self._trees)) for name in self._trees[tree].image_names()]
        self._shape = next(
            (image.shape for _, image, _ in map(self._decode, range(len(self))) if image is not None), ()
        )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, position: int) -> tuple[int, np.ndarray | None, str]:
        _, image, problem = self._decode(position)
        if image is not None and image.shape != self._shape:
            problem = f'{self.name(position)} has the shape {list(image.shape)}, others {list(self._shape)}'
        return position, None if problem else image, problem

    def name(self, position: int) -> str:
        tree, name = self._names[position]
        return os.path.join(self._trees[tree].path, name)

    def _decode(self, position: int) -> tuple[int, np.ndarray | None, str]:
        tree, name = self._names[position]
        try:
            image = open_image(self._trees[tree].read(name))
            if image.mode not in ('L', 'RGB'):
                alpha = 'an alpha channel' if image.has_transparency_data else f'pixels of the kind {image.mode}'
                raise ValueError(f'it has {alpha}; 8-bit grayscale or RGB is needed (dataset_tool.py converts)')
            pixels = np.asarray(image)
        except DAMAGED as err:
            return position, None, f'cannot use {self.name(position)}: {err}'
        return position, pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), ''


def holds_images(path: str) -> bool:
    """Whether a path names images, a folder or zip archive of them, and not statistics of images."""
    return os.path.isdir(path) or path.lower().endswith('.zip')
