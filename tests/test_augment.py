"""training/augment.py: golden values, exact identities and every transform against an independent reckoning."""

import ast
import json
import pathlib

import numpy as np
import pytest
import torch

from training import augment
from training.augment import AugmentPipe

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'data' / 'edm_augment.json').read_text())
PIXEL = ['xflip', 'yflip', 'rotate_int', 'translate_int']
GEOMETRY = ['scale', 'rotate_frac', 'aniso', 'translate_frac']
COLOUR = ['brightness', 'contrast', 'lumaflip', 'hue', 'saturation']
TRAIN = ['xflip', 'yflip', *GEOMETRY]
ALL = PIXEL + GEOMETRY + COLOUR


def images_like(*shape):
    # In float64 before rounding: 0.37·j in float32 is off by 1e-4 where j is in the thousands.
    j = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (0.37 * j).sin().to(torch.float32).reshape(shape)


def augmented(images, names, seed=0, **options):
    torch.manual_seed(seed)
    return AugmentPipe(**dict.fromkeys(names, 1), **options)(images)


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def fix(monkeypatch, draw, *values):
    """Let Draws.normal or Draws.uniform return the same values for every sample."""

    def fixed(self, *lead):
        return torch.tensor(values).reshape(*lead, 1).expand(*lead, self.size).clone()

    monkeypatch.setattr(augment.Draws, draw, fixed)


@pytest.mark.parametrize('case', GOLDEN, ids=lambda case: case['name'])
def test_golden(case):
    torch.manual_seed(0)
    images, labels = AugmentPipe(**case['kwargs'])(images_like(4, 3, 16, 16))
    close(labels, torch.tensor(case['labels']), atol=1e-6)
    flat, expected = images.flatten(), case['image']
    close(flat[:6], torch.tensor(expected['first6']), atol=1e-5)
    close(flat[-6:], torch.tensor(expected['last6']), atol=1e-5)
    assert flat.mean().item() == pytest.approx(expected['mean'], abs=1e-6)
    assert flat.std().item() == pytest.approx(expected['std'], abs=1e-6)


@pytest.mark.parametrize(('names', 'width'), [([], 0), (['xflip'], 1), (TRAIN, 9), (ALL, 19)])
def test_label_width(names, width):
    images, labels = augmented(images_like(2, 3, 8, 8), names)
    assert images.shape == (2, 3, 8, 8)
    assert labels.shape == (2, width)
    assert labels.dtype == torch.float32


@pytest.mark.parametrize('shape', [(3, 3, 16, 16), (3, 1, 8, 8)])
def test_probability_zero_changes_nothing(shape):
    images = images_like(*shape)
    result, labels = augmented(images, ALL, p=0)
    assert not labels.any()
    close(result, images, atol=2e-6)
    assert torch.equal(augmented(images, PIXEL, p=0)[0], images)


def test_same_seed_same_result_and_input_untouched():
    images = images_like(3, 3, 16, 16)
    first, second = augmented(images, ALL, seed=7), augmented(images, ALL, seed=7)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(images, images_like(3, 3, 16, 16))


def test_gate_frequency():
    # 20000 samples kept with probability 2·0.15: five standard deviations are 0.0162.
    _, labels = augmented(torch.zeros(20000, 1, 1, 1), [], brightness=2, p=0.15)
    assert (labels != 0).float().mean().item() == pytest.approx(0.3, abs=0.0162)


@pytest.mark.parametrize('names', [PIXEL, TRAIN, ALL])
def test_a_sample_depends_on_no_other_image(names):
    images = images_like(4, 3, 16, 16)
    others = images.clone()
    others[1:] = images.flip(0)[1:] + 3
    close(augmented(others, names)[0][0], augmented(images, names)[0][0], atol=1e-6)


def test_a_moved_sample_does_not_depend_on_the_margin_of_the_batch():
    images = images_like(2, 3, 16, 16)
    eye = torch.eye(3).repeat(2, 1, 1)
    shifts = augment.translation(eye, torch.tensor([0.3, 7.0]), torch.tensor([-0.6, 7.0]))
    close(augment.warp(images, shifts)[:1], augment.warp(images[:1], shifts[:1]), atol=1e-5)


@pytest.mark.parametrize(('name', 'dim'), [('xflip', 3), ('yflip', 2)])
def test_flips(name, dim):
    images = images_like(16, 3, 8, 8)
    result, labels = augmented(images, [name])
    chosen = labels[:, 0] == 1
    assert 0 < chosen.sum() < 16
    assert torch.equal(result[chosen], images[chosen].flip(dim))
    assert torch.equal(result[~chosen], images[~chosen])


def test_rotate_int():
    images = images_like(16, 3, 8, 8)
    result, labels = augmented(images, ['rotate_int'])
    turns = [{(0, 0): 0, (1, 0): 1, (1, 1): 2, (0, 1): 3}[tuple(row)] for row in labels.int().tolist()]
    assert set(turns) == {0, 1, 2, 3}
    for actual, image, k in zip(result, images, turns, strict=True):
        assert torch.equal(actual, image.rot90(k, dims=(1, 2)))


def shifted(image, right, down):
    """Move [C, H, W] by whole pixels; what comes in is the image reflected at its edge."""
    height, width = image.shape[1:]
    padded = np.pad(image.numpy(), [(0, 0), (height - 1,) * 2, (width - 1,) * 2], mode='reflect')
    y, x = height - 1 - down, width - 1 - right
    return torch.from_numpy(padded[:, y : y + height, x : x + width])


def test_translate_int():
    images = images_like(8, 2, 12, 20)
    result, labels = augmented(images, ['translate_int'], translate_int_max=0.5)
    right, up = labels[:, 0] * 20 * 0.5, labels[:, 1] * 12 * 0.5
    close(right, right.round(), atol=1e-5)
    for actual, image, tx, ty in zip(result, images, right.round().int(), up.round().int(), strict=True):
        assert torch.equal(actual, shifted(image, int(tx), -int(ty)))


@pytest.mark.parametrize('size', [(16, 16), (12, 20)])
@pytest.mark.parametrize(('right', 'down'), [(3, 0), (0, -2), (-4, 5)])
def test_translate_frac_by_whole_pixels(monkeypatch, size, right, down):
    height, width = size
    images = images_like(2, 3, *size)
    fix(monkeypatch, 'normal', right / width / 0.125, down / height / 0.125)
    result, _ = augmented(images, ['translate_frac'])
    close(result[:, :, 5:-5, 5:-5], images.roll((right, down), (3, 2))[:, :, 5:-5, 5:-5], atol=2e-5)
    close(result, torch.stack([shifted(image, right, down) for image in images]), atol=2e-5)


@pytest.mark.parametrize(('half_turns', 'k'), [(1.0, 2), (0.5, 1), (-0.5, 3)])
def test_rotate_frac_by_right_angles(monkeypatch, half_turns, k):
    images = images_like(2, 3, 16, 16)
    fix(monkeypatch, 'uniform', half_turns)
    result, labels = augmented(images, ['rotate_frac'])
    expected = images.flip((2, 3)) if k == 2 else images.rot90(k, dims=(2, 3))
    # sym6 is not quite symmetric: turned round, its two passes shift the image by 0.1 pixels along each axis.
    close(result, expected, atol=0.06)
    angle = torch.tensor(half_turns * np.pi)
    close(labels, torch.stack([angle.cos() - 1, angle.sin()]).repeat(2, 1), atol=1e-6)


def ramp_slopes(name, **options):
    """Transform the plane x + 2y, which the wavelet keeps exactly → its increments (right, down) near the centre."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing='ij')
    result, labels = augmented((x + 2 * y)[None, None], [name], **options)
    centre = result[0, 0, 11:-11, 11:-11]
    return (centre.diff(dim=1).mean().item(), centre.diff(dim=0).mean().item()), labels


def test_scale_divides_the_slopes(monkeypatch):
    fix(monkeypatch, 'normal', 1.0)
    assert ramp_slopes('scale', scale_std=1)[0] == pytest.approx((0.5, 1), abs=1e-4)


def test_rotate_frac_turns_the_gradient(monkeypatch):
    fix(monkeypatch, 'uniform', 0.1)
    cos, sin = np.cos(0.1 * np.pi), np.sin(0.1 * np.pi)
    assert ramp_slopes('rotate_frac')[0] == pytest.approx((cos + 2 * sin, 2 * cos - sin), abs=1e-4)


@pytest.mark.parametrize(('half_turns', 'label'), [(0.0, (1, 0)), (0.5, (0, 1))])
def test_aniso_stretches_one_axis_and_shrinks_the_other(monkeypatch, half_turns, label):
    fix(monkeypatch, 'normal', 1.0)
    fix(monkeypatch, 'uniform', half_turns)
    slopes, labels = ramp_slopes('aniso', aniso_std=0.5, aniso_rotate_prob=1)
    factor = 2**0.5 if label[1] else 2**-0.5
    assert slopes == pytest.approx((factor, 2 / factor), abs=1e-4)
    close(labels, torch.tensor([label], dtype=torch.float32), atol=1e-6)


def test_colour_formulas():
    images = images_like(8, 3, 4, 4)
    grey = images.mean(dim=1, keepdim=True)

    def run(name):
        result, labels = augmented(images, [name])
        return result, labels[:, :1, None, None]

    result, w = run('brightness')
    close(result, images + 0.2 * w, atol=1e-6)
    result, w = run('contrast')
    close(result, images * 2 ** (0.5 * w), atol=1e-5)
    result, w = run('saturation')
    close(result, grey + (images - grey) * 2**w, atol=1e-5)
    result, w = run('lumaflip')
    assert 0 < w.sum() < 8
    close(result, images - 2 * w * grey, atol=1e-6)


@pytest.mark.parametrize(('half_turns', 'shift'), [(2 / 3, 1), (-2 / 3, 2), (0.0, 0)])
def test_hue_by_a_third_of_a_turn_permutes_the_channels(monkeypatch, half_turns, shift):
    images = images_like(2, 3, 4, 4)
    fix(monkeypatch, 'uniform', half_turns)
    close(augmented(images, ['hue'])[0], images.roll(shift, dims=1), atol=1e-6)


@pytest.mark.parametrize('names', [COLOUR, ALL])
def test_grey_image_is_the_mean_of_its_rgb_version(names):
    images = images_like(4, 1, 8, 8)
    grey, grey_labels = augmented(images, names)
    rgb, rgb_labels = augmented(images.repeat(1, 3, 1, 1), names)
    close(grey, rgb.mean(dim=1, keepdim=True), atol=1e-5)
    assert torch.equal(grey_labels, rgb_labels)


@pytest.mark.parametrize(('dtype', 'atol'), [(torch.float64, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_dtypes(dtype, atol):
    images = images_like(4, 3, 8, 8)
    result, labels = augmented(images.to(dtype), ALL)
    expected, expected_labels = augmented(images, ALL)
    assert result.dtype == dtype
    assert torch.equal(labels, expected_labels)
    close(result.float(), expected, atol=atol)


@pytest.mark.parametrize('channels', [2, 4])
def test_other_channel_counts(channels):
    images = images_like(2, channels, 8, 8)
    assert augmented(images, PIXEL + GEOMETRY)[0].shape == images.shape
    with pytest.raises(ValueError, match=f'contrast, hue: needs images of 1 or 3 channels, got {channels}'):
        augmented(images, ['contrast', 'hue'])


def test_errors():
    with pytest.raises(ValueError, match=r'floating dtype, got torch\.uint8'):
        augmented(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TRAIN)
    with pytest.raises(ValueError, match=r'\[N, C, H, W\]'):
        augmented(torch.zeros(3, 8, 8), TRAIN)
    with pytest.raises(ValueError, match='square images, got 8×9'):
        augmented(torch.zeros(1, 3, 8, 9), ['rotate_int'])
    with pytest.raises(ValueError, match='translate_int_max=0 must be above 0'):
        AugmentPipe(translate_int=1, translate_int_max=0)


def test_wavelet_is_orthonormal_to_its_even_shifts():
    h = np.array(augment.wavelets['sym6'])
    assert h.sum() == pytest.approx(2**0.5, abs=1e-9)
    products = [h[shift:] @ h[: len(h) - shift] for shift in range(0, len(h), 2)]
    np.testing.assert_allclose(products, [1, 0, 0, 0, 0, 0], atol=1e-9)


def test_source_stands_alone():
    # The file travels inside network pickles and has to run in any EDM checkout.
    tree = ast.parse(pathlib.Path(augment.__file__).read_text())
    nodes = list(ast.walk(tree))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {'numpy', 'torch', 'torch.nn.functional', 'torch_utils'}
