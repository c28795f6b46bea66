"""Reading datasets: a zip or folder of images, with labels in `dataset.json`, as dataset_tool.py writes them."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import dnnlib
from dnnlib.util import one_line, printable
from images.tree import DAMAGED, FileTree, channels_first, gray_or_rgb, label_array, open_image

try:
    import pyspng
except ImportError:
    pyspng = None


class Dataset(torch.utils.data.Dataset):
    """Images with labels; an item is (uint8 image [C,H,W], float32 label [label_dim]).

    A subclass hands its shape to this constructor and provides two methods over the raw images 0…N−1:
    `_read_image(raw_idx)` → uint8 [C,H,W], and `_read_labels()` → int64 [N] (classes), float32 [N,K] (vectors) or None.
    What the user sees of them is decided here: the subset, the mirrored copies and the form of the labels.

    name         short name, goes into the names of training runs
    raw_shape    [N,C,H,W] of the raw images
    max_size     keep a random subset of this many raw images, in their order; None: all
    use_labels   False: labels have length 0
    xflip        append a copy of every image, mirrored left to right
    random_seed  chooses the subset
    cache        keep decoded images in memory, in each process
    """

    def __init__(
        self,
        name: str,
        raw_shape: Sequence[int],
        max_size: int | None = None,
        use_labels: bool = False,
        xflip: bool = False,
        random_seed: int = 0,
        cache: bool = False,
    ):
        super().__init__()
        self._name = name
        self._raw_shape = [int(n) for n in raw_shape]
        self._use_labels = use_labels
        self._labels: np.ndarray | None = None
        self._images: dict[int, np.ndarray] | None = {} if cache else None
        kept = choose_subset(self._raw_shape[0], max_size, random_seed)
        self._raw_idx = np.tile(kept, 2) if xflip else kept
        self._xflip = np.arange(len(self._raw_idx)) >= len(kept)

    def _read_image(self, raw_idx: int) -> np.ndarray:
        raise NotImplementedError

    def _read_labels(self) -> np.ndarray | None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # What goes to worker processes: they fill caches of their own.
        return {**self.__dict__, '_labels': None, '_images': None if self._images is None else {}}

    def __len__(self) -> int:
        return len(self._raw_idx)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        image = self._image(int(self._raw_idx[idx]))
        return (image[:, :, ::-1] if self._xflip[idx] else image).copy(), self.get_label(idx)

    def get_label(self, idx: int) -> np.ndarray:
        """Label of one item, float32 [label_dim]: one-hot for a class, else the vector itself (length 0: no labels)."""
        raw_label = self._raw_labels[self._raw_idx[idx]]
        if not self.has_onehot_labels:
            return raw_label.copy()
        onehot = np.zeros(self.label_shape, dtype=np.float32)
        onehot[raw_label] = 1
        return onehot

    def get_details(self, idx: int) -> dnnlib.EasyDict:
        """Where one item comes from: `raw_idx`, `xflip` (is it mirrored?) and `raw_label` (class number or vector)."""
        raw_idx = int(self._raw_idx[idx])
        raw_label = self._raw_labels[raw_idx].copy()
        return dnnlib.EasyDict(raw_idx=raw_idx, xflip=bool(self._xflip[idx]), raw_label=raw_label)

    @property
    def name(self) -> str:
        return self._name

    @property
    def image_shape(self) -> list[int]:
        """[C,H,W]"""
        return self._raw_shape[1:]

    @property
    def num_channels(self) -> int:
        return self.image_shape[0]

    @property
    def resolution(self) -> int:
        """Side of the images, which must be square."""
        _, height, width = self.image_shape
        assert height == width, f'{self._name}: images are {width}x{height}, not square'
        return height

    @property
    def label_shape(self) -> list[int]:
        """[largest class + 1], [length of the vectors], or [0] without labels; the same for every subset."""
        return [int(self._raw_labels.max()) + 1] if self.has_onehot_labels else list(self._raw_labels.shape[1:])

    @property
    def label_dim(self) -> int:
        (dim,) = self.label_shape
        return dim

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def has_onehot_labels(self) -> bool:
        return self._raw_labels.dtype == np.int64

    @property
    def _raw_labels(self) -> np.ndarray:
        if self._labels is None:
            labels = self._read_labels() if self._use_labels else None
            self._labels = np.zeros([self._raw_shape[0], 0], dtype=np.float32) if labels is None else labels
        return self._labels

    def _image(self, raw_idx: int) -> np.ndarray:
        if self._images is None:
            return self._read_image(raw_idx)
        if raw_idx not in self._images:
            self._images[raw_idx] = self._read_image(raw_idx)
        return self._images[raw_idx]


class ImageFolderDataset(Dataset):
    """The images of a folder (with its subfolders) or zip archive, in the order of their names.

    path         folder or .zip; labels come from `dataset.json` at its root, where there is one
    resolution   insist on this side length; None: whatever the first image has
    use_pyspng   decode PNG with pyspng where it is installed (the same pixels, faster)
    base         see `Dataset`

    Raises IOError for a path that is no dataset, a damaged or deviating image, or bad labels.
    """

    def __init__(self, path: str | os.PathLike, resolution: int | None = None, use_pyspng: bool = True, **base: Any):
        self._use_pyspng = use_pyspng
        self._files = FileTree(path)
        self._image_names = self._files.image_names()
        shape = self._decode(self._image_names[0]).shape
        if resolution is not None and shape[1:] != (resolution, resolution):
            raise OSError(f'{path}: images are {shape[2]}x{shape[1]}, not {resolution}x{resolution}')
        name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0]
        super().__init__(name, [len(self._image_names), *shape], **base)

    def _read_image(self, raw_idx: int) -> np.ndarray:
        name = self._image_names[raw_idx]
        image = self._decode(name)
        if list(image.shape) != self.image_shape:
            raise self._error(name, f'has shape {list(image.shape)}, the first image {self.image_shape}')
        return image

    def _read_labels(self) -> np.ndarray | None:
        labels = self._files.labels()
        return None if labels is None else label_array([labels[name] for name in self._image_names])

    def _decode(self, name: str) -> np.ndarray:
        """One image file as uint8 [C,H,W]."""
        try:
            data = self._files.read(name)
            fast = self._use_pyspng and pyspng is not None and name.lower().endswith('.png')
            image = pyspng.load(data) if fast else _with_pillow(data)
        except DAMAGED as err:
            raise OSError(f'{self._files.path}: cannot read {printable(name)}: {one_line(err, 200)}') from err
        if image.dtype != np.uint8:
            raise self._error(name, f'has {image.dtype} pixels, not uint8')
        channels = 1 if image.ndim == 2 else image.shape[2]
        if channels not in (1, 3):
            raise self._error(name, f'has {channels} channels, not 1 or 3; dataset_tool.py converts it')
        return channels_first(image)

    def _error(self, name: str, problem: str) -> OSError:
        return OSError(f'{self._files.path}: {printable(name)} {problem}')


def choose_subset(num_raw: int, max_size: int | None, seed: int) -> np.ndarray:
    """Indices of the raw images to keep, ascending; chosen as EDM does, so the same seed gives the same subset."""
    indices = np.arange(num_raw, dtype=np.int64)
    if max_size is None or max_size >= num_raw:
        return indices
    np.random.RandomState(seed % 2**31).shuffle(indices)
    return np.sort(indices[:max_size])


def _with_pillow(data: bytes) -> np.ndarray:
    return np.array(gray_or_rgb(open_image(data)))  # indices into a palette, say, would pass for gray levels
