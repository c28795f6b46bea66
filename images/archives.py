"""All images of a run in one file, in the order of its seeds: a dataset zip, or an .npz as evaluation scripts read it.

Until all images are there, they lie as PNG files in a folder beside it, FILE.partial. So a run that is killed loses
nothing, and the file is the same as without the kill.
"""

import abc
import functools
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

import dnnlib
from dnnlib import plain_json
from images import files, tree
from images.write import file_name


class Archive(abc.ABC):
    """What zip and npz share. A file that is there counts as much as the PNG files do, so it can grow by more seeds."""

    def __init__(self, path: str):
        self.path = path
        self.parts = files.PngFolder(f'{path}.partial', subdirs=True)

    @functools.cached_property
    def seeds(self) -> list[int]:
        """Of the images in the file, in their order; none before it is there."""
        if not os.path.exists(self.path):
            return []
        with files.damaged(self.path):
            return self._read_seeds()

    @functools.cached_property
    def _rows(self) -> dict[int, int]:
        return {seed: row for row, seed in enumerate(self.seeds)}

    def paths(self, seeds: Sequence[int]) -> set[str]:
        return {self.path} | self.parts.paths(seeds)

    def finished(self, seeds: Sequence[int]) -> set[int]:
        """Those of the seeds whose image is there.

        Raises:
            ValueError: the file holds images of other seeds, which would be lost.
        """
        lost = self._rows.keys() - set(seeds)
        if lost:
            raise ValueError(
                f'{self.path} holds {len(lost)} images that --seeds leaves out, such as that of seed {min(lost)}; name '
                'those seeds as well, choose another --outdir, or start anew with --overwrite'
            )
        return self._rows.keys() & set(seeds) | self.parts.finished(seeds)

    def write(self, seed: int, image: np.ndarray) -> None:
        self.parts.write(seed, image)

    def read(self, seed: int) -> np.ndarray:
        """uint8 [H, W, 1 or 3]"""
        if seed not in self._rows:
            return self.parts.read(seed)
        with files.damaged(self.path):
            return self._read_row(self._rows[seed])

    def assemble(self, seeds: Sequence[int], classes: Sequence[int] | None) -> None:
        """Make the file of all images, which must be there, and delete the parts. `classes`: one for each seed."""
        if self.seeds != list(seeds):
            self.finished(seeds)  # another run may have written the file meanwhile
            with dnnlib.util.atomic_write(self.path) as file:
                self._write_all(file, seeds, classes)
                for name in ('seeds', '_rows', '_array', '_tree'):  # of the file that goes
                    self.__dict__.pop(name, None)
        files.delete(self.parts.path(seed) for seed in self.parts.finished(seeds))

    @abc.abstractmethod
    def _read_seeds(self) -> list[int]: ...

    @abc.abstractmethod
    def _read_row(self, row: int) -> np.ndarray: ...

    @abc.abstractmethod
    def _write_all(self, file: BinaryIO, seeds: Sequence[int], classes: Sequence[int] | None) -> None: ...


class ZipArchive(Archive):
    """A dataset as dataset_tool.py makes it: stored PNG files 00000/img00000000.png and so on, and `dataset.json`.

    `labels` in there are the classes, or null; `seeds`, which readers of datasets pass over, is ours.
    """

    @functools.cached_property
    def _tree(self) -> tree.FileTree:
        """Opened once: it takes as long as there are images."""
        return tree.FileTree(self.path)

    def _read_seeds(self) -> list[int]:
        seeds = plain_json.parse(self._tree.read_json('dataset.json'))['seeds']
        if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise ValueError('its seeds are not whole numbers')
        return seeds

    def _read_row(self, row: int) -> np.ndarray:
        return files.decode_png(self._read_png(row))

    def _read_png(self, row: int) -> bytes:
        return self._tree.read(file_name(row))

    def _write_all(self, file: BinaryIO, seeds: Sequence[int], classes: Sequence[int] | None) -> None:
        names = [file_name(row) for row in range(len(seeds))]
        labels = None if classes is None else list(zip(names, classes, strict=True))
        with zipfile.ZipFile(file, 'w') as archive:
            for name, seed in zip(names, seeds, strict=True):
                held = seed in self._rows
                archive.writestr(
                    dnnlib.util.zip_entry(name),
                    self._read_png(self._rows[seed]) if held else self.parts.read_bytes(seed),
                )
            archive.writestr(
                dnnlib.util.zip_entry('dataset.json'), json.dumps({'labels': labels, 'seeds': list(seeds)})
            )


class NpzArchive(Archive):
    """`arr_0`: images, uint8 [N, H, W, C]; `labels`: classes, int64 [N], if there are any; `seeds`: int64 [N]."""

    def _read_seeds(self) -> list[int]:
        with zipfile.ZipFile(self.path) as archive:
            (count,), start = npy_header(archive, 'seeds.npy', '<i8', rank=1)
            numbers = archive.read('seeds.npy')[start:]
        seeds = np.frombuffer(numbers, dtype='<i8').tolist()
        if count != len(self._array) or min(seeds, default=0) < 0:
            raise ValueError(f'{count} seeds for {len(self._array)} images')
        return seeds

    def _read_row(self, row: int) -> np.ndarray:
        return np.array(self._array[row])

    @functools.cached_property
    def _array(self) -> np.ndarray:
        """`arr_0`, mapped as it lies in the file, or in memory if another program has compressed the file."""
        with zipfile.ZipFile(self.path) as archive:
            shape, start = npy_header(archive, 'arr_0.npy', '|u1', rank=4)
            entry = archive.getinfo('arr_0.npy')
            if entry.compress_type != zipfile.ZIP_STORED:
                return np.frombuffer(archive.read(entry), dtype=np.uint8, offset=start).reshape(shape)
        with open(self.path, 'rb') as file:
            file.seek(entry.header_offset)
            local = file.read(30)  # of these the last four are the lengths of name and extra field, which follow
            name, extra = struct.unpack('<HH', local[26:])
            if local[:4] != b'PK\3\4' or file.read(name) != b'arr_0.npy':
                raise ValueError('its directory does not say where arr_0.npy is')
        data = entry.header_offset + 30 + name + extra
        if data + entry.file_size > os.path.getsize(self.path):
            raise ValueError('arr_0.npy ends beyond the file')
        return np.memmap(self.path, np.uint8, 'r', data + start, shape)

    def _write_all(self, file: BinaryIO, seeds: Sequence[int], classes: Sequence[int] | None) -> None:
        shape = (len(seeds), *self.read(seeds[0]).shape)
        with zipfile.ZipFile(file, 'w') as archive:
            with archive.open(dnnlib.util.zip_entry('arr_0.npy'), 'w', force_zip64=True) as entry:
                header: dict[str, Any] = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
                np.lib.format.write_array_header_1_0(entry, header)
                for seed in seeds:
                    entry.write(self.read(seed).tobytes())
            for name, numbers in [('labels', classes), ('seeds', seeds)]:
                if numbers is not None:
                    with archive.open(dnnlib.util.zip_entry(f'{name}.npy'), 'w', force_zip64=True) as entry:
                        np.lib.format.write_array(entry, np.array(numbers, dtype=np.int64))


def npy_header(archive: zipfile.ZipFile, name: str, descr: str, rank: int) -> tuple[tuple[int, ...], int]:
    """The shape of an array in an .npz, and where in its entry the numbers begin.

    Nothing but what generate.py writes is accepted: what is mapped into memory must not pass for anything else, such as
    pointers to objects.

    Raises:
        ValueError: another type of numbers, rank, order or size.
    """
    entry = archive.getinfo(name)
    if entry.flag_bits & 1:
        raise ValueError(f'{name} is encrypted')
    with archive.open(entry) as file:
        start = file.read(10)
        length = int.from_bytes(start[8:10], 'little')
        if start[:8] != b'\x93NUMPY\1\0' or length > 1000:
            raise ValueError(f'{name} is no array of version 1.0')
        text = file.read(length).decode('ascii')
    number = re.fullmatch(r"\{'descr': '(.{1,5})', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \}\s*", text)
    if number is None or number[1] != descr:
        raise ValueError(f'{name} does not hold rows of {descr}')
    shape = tuple(int(size) for size in number[2].split(',') if size.strip())
    numbers = math.prod(shape) * np.dtype(descr).itemsize
    if len(shape) != rank or (rank == 4 and shape[3] not in (1, 3)) or 10 + length + numbers != entry.file_size:
        raise ValueError(f'{name} has the shape {shape} and {entry.file_size} bytes')
    return shape, 10 + length
