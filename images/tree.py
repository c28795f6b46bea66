"""The files of a dataset: what a folder or zip archive holds, its images, and the labels in `dataset.json`."""

import io
import json
import mmap
import os
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image

PIL.Image.init()  # fills the tables of extensions and formats

# What zipfile and Pillow raise on damaged bytes: they have no common base class.
DAMAGED = (
    *(OSError, EOFError, SyntaxError, ValueError, RuntimeError, struct.error, zlib.error, MemoryError),
    *(zipfile.BadZipFile, PIL.Image.DecompressionBombError),
)

# Pillow recognizes a format by its content, whatever the name, and would start Ghostscript for PostScript. Only formats
# of photographs and drawings that Pillow decodes by itself are opened.
FORMATS = 'PNG JPEG WEBP AVIF JPEG2000 TIFF BMP DIB GIF PPM TGA PCX SGI ICO PSD QOI'
FORMATS_BUILT = [name for name in FORMATS.split() if name in PIL.Image.OPEN]  # a Pillow may lack some

MAX_BYTES = 1 << 30  # of one file: more than any image that Pillow agrees to decode


class FileTree:
    """The files of a folder or zip archive, by their paths relative to its root, with '/'. Can be pickled and forked.

    Raises IOError for a path that is neither; for the rest see the methods.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._archive: tuple[zipfile.ZipFile, mmap.mmap] | None = None
        self._archive_pid = 0
        self._is_zip = self.path.lower().endswith('.zip') and os.path.isfile(self.path)
        if not self._is_zip and not os.path.isdir(self.path):
            raise OSError(f'{self.path}: no such folder or .zip file')
        self.names = set(self._open_zip()[0].namelist() if self._is_zip else _walk(self.path))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_archive': None}

    def read(self, name: str) -> bytes:
        """Content of one file; raises one of `DAMAGED`."""
        if self._is_zip:
            return self._read_zip(name)
        path = os.path.join(self.path, name)
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError('it is not a regular file')  # reading a pipe would never end
        _check_size(info.st_size)
        with open(path, 'rb') as f:
            return f.read()

    def image_names(self) -> list[str]:
        """The files that Pillow knows by their extension, sorted; IOError if there are none."""
        images = sorted(n for n in self.names if os.path.splitext(n)[1].lower() in PIL.Image.EXTENSION)
        if not images:
            raise OSError(f'{self.path}: no images found')
        return images

    def labels(self) -> dict[str, int | list[float]] | None:
        """{file: label} from dataset.json; None without that file or with null labels; IOError if they are bad."""
        if 'dataset.json' not in self.names:
            return None
        try:
            content = json.loads(self.read('dataset.json'))
            if not isinstance(content, dict) or 'labels' not in content:
                raise ValueError('it has no entry "labels"')
            labels = content['labels']
            if labels is None:
                return None
            labels = dict(labels)
            label_array(list(labels.values()))
        except (*DAMAGED, TypeError) as err:
            raise OSError(f'{self.path}: bad labels in dataset.json: {err}') from err
        return labels

    def _read_zip(self, name: str) -> bytes:
        archive, content = self._open_zip()
        entry = archive.getinfo(name)
        _check_size(entry.file_size)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:  # compressed or encrypted
            return archive.read(name)
        # A stored file is a slice of the archive, taken in a fifth of the time that ZipFile needs.
        # Its local header has 30 bytes, then the name and an extra field, whose lengths are at 26.
        name_size, extra_size = struct.unpack_from('<HH', content, entry.header_offset + 26)
        start = entry.header_offset + 30 + name_size + extra_size
        data = content[start : start + entry.file_size]
        if zlib.crc32(data) != entry.CRC:
            raise zipfile.BadZipFile('Bad CRC-32')
        return data

    def _open_zip(self) -> tuple[zipfile.ZipFile, mmap.mmap]:
        # A forked process shares the file position with its parent, so each process opens its own handle.
        if self._archive is None or self._archive_pid != os.getpid():
            try:
                archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, NotImplementedError, struct.error) as err:
                raise OSError(f'{self.path}: not a zip archive: {err}') from err
            assert archive.fp is not None
            self._archive = archive, mmap.mmap(archive.fp.fileno(), 0, access=mmap.ACCESS_READ)
            self._archive_pid = os.getpid()
        return self._archive


def open_image(data: bytes) -> PIL.Image.Image:
    """The decoded image in the bytes of a file (the first of several); raises one of `DAMAGED`.

    At most Pillow's limit of 179 million pixels, beyond which an image is taken for a decompression bomb.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # large images, odd metadata: the pixels are what counts
        try:
            image = PIL.Image.open(io.BytesIO(data), formats=FORMATS_BUILT)
        except PIL.UnidentifiedImageError:
            raise ValueError('it is not an image, or of a format that is not supported') from None
        image.load()
    return image


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] → [1 or C, H, W], a view."""
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def label_array(labels: list[Any]) -> np.ndarray:
    """Class numbers as int64 [N], lists of numbers as float32 [N,K]; ValueError for anything else."""
    array = np.array(labels, dtype=np.float64)
    if array.ndim == 2 and np.isfinite(array).all():
        return array.astype(np.float32)
    if array.ndim != 1 or not ((array >= 0) & (array < 2**31) & (array == np.round(array))).all():
        raise ValueError('labels are class numbers 0, 1, 2, … or lists of finite numbers, all of one length')
    return array.astype(np.int64)


def _walk(root: str) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        relative = os.path.relpath(folder, root).replace(os.sep, '/')
        yield from names if relative == '.' else (f'{relative}/{name}' for name in names)


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f'{size} bytes are more than an image file has (at most {MAX_BYTES})')
