"""The benchmark that counts broken digits."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'benchmarks'))

import broken_strokes

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
