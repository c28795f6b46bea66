"""benchmarks/digits_classifier.py: what it learns from, that it learns, and how well it says it reads."""

import json
import math

import click
import PIL.Image
import pytest
import torch

from benchmarks import digits_classifier as dc


def bars(num, seed=0):
    """Noisy images with a bright bar whose height tells the class: equally many of each of ten classes, in turns."""
    labels = torch.arange(num) % 10
    images = torch.randint(0, 60, (num, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    for image, label in zip(images, labels, strict=True):
        image[0, 31 - 3 * int(label) :, 12:20] = 255
    return dc.Digits(images, labels)


def write_folder(path, digits):
    path.mkdir()
    names = [f'{i:04d}.png' for i in range(len(digits.labels))]
    for name, image in zip(names, digits.images, strict=True):
        PIL.Image.fromarray(image[0].numpy()).save(path / name)
    labels = list(zip(names, digits.labels.tolist(), strict=True))
    (path / 'dataset.json').write_text(json.dumps({'labels': labels}))
    return path


# Real digits.


def test_held_out_digits_are_the_last_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(dc, 'NUM_DIGITS', 50)
    monkeypatch.setattr(dc, 'NUM_HELD_OUT', 20)
    digits = bars(50)
    train, held_out = dc.load_digits(write_folder(tmp_path / 'digits', digits))
    for part, expected in [(train, slice(0, 30)), (held_out, slice(30, 50))]:
        assert torch.equal(part.images, digits.images[expected])
        assert torch.equal(part.labels, digits.labels[expected])


def test_a_training_set_without_the_held_out_digits_is_refused(tmp_path):
    path = write_folder(tmp_path / 'digits', bars(20))
    with pytest.raises(OSError, match=r'not the 5000 digits that dataset_tool\.py --source=mnist-5k writes'):
        dc.load_digits(path)


# The classifier.


def test_distortions_are_small_differ_and_follow_the_generator():
    dot = torch.zeros(200, 1, 32, 32)
    dot[:, :, 14:18, 14:18] = 1
    moved = dc.distort(dot, torch.Generator().manual_seed(1))
    assert torch.equal(moved, dc.distort(dot, torch.Generator().manual_seed(1)))
    mass = moved.sum([1, 2, 3])
    pixels = torch.arange(32) - 15.5
    for centre in [(moved.sum(2)[:, 0] * pixels).sum(1) / mass, (moved.sum(3)[:, 0] * pixels).sum(1) / mass]:
        assert 2 < centre.abs().max() < 2.5 * 1.4  # a shift counts in the scaled, sheared frame
        assert centre.abs().mean() > 0.8
    assert torch.all((mass > 16 * 0.7) & (mass < 16 * 1.4))


def test_the_classifier_learns_and_the_seed_decides_everything():
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    models = [dc.fit_classifier(bars(400), epochs=4, width=4, batch=20, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    weights = [torch.nn.utils.parameters_to_vector(model.parameters()) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    fresh = bars(600, seed=5)
    read = dc.read_digits(models[0], fresh.images)
    assert read.dtype == torch.int64
    assert (read == fresh.labels).double().mean() > 0.8  # guessing: 0.1; shifts of 2.5 px blur bars 3 px apart


def test_the_classifier_takes_32x32_digits_to_ten_logits():
    logits = dc.make_classifier()(torch.zeros(3, 1, 32, 32))
    assert logits.shape == (3, 10)


# How well it reads.


@pytest.mark.parametrize(
    ('hits', 'n', 'low', 'high'),
    [(50, 100, 0.4038, 0.5962), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (960, 1000, 0.9460, 0.9705)],
)
def test_wilson_interval(hits, n, low, high):
    assert dc.wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_bounds_are_where_the_normal_test_turns():
    hits, n, z = 23, 40, 1.959964
    for bound in dc.wilson_interval(hits, n):
        assert abs(hits / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n))


def test_by_class_gathers_the_classes():
    labels = torch.arange(30) % 10
    assert torch.equal(dc.by_class(labels, labels), torch.arange(10)[:, None].expand(10, 3))


@pytest.mark.parametrize(('grey', 'words'), [(255, None), (0, 'less than 97%: this classifier is no judge')])
def test_a_classifier_that_misreads_held_out_digits_is_no_judge(monkeypatch, capsys, grey, words):
    """Read by the grey level of the first pixel, which tells the class or is always 0."""
    held_out = bars(50)
    held_out.images[:, 0, 0, 0] = 20 * held_out.labels.to(torch.uint8) * (grey > 0)
    monkeypatch.setattr(dc, 'load_digits', lambda data: (bars(10), held_out))
    monkeypatch.setattr(dc, 'fit_classifier', lambda train: ByGreyLevel())
    if words:
        with pytest.raises(click.ClickException, match=words):
            dc.fit_judge('data')
    else:
        _, right = dc.fit_judge('data')
        assert right.shape == (10, 5)
    told = '10.0% (4.3% to 21.4%)' if words else '100.0% (92.9% to 100.0%)'
    assert capsys.readouterr().out.startswith(f'Held-out real digits: {told} read right; classifier fitted in ')


class ByGreyLevel(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] * 255 / 20).round().long(), 10).float()
