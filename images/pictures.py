"""Pictures of many images, to look at: grids, sheets, strips, animations. All are uint8 arrays [H, W, C]."""

import math
import os
from collections.abc import Sequence

import numpy as np
import PIL.Image

import dnnlib

WHITE = 255
FRAME_MS = 100  # an animation shows a frame so long, and the last one
LAST_FRAME_MS = 1500
MIN_SIDE = 64  # strips and animations show smaller images enlarged


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Equal images [N, H, W, C] row by row, white after the last: [rows·H, columns·W, C]."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    cells = np.full([rows * columns, height, width, channels], WHITE, dtype=images.dtype)
    cells[:count] = images
    cells = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * height, columns * width, channels)


def grid(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] in a rectangle that is nearly a square, and full where one up to half wider is."""
    side = math.sqrt(len(images))
    widths = range(math.ceil(side), math.floor(1.5 * side) + 1)
    return tile(images, next((width for width in widths if len(images) % width == 0), math.ceil(side)))


def contact_sheet(groups: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Groups of images [N, H, W, C], each as a grid, side by side with a white gap."""
    grids = [grid(images) for images in groups]
    height, _, channels = grids[0].shape
    stripe = np.full([height, gap, channels], WHITE, dtype=np.uint8)
    pieces = [piece for each in grids for piece in (stripe, each)]
    return np.concatenate(pieces[1:], axis=1)


def strip(frames: np.ndarray, columns: int) -> np.ndarray:
    """Frames [T, N, H, W, C] of N images: a row for each image, in it `columns` frames at most, the ends among them."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), columns)).round().astype(int)
    rows = frames[chosen].swapaxes(0, 1)
    return tile(enlarge(rows.reshape(-1, *frames.shape[2:])), len(chosen))


def enlarge(images: np.ndarray, side: int = MIN_SIDE) -> np.ndarray:
    """Repeat pixels so often that images [N, H, W, C] are no smaller than `side`."""
    factor = max(math.ceil(side / max(images.shape[1:3])), 1)
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def save_gif(frames: np.ndarray, path: str | os.PathLike) -> None:
    """Animate frames [T, N, H, W, C] of N images in a grid, forever; the file appears whole or not at all.

    A GIF has 256 colours: gray levels are exact, others are not.
    """
    shown = [to_pil(grid(enlarge(images))) for images in frames]
    durations = [*[FRAME_MS] * (len(shown) - 1), LAST_FRAME_MS]
    with dnnlib.util.atomic_write(path) as file:
        shown[0].save(file, format='gif', save_all=True, append_images=shown[1:], duration=durations, loop=0)


def save_png(picture: np.ndarray, path: str | os.PathLike) -> None:
    """The file appears whole or not at all."""
    with dnnlib.util.atomic_write(path) as file:
        to_pil(picture).save(file, format='png')


def to_pil(picture: np.ndarray) -> PIL.Image.Image:
    """A picture of 1 or 3 channels."""
    return PIL.Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
