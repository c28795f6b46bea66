"""Arrays out of .npz and .npy files of others: numbers and texts. numpy evaluates headers, and inflates any size."""

import io
import math
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from .text import one_line

_HEADER = re.compile(
    r"\{'descr': '([<>|]?[fiub][1248]|[<>]U[0-9]{1,9})', 'fortran_order': (True|False), "
    r"'shape': \(([0-9L, ]*)\), \} *\n?"
)
_MAX_HEADER = 1000


def read(data: bytes, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the arrays that the .npz file has.

    Raises:
        ValueError: it is damaged, or compressed out of proportion, or the arrays are of another kind; in one line.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            there = set(archive.namelist())
            return {name: _member(archive, f'{name}.npy', len(data)) for name in names if f'{name}.npy' in there}
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, struct.error, OSError) as err:
        raise ValueError(f'the .npz file is damaged ({one_line(err, 100)})') from None


def _member(archive: zipfile.ZipFile, name: str, size: int) -> np.ndarray:
    entry = archive.getinfo(name)
    if is_out_of_proportion(entry, size):
        raise ValueError(f'{name} is compressed out of proportion, to {entry.compress_size} of {entry.file_size} bytes')
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'{name} is compressed in another way than numpy does')
    try:
        return array(archive.read(entry))
    except ValueError as err:
        raise ValueError(f'{name}: {err}') from None


def is_out_of_proportion(entry: zipfile.ZipInfo, size: int, free: int = 64 << 20) -> bool:
    """Whether a file in an archive of `size` bytes has more than `free` bytes, and 64 times what is stored of it."""
    return entry.file_size > free + 64 * min(entry.compress_size, size)


def array(content: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file; ValueError for one that is damaged, or not of numbers or text."""
    if content[:6] != b'\x93NUMPY' or content[6:8] not in (b'\1\0', b'\2\0', b'\3\0'):
        raise ValueError('this is no .npy file')
    start = 10 if content[6:8] == b'\1\0' else 12
    length = int.from_bytes(content[8:start], 'little')
    header = content[start : start + min(length, _MAX_HEADER)].decode('latin1')
    found = _HEADER.fullmatch(header)
    if found is None:
        raise ValueError('this is no array of numbers or text')
    dtype = np.dtype(found[1])
    shape = tuple(int(size) for size in re.findall('[0-9]+', found[3]))
    numbers = memoryview(content)[start + length :]
    if math.prod(shape) * dtype.itemsize != len(numbers) or len(shape) > 32:
        raise ValueError(f'it has the shape {one_line(shape, 100)} and {len(numbers)} bytes')
    if not len(numbers):
        return np.zeros(shape, dtype)
    if dtype.kind == 'U' and np.frombuffer(numbers, f'{dtype.byteorder}u4').max() > sys.maxunicode:
        raise ValueError('it holds text that is none')
    return np.frombuffer(numbers, dtype).reshape(shape, order='F' if found[2] == 'True' else 'C')
