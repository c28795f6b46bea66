"""fid.py as a user runs it: pixels as features, where every number can be computed by hand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import foreign_edm
import generate_here
import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from image_files import png, write

import fid
import generate
from images.image_files import ImageFiles
from metrics import distances
from training.dataset import ImageFolderDataset

ROOT = Path(__file__).parents[1]
PIXELS = ['--detector=pixels', '--workers=0']
TINY = {
    'img_resolution': 8,
    'img_channels': 1,
    'model_type': 'SongUNet',
    'model_channels': 8,
    'channel_mult': [1],
    'num_blocks': 1,
}


@pytest.fixture
def images():
    """40 real, and 50 paler ones; 4×4 RGB."""
    rng = np.random.RandomState(0)
    return rng.randint(0, 256, [40, 4, 4, 3], dtype=np.uint8), rng.randint(0, 200, [50, 4, 4, 3], dtype=np.uint8)


@pytest.fixture
def folders(tmp_path, images):
    """The images as a zip archive and as a folder with subfolders."""
    real, pale = ({f'{i // 10}/{i:06d}.png': png(image) for i, image in enumerate(each)} for each in images)
    return write(tmp_path / 'real.zip', real), write(tmp_path / 'pale', pale)


def pixels(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1) / 255


def frechet(a, b):
    a, b = pixels(a), pixels(b)
    return distances.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)).distance


def run(*args, status=0):
    result = CliRunner().invoke(fid.main, [str(arg) for arg in args])
    assert result.exit_code == status, result.output
    return result


def calc(images, ref, *more, status=0):
    return run('calc', f'--images={images}', f'--ref={ref}', *PIXELS, *more, status=status)


def test_the_number_alone_is_on_stdout(folders, images):
    real, pale = folders
    result = calc(pale, real, '--num=50')
    assert result.stdout == f'{frechet(images[1], images[0]):g}\n'
    assert 'FD (pixels' in result.stderr


def test_reference_statistics_serve_as_the_images_do(folders, tmp_path):
    real, pale = folders
    dest = tmp_path / 'new' / 'ref.npz'
    run('ref', f'--data={real}', f'--dest={dest}', *PIXELS)
    assert calc(pale, dest, '--num=50').stdout == calc(pale, real, '--num=50').stdout
    assert abs(float(calc(real, dest, '--num=40').stdout)) < 1e-9
    with np.load(dest) as archive:
        assert archive['sigma'].shape == (48, 48)


def test_json_record(folders, images):
    real, pale = folders
    record = json.loads(calc(pale, real, '--num=50', '--json', '--seed=3').stdout)
    assert record['fid'] == pytest.approx(frechet(images[1], images[0]), rel=1e-10)
    expected = {'title': 'FD (pixels)', 'n': 50, 'detector': 'pixels', 'seed': 3, 'ref': str(real), 'num': 50}
    assert {key: record[key] for key in expected} == expected
    assert record['images'] == [str(pale)]
    assert set(record['versions']) >= {'torch', 'numpy'}


def test_all_metrics_in_one_pass(folders, images):
    real, pale = folders
    output = calc(pale, real, '--num=50', '--metrics=fid,kid,prdc,swd').stdout
    numbers = {name: float(value) for name, value in (line.split() for line in output.splitlines())}
    x, y = pixels(images[1]), pixels(images[0])
    kid, error = distances.kernel_distance(x, y)
    expected = {'fid': frechet(images[1], images[0]), 'kid': kid, 'kid_error': error}
    expected |= distances.precision_recall(x, y)._asdict() | {'swd': distances.sliced_wasserstein(x, y)}
    assert list(numbers) == list(expected)
    assert numbers == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('seed', [0, 7])
def test_the_subset_is_that_of_the_datasets(folders, images, seed):
    real, pale = folders
    subset = ImageFolderDataset(pale, max_size=20, random_seed=seed)
    chosen = np.stack([subset[i][0].transpose(1, 2, 0) for i in range(20)])
    number = float(calc(pale, real, '--num=20', f'--seed={seed}').stdout)
    assert number == pytest.approx(frechet(chosen, images[0]), rel=1e-5)


def test_several_folders_are_one_set(folders, images):
    real, pale = folders
    both = np.concatenate(images[::-1])
    number = float(calc(pale, real, f'--images={real}', '--num=90').stdout)
    assert number == pytest.approx(frechet(both, images[0]), rel=1e-5)


def test_ranges_report_the_smallest(folders, images):
    real, pale = folders
    parts = [frechet(images[1][i : i + 16], images[0]) for i in (0, 16, 32)]
    result = calc(pale, real, '--num=16', '--ranges=3')
    assert result.stdout == f'{min(parts):g}\n'
    assert all(f'fid {part:g}' in result.stderr for part in parts)
    assert '--num=16 times --ranges=4' in calc(pale, real, '--num=16', '--ranges=4', status=1).output


def test_batches_do_not_matter(folders):
    real, pale = folders
    numbers = [
        json.loads(calc(pale, real, '--num=50', '--json', f'--batch={batch}').stdout)['fid'] for batch in (1, 7, 64)
    ]
    assert numbers == pytest.approx([numbers[0]] * 3, rel=1e-12)


def test_gray_images_are_repeated(tmp_path):
    gray = np.random.RandomState(0).randint(0, 256, [12, 4, 4], dtype=np.uint8)
    one = write(tmp_path / 'gray', {f'{i}.png': png(image) for i, image in enumerate(gray)})
    three = write(tmp_path / 'rgb', {f'{i}.png': png(np.stack([image] * 3, 2)) for i, image in enumerate(gray)})
    assert abs(float(calc(one, three, '--num=12').stdout)) < 1e-9


def test_too_few_images(folders):
    real, pale = folders
    output = calc(pale, real, status=1).output
    assert '--images has 50 images, --num=50000 asks for 50000; use --num=50' in output
    assert 'Reference images' not in output  # which may take hours
    assert 'biased upward' in calc(pale, real, '--num=20').stderr


BROKEN = {
    'truncated': (lambda image: png(image)[:60], 'cannot use'),
    'alpha': (lambda image: png(np.dstack([image, image[:, :, :1]])), 'transparent pixels'),
    'large': (lambda image: png(np.tile(image, [2, 1, 1])), 'shape [3, 8, 4]'),
    'deep': (lambda image: png(PIL.Image.fromarray(image[:, :, 0].astype(np.uint16))), 'pixels are I'),
}


@pytest.mark.parametrize('kind', BROKEN)
def test_an_image_that_cannot_be_used_is_named_or_skipped(folders, images, kind):
    real, pale = folders
    make, problem = BROKEN[kind]
    (pale / '9.png').write_bytes(make(images[0][0]))
    output = calc(pale, real, '--num=51', status=1).output
    assert problem in output
    assert str(pale / '9.png') in output
    result = calc(pale, real, '--num=51', '--skip-broken')
    assert result.stdout == f'{frechet(images[1], images[0]):g}\n'
    assert '1 images left out' in result.stderr


def test_features_are_kept_and_used(folders, tmp_path):
    real, pale = folders
    path = tmp_path / 'features.npz'
    first = calc(pale, real, '--num=50', '--metrics=fid,swd', f'--features={path}')
    changed = next(pale.rglob('*.png'))
    before = changed.read_bytes()
    changed.write_bytes(next(real.rglob('*.png')).read_bytes() if real.is_dir() else before + b' ')
    output = calc(pale, real, '--num=50', '--metrics=fid,swd', f'--features={path}', status=1).output
    assert 'was made with content' in output
    for file in pale.rglob('*.png'):
        file.unlink()
    second = calc(pale, real, '--num=50', '--metrics=fid,swd', f'--features={path}')
    assert first.stdout == second.stdout
    assert 'Using the features' in second.stderr
    output = calc(pale, real, '--num=50', '--seed=1', f'--features={path}', status=1).output
    assert 'made with seed 0' in output


def test_other_features_are_not_compared_unless_forced(folders, tmp_path):
    real, pale = folders
    other = tmp_path / 'other.npz'
    np.savez(other, mu=np.full(48, 0.5), sigma=np.eye(48))  # no note: taken for Inception's
    output = calc(pale, other, '--num=50', status=1).output
    assert "was made with detector 'inception-2015-12-05', not 'pixels'" in output
    assert float(calc(pale, other, '--num=50', '--force').stdout) > 0
    np.savez(other, mu=np.zeros(2), sigma=np.eye(2))
    assert 'different dimensions' in calc(pale, other, '--num=50', '--force', status=1).output
    run('ref', f'--data={real}', f'--dest={other}', *PIXELS)
    assert 'has no features' in calc(pale, other, '--num=50', '--metrics=kid', status=1).output
    run('ref', f'--data={real}', f'--dest={other}', '--with-features', *PIXELS)
    assert calc(pale, other, '--num=50', '--metrics=swd').stdout == calc(pale, real, '--num=50', '--metrics=swd').stdout


def test_a_reference_cannot_choose_code_to_run(folders, tmp_path):
    _, pale = folders
    path = tmp_path / 'ref.npz'
    note = np.array(json.dumps({'detector': 'antigravity:fly'}))
    np.savez(path, mu=np.zeros(48), sigma=np.eye(48), note=note)
    output = run('calc', f'--images={pale}', f'--ref={path}', '--num=50', '--workers=0', status=1).output
    assert 'repeat that option' in output
    assert 'antigravity' not in sys.modules


def test_mistakes_are_named(folders):
    real, pale = folders
    assert "'fidd' is none of fid, kid, prdc, swd" in calc(pale, real, '--metrics=fidd', status=1).output
    assert 'no such folder' in calc('nowhere', real, status=1).output
    assert 'nowhere.npz' in calc(pale, 'nowhere.npz', '--num=50', status=1).output


def test_a_lack_of_memory_is_one_line(folders, monkeypatch):
    real, pale = folders
    monkeypatch.setattr(fid.FeatureSet, 'add', lambda *_: torch.empty(2**60))
    output = calc(pale, real, '--num=50', status=1).output
    assert re.fullmatch(r'Error: out of memory: .*4611686018427387904 bytes.*; lower --batch', output.splitlines()[-1])


def test_two_processes_agree_with_one(folders):
    real, pale = folders
    command = ['fid.py', 'calc', f'--images={pale}', f'--ref={real}', '--num=50', '--batch=8', '--json', '--device=cpu']
    command += ['--metrics=fid,kid,prdc,swd', *PIXELS]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    records = []
    for launcher in ([sys.executable], [*torchrun, '--']):
        result = subprocess.run(
            [*launcher, *command], cwd=ROOT, text=True, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}
        )
        assert result.returncode == 0, result.stderr
        records.append(json.loads(result.stdout))
    one, two = ({name: record[name] for name in ('fid', 'kid', 'precision', 'coverage', 'swd')} for record in records)
    assert two == pytest.approx(one, rel=1e-10)


def test_generated_images_measure_the_same_without_files(tmp_path):
    rng = np.random.RandomState(0)
    real = {f'{i}.png': png(image) for i, image in enumerate(rng.randint(0, 256, [12, 32, 32], dtype=np.uint8))}
    write(tmp_path / 'real', real)
    ref = tmp_path / 'ref.npz'
    run('ref', f'--data={tmp_path / "real"}', f'--dest={ref}', '--with-features', *PIXELS)
    command = ['--seeds=3-10', '--batch=3', '--steps=2', '--device=cpu']

    def generated(*args, status=0):
        result = CliRunner().invoke(generate.main, [*command, *map(str, args)])
        assert result.exit_code == status, result.output
        return result if not status else result.output

    metrics = '--metrics=fid,kid,swd'
    output = generated(metrics, f'--ref={ref}')
    generated(f'--outdir={tmp_path / "out"}')
    expected = run(
        'calc', f'--images={tmp_path / "out"}', f'--ref={ref}', '--num=8', metrics, '--detector=pixels', '--workers=0'
    ).stdout
    assert output.stdout == expected
    assert 'Saved in' not in output.stderr
    assert 'biased upward' in output.stderr
    assert 'go together' in generated(metrics, status=2)
    assert '--outdir is missing' in generated(status=2)
    assert "'fidd' is none of" in generated('--metrics=fidd', f'--ref={ref}', status=1)
    assert 'no reference statistics' in generated(metrics, f'--ref={tmp_path / "out" / "000003.png"}', status=1)


# ----------------------------------------------------------------------------
# What counts as images.


def generated(tmp_path, kind):
    network = tmp_path / 'net.pkl'
    if not network.exists():
        foreign_edm.write_foreign_snapshot(network, 'EDMPrecond', TINY)
    outdir = tmp_path / kind
    args = (
        f'--network={network}',
        f'--outdir={outdir}',
        f'--format={kind}',
        '--seeds=0-4',
        '--steps=2',
        '--device=cpu',
    )
    outcome = generate_here.run(*args)
    assert outcome.status == 0, outcome.err
    return outdir


def test_everything_that_generate_writes_is_read_alike(tmp_path):
    folders = {kind: generated(tmp_path, kind) for kind in ('png', 'zip', 'npz')}
    paths = [*folders.values(), folders['zip'] / 'images.zip', folders['npz'] / 'images.npz']
    numbers = {calc(path, folders['png'], '--num=5', '--metrics=fid,swd').stdout for path in paths}
    assert len(numbers) == 1


@pytest.mark.parametrize('again', ['.', '../pale', 'link'])
def test_the_same_images_twice_are_an_error(folders, tmp_path, again):
    real, pale = folders
    (pale.parent / 'link').symlink_to(pale)
    other = pale.parent / 'link' if again == 'link' else pale / again
    output = run('calc', f'--images={pale}', f'--images={other}', f'--ref={real}', '--num=5', *PIXELS, status=1).output
    assert 'is given twice' in output


def test_a_gray_image_among_colours_is_repeated(tmp_path):
    gray = np.random.RandomState(0).randint(0, 256, [8, 8], dtype=np.uint8)
    write(tmp_path / 'in', {'a.png': png(np.stack([gray] * 3, axis=2)), 'b.png': png(gray)})
    (_, first, _), (_, second, problem) = ImageFiles([str(tmp_path / 'in')])
    assert problem == ''
    assert np.array_equal(first, second)
