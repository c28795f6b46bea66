import io
import json
import math
import subprocess
import sys
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import pytest
import torch

import generate
from benchmarks import digits_classifier as dc
from images import files

TAYLOR = dc.SETTINGS[1]


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


# Sampled digits. A stand-in for generate.py paints image k in the grey level of its class, or of another class if k is
# in `wrong`; a stand-in for the classifier reads the grey level.


class ByGreyLevel(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] * 255 / 20).round().long(), 10).float()


class Sampler:
    """Takes the place of subprocess.run: parses each command as generate.py does, then paints."""

    def __init__(self):
        self.params, self.wrong, self.dies_after = [], set(), math.inf

    def __call__(self, command, **_):
        assert command[:2] == [sys.executable, str(dc.ROOT / 'generate.py')]
        if len(self.params) == self.dies_after:
            raise KeyboardInterrupt
        params = generate.main.make_context('generate.py', command[2:]).params
        self.params.append(params)
        for seed in params['seeds']:
            grey = 20 * ((params['class_idx'] + (seed in self.wrong)) % 10)
            path = Path(files.image_path(params['outdir'], seed, False))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(np.full([32, 32], grey, np.uint8)))
        return subprocess.CompletedProcess(command, 0, '', '')


def png(array):
    data = io.BytesIO()
    PIL.Image.fromarray(array).save(data, format='png')
    return data.getvalue()


@pytest.fixture
def sampler(monkeypatch):
    sampler = Sampler()
    monkeypatch.setattr(dc.subprocess, 'run', sampler)
    monkeypatch.setattr(dc, 'fit_judge', lambda data: (ByGreyLevel(), torch.ones(10, 50, dtype=torch.bool)))
    return sampler


@pytest.fixture
def run(sampler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'net.pkl').write_bytes(b'a network')

    def run(*args):
        return click.testing.CliRunner().invoke(dc.main, ['--network=net.pkl', '--outdir=out', '--num=2', *args])

    return run


def test_it_asks_generate_for_every_class_and_setting(run, sampler):
    result = run('--num=100')
    assert result.exit_code == 0, result.output
    asked = [(p['randn_like'], p.get('scheme'), p['num_steps'], p.get('rho'), p['class_idx']) for p in sampler.params]
    settings = [('db', None, 18, None), ('ddb', 'taylor', 40, 7), ('ddb', 'rk', 40, 7)]
    assert asked == [(*setting, digit) for setting in settings for digit in range(10)]
    for p in sampler.params:
        assert p['seeds'] == list(range(100 * p['class_idx'], 100 * p['class_idx'] + 100))
        assert p['max_batch_size'] == 100
        assert p['network_pkl'] == 'net.pkl'
    assert Path('out/ddb-taylor/3/000300.png').is_file()


def test_the_table_tells_shares_intervals_and_seconds(run, sampler):
    sampler.wrong = {4, 13}  # one of class 2, one of class 6, in each setting
    result = run('--detail')
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[0] == ['setting', 'steps', 'read as asked (95% interval)', 'seconds']
    assert [row[:2] for row in cells[2:5]] == [['db', '18'], ['ddb taylor', '40'], ['ddb rk', '40']]
    assert all(row[2] == '90.0% (69.9% to 97.2%)' for row in cells[2:5])
    assert cells[6] == ['by class', *'0123456789']
    assert cells[8] == ['held-out'] + ['100%'] * 10
    assert cells[9] == ['db', *['50%' if digit in (2, 6) else '100%' for digit in range(10)]]


def test_min_share_decides_the_exit_status(run, sampler):
    sampler.wrong = {4, 13}
    assert run('--min-share=0.9').exit_code == 0
    failed = run('--min-share=0.91')
    assert failed.exit_code == 1
    assert 'db: 90.0% is below --min-share=0.91' in failed.output


def test_what_is_complete_is_not_sampled_again(run, sampler):
    sampler.dies_after = 13
    assert run().exception
    sampler.dies_after = math.inf
    first = run()
    assert len(sampler.params) == 30
    second = run()
    assert len(sampler.params) == 30
    assert first.stdout == second.stdout  # with the seconds of the first time


def test_other_images_under_the_same_name_are_sampled_again(run, sampler):
    run()
    Path('out/db/7/000014.png').unlink()
    run()
    assert [p['class_idx'] for p in sampler.params[30:]] == [7]
    Path('net.pkl').write_bytes(b'another network')
    run()
    assert len(sampler.params) == 61
    run('--num=3')
    assert len(sampler.params) == 91


def test_a_failure_of_generate_is_passed_on(sampler, tmp_path, monkeypatch):
    (tmp_path / 'generate.py').write_text('raise SystemExit("Error: no such class")')
    monkeypatch.undo()
    monkeypatch.setattr(dc, 'ROOT', tmp_path)
    job = dc.Job(TAYLOR, 3, 2, 'net.pkl', str(tmp_path / 'out'))
    with pytest.raises(click.ClickException, match=r'(?s)--class=3 .*exit status 1.*: Error: no such class'):
        dc.make_images(job, 'id')
    (tmp_path / 'generate.py').write_text('')
    with pytest.raises(click.ClickException, match=r'000006\.png is missing'):
        dc.make_images(job, 'id')


def test_a_missing_network_is_one_line(run):
    result = run('--network=absent.pkl')
    assert result.exit_code == 1
    assert result.output.startswith('Error: ')
    assert 'absent.pkl' in result.output


def test_images_of_another_size_or_mode_are_refused(tmp_path):
    for array in [np.zeros([16, 16], np.uint8), np.zeros([32, 32, 3], np.uint8)]:
        (tmp_path / '0.png').write_bytes(png(array))
        with pytest.raises(OSError, match='not a 32x32 grayscale digit'):
            dc.load_images([tmp_path / '0.png'])


# Results.


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


def test_contact_sheet_divides_its_tiles_evenly():
    digit, nth = torch.meshgrid(torch.arange(10), torch.arange(26), indexing='ij')
    images = (100 * digit + nth)[:, :, None, None, None].expand(10, 26, 1, 4, 4)
    sheet = dc.contact_sheet(images)
    assert sheet.shape == (64, 64)
    tiles = sheet[::4, ::4].ravel()
    assert np.array_equal(sheet, np.kron(tiles.reshape(16, 16), np.ones([4, 4])))
    counts = np.bincount(tiles // 100)
    assert set(counts) == {25, 26}
    assert tiles.tolist() == [100 * k + i for k in range(10) for i in range(counts[k])]


def test_the_sheet_is_written(run, sampler):
    result = run('--num=26', '--sheet=pictures/sheet.png')
    assert result.exit_code == 0, result.output
    with PIL.Image.open('pictures/sheet.png') as sheet:
        assert (sheet.mode, sheet.size) == ('L', (512, 512))
        assert sorted(set(np.asarray(sheet).ravel().tolist())) == list(range(0, 200, 20))


def test_the_sheet_needs_enough_images(run):
    result = run('--sheet=sheet.png')
    assert result.exit_code == 2
    assert '--num=26' in result.output
