"""Pictures of many images, to look at a network."""

import math
from collections.abc import Sequence

import numpy as np

WHITE = 255


def contact_sheet(groups: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Groups of uint8 images [N, H, W, C] as grids, nearly square, side by side with a white gap: one [H', W', C]."""
    grids = [_grid(images) for images in groups]
    height, _, channels = grids[0].shape
    stripe = np.full([height, gap, channels], WHITE, dtype=np.uint8)
    pieces = [piece for grid in grids for piece in (stripe, grid)]
    return np.concatenate(pieces[1:], axis=1)


def _grid(images: np.ndarray) -> np.ndarray:
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full([rows * columns, height, width, channels], WHITE, dtype=np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, columns * width, channels)
