"""The files of a dataset: what a folder or zip archive holds, its images, and the labels in `dataset.json`."""

import functools
import io
import mmap
import os
import posixpath
import stat
import struct
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import PIL.Image

from dnnlib import plain_json
from dnnlib.npz import is_out_of_proportion
from dnnlib.util import one_line, printable

# What zipfile and Pillow raise on damaged bytes: they have no common base class.
DAMAGED = (
    *(OSError, EOFError, SyntaxError, ValueError, RuntimeError, struct.error, zlib.error),
    *(zipfile.BadZipFile, PIL.Image.DecompressionBombError),
)

# Pillow recognizes a format by its content, whatever the name, and would start Ghostscript for PostScript. Only formats
# of photographs and drawings that Pillow decodes by itself are opened.
FORMATS = 'PNG JPEG WEBP AVIF JPEG2000 TIFF BMP DIB GIF PPM TGA PCX SGI ICO PSD QOI'

# Kinds of pictures that people have and Pillow alone does not read: said to be left out, by name.
UNREAD = {'.heic', '.heif', '.jxl', '.svg', '.cr2', '.cr3', '.nef', '.arw', '.dng', '.raf', '.orf', '.rw2', '.avif'}

HIDDEN = ('__MACOSX', '@eaDir')  # what other programs leave behind, as are names that begin with a dot

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

    def read_json(self, name: str) -> bytes:
        """Like `read`; refuses what is small in the archive and large outside."""
        if self._is_zip:
            entry = self._open_zip()[0].getinfo(name)
            if is_out_of_proportion(entry, os.path.getsize(self.path), free=16 << 20):
                raise ValueError('it is compressed out of proportion')
        return self.read(name)

    def image_names(self) -> list[str]:
        """The files that Pillow knows by their extension, sorted, but hidden ones; IOError if there are none."""
        images = sorted(name for name in self.names if extension(name) in extensions() and not is_hidden(name))
        if not images:
            inside = ', '.join(sorted({'images.zip', 'images.npz'} & self.names))
            raise OSError(f'{self.path}: no images found' + (f'; it holds {inside}: give that file' if inside else ''))
        return images

    def unread(self) -> Counter[str]:
        """How many pictures there are of kinds that cannot be read, by extension."""
        found = (extension(name) for name in self.names if not is_hidden(name))
        return Counter(each for each in found if each in UNREAD - extensions())

    def labels(self) -> dict[str, int | list[float]] | None:
        """{image: label} from dataset.json, for every image; None without that file, or if it has none.

        Names count as the same if they differ in `\\`, `./` or Unicode's form only. The file is at the root or, if all
        images lie below one folder, in that.

        Raises:
            OSError: labels are bad, contradict one another, or are for some of the images only.
        """
        top = {name.split('/')[0] for name in self.image_names()}
        below = f'{top.pop()}/' if len(top) == 1 else ''
        prefix = '' if 'dataset.json' in self.names else below
        if f'{prefix}dataset.json' not in self.names:
            return None
        try:
            content = plain_json.parse(self.read_json(f'{prefix}dataset.json'))
            if not isinstance(content, dict) or 'labels' not in content:
                raise ValueError('it has no entry "labels"')
            if not content['labels']:
                return None
            labels = self._by_image(content['labels'], prefix)
            label_array(list(labels.values()))
        except (*DAMAGED, TypeError, AttributeError) as err:
            raise OSError(f'{self.path}: bad labels in dataset.json: {one_line(err, 300)}') from err
        return labels

    def _by_image(self, labels: Iterable[tuple[str, Any]], prefix: str) -> dict[str, Any]:
        """The labels under the names that the images have here; other files may have some as well."""
        images = self.image_names()
        spelled = {normal(name): name for name in images}
        found: dict[str, Any] = {}
        for given, label in labels:
            name = spelled.get(normal(prefix + given), given)
            if found.setdefault(name, label) != label:
                labels_text = f'{one_line(found[name], 50)} and {one_line(label, 50)}'
                raise ValueError(f'{one_line(given, 100)} has two labels, {labels_text}')
        missing = [name for name in images if name not in found]
        if missing:
            named = one_line(next(iter(found), 'no image'), 100)
            spelling = '' if found.keys() & set(images) else f'; it names {named}'
            more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
            raise ValueError(f'it has no label for {one_line(missing[0], 100)}{more}{spelling}')
        return found

    def state(self) -> list[tuple[str, int, int]]:
        """(name, bytes, time of the last change) of every file: what changes with the content."""
        paths = [self.path] if self._is_zip else [os.path.join(self.path, name) for name in sorted(self.names)]
        return [(os.path.relpath(path, self.path), *_size_and_time(path)) for path in paths]

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
            except DAMAGED as err:
                raise OSError(f'{self.path}: not a zip archive: {one_line(err, 200)}') from err
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
            image = PIL.Image.open(io.BytesIO(data), formats=formats())
            image.load()
        except PIL.UnidentifiedImageError:
            raise ValueError('it is not an image, or of a format that is not supported') from None
        except (*DAMAGED, MemoryError):
            raise
        except Exception as err:  # Pillow's plugins trip over damaged files in any way
            raise ValueError(f'it is damaged ({type(err).__name__})') from None
    return image


def gray_or_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in mode L or RGB: what shows the same colours in one of them is converted.

    Black and white, CMYK, YCbCr, palettes, and opaque alpha.

    Raises:
        ValueError: transparent pixels, or pixels of another kind, such as LAB or of 16 bits.
    """
    modes = {'1': 'L', 'L': 'L', 'LA': 'L', 'P': 'RGB', 'PA': 'RGB', 'RGBA': 'RGB'}
    modes |= dict.fromkeys(('RGB', 'CMYK', 'YCbCr'), 'RGB')
    if image.mode not in modes:
        raise ValueError(f'pixels are {image.mode}, not 8-bit grayscale or RGB')
    if image.has_transparency_data and image.convert('RGBA').getchannel('A').getextrema() != (255, 255):
        raise ValueError('it has transparent pixels')
    return image if image.mode == modes[image.mode] else image.convert(modes[image.mode])


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] → [1 or C, H, W], a view."""
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def label_array(labels: list[Any]) -> np.ndarray:
    """Class numbers as int64 [N], lists of numbers as float32 [N,K]; ValueError for anything else."""
    array = np.array(labels, dtype=np.float64)
    if array.ndim == 2 and array.shape[1] and (np.abs(array) <= np.finfo(np.float32).max).all():
        return array.astype(np.float32)
    if array.ndim != 1 or not ((array >= 0) & (array < 2**31) & (array == np.round(array))).all():
        raise ValueError(
            'labels are class numbers 0, 1, 2, … or lists of numbers that float32 holds, all of one length'
        )
    return array.astype(np.int64)


@functools.cache
def extensions() -> frozenset[str]:
    """Of the files that Pillow knows; its tables take a tenth of a second to fill."""
    PIL.Image.init()
    return frozenset(PIL.Image.EXTENSION)


@functools.cache
def formats() -> list[str]:
    """Those of `FORMATS` that this Pillow has: one may lack some."""
    PIL.Image.init()
    return [name for name in FORMATS.split() if name in PIL.Image.OPEN]


def extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it is in, is not meant to be seen: also our own .tmp_… files."""
    return any(part in HIDDEN or (part.startswith('.') and part not in ('.', '..')) for part in name.split('/'))


def normal(name: str) -> str:
    """A name in one spelling of those that mean the same file: folders by '/', no './', composed letters."""
    return unicodedata.normalize('NFC', posixpath.normpath(name.replace('\\', '/')))


def _walk(root: str) -> Iterator[str]:
    """All files below a folder, linked folders included, each folder once.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(err: OSError) -> None:
        raise OSError(f'{root}: cannot read the folder {printable(err.filename)}: {err.strerror}') from err

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        subfolders.sort()
        if os.path.realpath(folder) in seen:  # a link back up, or a second one to the same
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        relative = os.path.relpath(folder, root).replace(os.sep, '/')
        yield from names if relative == '.' else (f'{relative}/{name}' for name in names)


def _size_and_time(path: str) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_size, info.st_mtime_ns


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f'{size} bytes are more than an image file has (at most {MAX_BYTES})')
