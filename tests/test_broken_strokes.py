"""The benchmark that counts broken digits, and tells from which noise level on a network breaks them."""

import numpy as np
import pytest
import torch

from benchmarks import broken_strokes
from benchmarks.digits_classifier import Digits

pytest.importorskip('scipy')


def picture(*rows):
    return np.array([[255 * (pixel == '#') for pixel in row] for row in rows], dtype=np.uint8)


def test_pieces_touch_at_corners():
    assert not broken_strokes.is_broken(picture('##...', '##...', '..##.', '..##.'))


def test_a_gap_breaks():
    assert broken_strokes.is_broken(picture('##...', '##...', '...##', '...##').repeat(1, 0))


def test_dust_does_not():
    assert not broken_strokes.is_broken(picture('##..#', '##...', '....#', '#....'))


def test_share():
    whole, broken = picture('####', '....', '....'), picture('####', '....', '####')
    assert broken_strokes.share_broken([whole, broken, whole, whole]) == 0.25


class TwoImages:
    """The exact denoiser of a white image and a black one of 2 × 2 pixels."""

    sigma_min, sigma_max = 0.0, float('inf')

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        return torch.tanh(x.mean([1, 2, 3], keepdim=True) * 4 / sigma.reshape(-1, 1, 1, 1) ** 2).expand_as(x)


def test_little_noise_leaves_an_image_and_much_noise_draws_another():
    white = torch.full([400, 1, 2, 2], 255, dtype=torch.uint8)
    digits = Digits(white, torch.zeros(400, dtype=torch.int64))
    little, much = (broken_strokes.resample(TwoImages(), digits, sigma, 24, 100) for sigma in (0.3, 40))
    assert little.shape == (400, 2, 2)
    assert little.dtype == np.uint8
    assert little.min() > 250
    # At σ = 40 little is known of which image it was: half end white, ± 4 standard errors of 0.025.
    assert abs((much.mean((1, 2)) > 127).mean() - 0.5) < 0.1
