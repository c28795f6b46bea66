"""All images of a run in one file, in the order of its seeds: a dataset zip, or an .npz as evaluation scripts read it.

Until all images are there, they lie as PNG files in a folder beside it, FILE.partial. So a run that is killed loses
nothing, and the file is the same as without the kill.
"""

import abc
import functools
import json
import os
import struct
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

import dnnlib
from images import files
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
            for name in ('seeds', '_rows', '_array'):
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

    def _read_seeds(self) -> list[int]:
        with zipfile.ZipFile(self.path) as archive:
            return json.loads(archive.read('dataset.json'))['seeds']

    def _read_row(self, row: int) -> np.ndarray:
        return files.decode_png(self._read_png(row))

    def _read_png(self, row: int) -> bytes:
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(file_name(row))

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
        with open(self.path, 'rb') as file, np.load(file, allow_pickle=False) as archive:
            return archive['seeds'].tolist()

    def _read_row(self, row: int) -> np.ndarray:
        return np.array(self._array[row])

    @functools.cached_property
    def _array(self) -> np.ndarray:
        """`arr_0` as it lies in the file, which numpy.load would read whole."""
        with zipfile.ZipFile(self.path) as archive, archive.open('arr_0.npy') as entry:
            np.lib.format.read_magic(entry)
            shape, _, dtype = np.lib.format.read_array_header_1_0(entry)
            start = archive.getinfo('arr_0.npy').header_offset
            header = entry.tell()
        with open(self.path, 'rb') as file:
            file.seek(start + 26)  # a local header has 30 bytes, then name and extra field, whose lengths are here
            name, extra = struct.unpack('<HH', file.read(4))
        return np.memmap(self.path, dtype, 'r', start + 30 + name + extra + header, shape)

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
