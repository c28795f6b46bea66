"""From a raw image to a PNG of a dataset, and the worker processes that do it.

Workers import no PyTorch, and get all they need as arguments, so any way of starting processes will do.
"""

import collections
import multiprocessing
import os
import signal
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import PIL.Image

from dnnlib.util import one_line
from images.tree import DAMAGED, gray_or_rgb, open_image

Item = TypeVar('Item')
Transform = Callable[[PIL.Image.Image, int, int], PIL.Image.Image | None]


class Kind(NamedTuple):
    width: int
    height: int
    mode: str  # Pillow's; L (grayscale) or RGB in a dataset

    def __str__(self) -> str:
        return f'{self.width}x{self.height} {"grayscale" if self.mode == "L" else self.mode}'


class Converted(NamedTuple):
    """What became of one raw image: a PNG, or, without `kind`, nothing, as it is broken or too small."""

    kind: Kind | None = None
    png: bytes = b''
    raw: Kind | None = None
    rotated: bool = False
    problem: str = ''


Raw = bytes | np.ndarray | Converted  # an image file, pixels, or what needs no conversion


def convert(raw: Raw, transform: Transform, size: tuple[int, int] | None, mode: str | None = None) -> Converted:
    """transform may leave an image out (None); size: (width, height); mode: L or RGB; None: as it is."""
    if isinstance(raw, Converted):
        return raw
    kind = None
    try:
        image = open_image(raw) if isinstance(raw, bytes) else PIL.Image.fromarray(raw)
        kind = Kind(*image.size, image.mode)
        rotated = is_rotated(image)
        result = transform(gray_or_rgb(image), *(size or image.size))
        if result is None:
            return Converted(raw=kind)
        result = result.convert(mode or result.mode)
        return Converted(Kind(*result.size, result.mode), encode_png(np.asarray(result)), kind, rotated)
    except DAMAGED as err:
        return Converted(raw=kind, problem=f'cannot be read: {one_line(err, 200)}')


def validate_image(raw: Raw) -> Converted:
    """What a dataset may hold; other modes, which `convert` can turn into these, are problems here."""
    result = convert(raw, resize, None)
    if result.raw is None or result.problem or result.raw.mode in PNG_MODES:
        return result
    return Converted(raw=result.raw, problem=f'pixels are {result.raw.mode}, not grayscale or RGB')


def is_rotated(image: PIL.Image.Image) -> bool:
    """Whether a camera noted that the picture is to be turned or mirrored."""
    orientation = 0x0112
    return 'exif' in image.info and image.getexif().get(orientation, 1) != 1


def resize(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """Stretch to width×height, whatever the aspect."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), PIL.Image.Resampling.LANCZOS)


def center_crop(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """The largest square in the middle, as RGB, resized to width×height."""
    w, h = image.size
    side = min(h, w)
    left, top = (w - side) // 2, (h - side) // 2
    return resize(image.crop((left, top, left + side, top + side)).convert('RGB'), width, height)


def center_crop_wide(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image | None:
    """The round(width·h/w) rows in the middle, as RGB, resized to width×height, in the middle of a black width×width.

    None if the image is narrower than width or those rows are fewer than height.
    """
    w, h = image.size
    rows = round(width * h / w)
    if w < width or rows < height:
        return None
    top, bar = (h - rows) // 2, (width - height) // 2
    canvas = PIL.Image.new('RGB', (width, width))
    canvas.paste(resize(image.crop((0, top, w, top + rows)).convert('RGB'), width, height), (0, bar))
    return canvas


TRANSFORMS: dict[str, Transform] = {
    'center-crop': center_crop,
    'center-crop-wide': center_crop_wide,
}


PNG_START, PNG_END = b'\x89PNG\r\n\x1a\n', b'\0\0\0\0IEND\xaeB`\x82'
PNG_MODES = {'L': 0, 'RGB': 2}


def encode_png(image: np.ndarray) -> bytes:
    """PNG of uint8 [H,W] or [H,W,3], without compression: the fastest to read.

    Pillow would need 7 times as long, as it tries all filters for each row, and its bytes may change with its version.
    """
    height, width = image.shape[:2]
    rows = np.zeros([height, 1 + image[0].size], dtype=np.uint8)  # each begins with the number of its filter, 0: none
    rows[:, 1:] = image.reshape(height, -1)
    header = struct.pack('>IIBBBBB', width, height, 8, PNG_MODES['L' if image.ndim == 2 else 'RGB'], 0, 0, 0)
    return PNG_START + png_chunk(b'IHDR', header) + png_chunk(b'IDAT', zlib.compress(rows.tobytes(), 0)) + PNG_END


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(data, zlib.crc32(name)))


def kind_of_png(data: bytes) -> Kind | None:
    """What `encode_png` made; None if the file is not complete."""
    if not data.startswith(PNG_START) or not data.endswith(PNG_END):
        return None
    width, height, _, color = struct.unpack_from('>IIBB', data, 16)
    return Kind(width, height, {color: mode for mode, color in PNG_MODES.items()}[color])


# Worker processes.


def in_order(
    function: Callable[[Raw], Converted], items: Iterable[tuple[Item, Raw]], workers: int
) -> Generator[tuple[Item, Converted], None, None]:
    """(item, function(raw)) for each (item, raw), in their order, computed in other processes if workers > 1.

    Only a few chunks are under way at any time, so memory does not grow with their number. Raises BrokenProcessPool if
    a worker is killed.
    """
    if workers == 1:
        yield from ((item, function(raw)) for item, raw in items)
        return
    pending: collections.deque[tuple[tuple[Item, ...], Future[list[Converted]]]] = collections.deque()
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        try:
            for chunk in chunks(items):
                keys, raws = zip(*chunk, strict=True)
                pending.append((keys, pool.submit(run_chunk, function, raws)))
                if len(pending) > 2 * workers:
                    yield from first_chunk(pending)
            while pending:
                yield from first_chunk(pending)
        finally:
            pool.shutdown(cancel_futures=True)


def first_chunk(
    pending: collections.deque[tuple[tuple[Item, ...], Future[list[Converted]]]],
) -> Iterator[tuple[Item, Converted]]:
    keys, future = pending.popleft()
    return zip(keys, future.result(), strict=True)


def run_chunk(function: Callable[[Raw], Converted], raws: tuple[Raw, ...]) -> list[Converted]:
    return [function(raw) for raw in raws]


def chunks(items: Iterable[tuple[Item, Raw]], max_items: int = 32, max_bytes: int = 1 << 20) -> Iterator[list]:
    """Lists of up to 32 items, fewer if they are large: a message to a process costs as much as a small image."""
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += sys.getsizeof(item[1])
        if len(chunk) >= max_items or size >= max_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
