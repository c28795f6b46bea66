"""images/pictures.py: where each image lies in a picture of many."""

import numpy as np
import PIL.Image
import pytest

from images import pictures


def numbered(*shape):
    """Images of one pixel, 0, 1, 2, …"""
    return np.arange(np.prod(shape), dtype=np.uint8).reshape(*shape, 1, 1, 1)


def test_tiles_run_row_by_row_and_end_in_white():
    assert pictures.tile(numbered(5), columns=3)[:, :, 0].tolist() == [[0, 1, 2], [3, 4, 255]]


@pytest.mark.parametrize(
    ('count', 'shape'),
    [(1, (1, 1)), (3, (2, 2)), (7, (3, 3)), (8, (2, 4)), (40, (5, 8)), (64, (8, 8)), (100, (10, 10))],
)
def test_grids_are_nearly_square(count, shape):
    assert pictures.grid(numbered(count)).shape == (*shape, 1)


def test_contact_sheet_puts_grids_side_by_side():
    sheet = pictures.contact_sheet([numbered(3)] * 2, gap=1)
    assert sheet[:, :, 0].tolist() == [[0, 1, 255, 0, 1], [2, 255, 255, 2, 255]]


def test_strip_has_a_row_for_each_image_and_both_ends_of_the_path():
    """Seven frames of two images: frame t shows 2t and 2t + 1; frames 0, 2, 4, 6 are chosen."""
    strip = pictures.strip(numbered(7, 2), columns=4)
    assert strip.shape == (2 * 64, 4 * 64, 1)
    assert strip[::64, ::64, 0].tolist() == [[0, 4, 8, 12], [1, 5, 9, 13]]
    assert pictures.strip(numbered(3, 2), columns=4)[::64, ::64, 0].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_small_images_are_enlarged_by_whole_factors():
    assert pictures.enlarge(numbered(2))[:, :, :, 0].tolist() == [[[i] * 64] * 64 for i in (0, 1)]
    assert pictures.enlarge(np.zeros([1, 48, 48, 3], np.uint8)).shape == (1, 96, 96, 3)
    assert pictures.enlarge(np.zeros([1, 64, 64, 3], np.uint8)).shape == (1, 64, 64, 3)


def test_gif_shows_every_frame_and_rests_on_the_last(tmp_path):
    pictures.save_gif(numbered(5, 2), tmp_path / 'film.gif')
    with PIL.Image.open(tmp_path / 'film.gif') as film:
        assert (film.n_frames, film.size, film.info['loop']) == (5, (128, 64), 0)
        seen = []
        for frame in range(5):
            film.seek(frame)
            pixels = np.array(film.convert('L'))
            seen.append((pixels[0, 0], pixels[0, 64], film.info['duration']))
    assert seen == [(2 * t, 2 * t + 1, pictures.LAST_FRAME_MS if t == 4 else pictures.FRAME_MS) for t in range(5)]


def test_colours_of_a_gif_are_close(tmp_path):
    frames = np.zeros([2, 1, 64, 64, 3], np.uint8)
    frames[1, 0, :, :, 0] = 200
    pictures.save_gif(frames, tmp_path / 'film.gif')
    with PIL.Image.open(tmp_path / 'film.gif') as film:
        film.seek(1)
        assert np.abs(np.array(film.convert('RGB')).astype(int) - frames[1, 0]).max() <= 8
