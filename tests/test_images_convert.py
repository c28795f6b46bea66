"""Transforms and PNG: pixels against slices, Pillow's own resampling and Pillow's own reader."""

import io

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import lanczos, noise

from images import convert


def transform(name, image, *size):
    return np.asarray(convert.TRANSFORMS[name](PIL.Image.fromarray(image), *size))


def test_right_size_is_not_resampled():
    image = PIL.Image.fromarray(noise(8, 8))
    assert convert.resize(image, 8, 8) is image


def test_center_crop_takes_the_square_in_the_middle():
    image = noise(8, 13, 3)
    assert np.array_equal(transform('center-crop', image, 8, 8), image[:, 2:10])
    image = image.transpose(1, 0, 2)
    assert np.array_equal(transform('center-crop', image, 4, 4), lanczos(image[2:10], 4, 4))


def test_center_crop_turns_gray_into_rgb():
    image = noise(8, 8)
    assert np.array_equal(transform('center-crop', image, 8, 8), np.stack([image] * 3, axis=2))


def test_center_crop_wide_has_black_bars():
    image = noise(6, 8, 3) | 1
    result = transform('center-crop-wide', image, 8, 4)
    assert result.shape == (8, 8, 3)
    assert np.array_equal(result[2:6], lanczos(image, 8, 4))
    assert not result[:2].any()
    assert not result[6:].any()


def test_center_crop_wide_takes_the_rows_in_the_middle():
    image = noise(12, 16)
    result = transform('center-crop-wide', image, 8, 4)  # 8·12/16 = 6 rows
    assert np.array_equal(result[2:6, :, 0], lanczos(image[3:9], 8, 4))


@pytest.mark.parametrize(('height', 'width', 'kept'), [(6, 8, True), (6, 7, False), (3, 8, False), (6, 16, False)])
def test_center_crop_wide_skips_small_images(height, width, kept):
    image = PIL.Image.fromarray(noise(height, width))
    assert (convert.center_crop_wide(image, 8, 4) is not None) == kept


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(), (3,)]), st.integers(0, 2**32 - 1))
def test_png_is_what_pillow_reads(height, width, channels, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    data = convert.encode_png(image)
    decoded = PIL.Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(decoded), image)
    assert convert.kind_of_png(data) == (width, height, decoded.mode)
    assert convert.kind_of_png(data[:-1]) is None
    by_pillow = io.BytesIO()
    PIL.Image.fromarray(image).save(by_pillow, format='png', compress_level=0)
    assert abs(len(data) - len(by_pillow.getvalue())) <= 16
