"""Runs of generate.py: continued where they were left, or refused; formats, pictures, classes, guidance; processes."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import foreign_edm
import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from generate_here import run
from image_files import png

import dnnlib
import fid
import generate
from sampling import draw
from torch_utils import network_io
from training import networks
from training.dataset import ImageFolderDataset

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(generate.__file__).parent
SONG = {'model_type': 'SongUNet', 'model_channels': 8, 'channel_mult': [1], 'num_blocks': 1, 'attn_resolutions': []}
SEEDS = '--seeds=0-7'
TIMEOUT = 900  # seconds: a loaded machine is no failure


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Small random networks: digits (3 classes), grey (none), other (3 classes, other weights)."""
    folder = tmp_path_factory.mktemp('networks')
    for seed, (name, label_dim) in enumerate([('digits', 3), ('grey', 0), ('other', 3)]):
        net = foreign_edm.randomize(networks.EDMPrecond(8, 1, label_dim=label_dim, **SONG), seed=seed)
        (folder / f'{name}.pkl').write_bytes(pickle.dumps({'ema': net.eval().requires_grad_(False)}))
    return folder


@pytest.fixture
def sample(files, tmp_path):
    """sample('out', '--steps=2', …) runs in tmp_path/out and expects that to work; it returns what was printed."""

    def sample(outdir, *args, network='digits', batch=4, seeds=SEEDS):
        common = [f'--outdir={tmp_path / outdir}', f'--network={files / network}.pkl', f'--batch={batch}', seeds]
        outcome = run(*common, '--steps=2', '--device=cpu', *args)
        assert outcome.status == 0, outcome.err
        return outcome.out

    return sample


@pytest.fixture
def refused(files, tmp_path):
    """The one line that a run in tmp_path/outdir ends with; it may not change the folder."""

    def refused(outdir, *args, seeds=SEEDS):
        before = contents(tmp_path / outdir)
        common = [f'--outdir={tmp_path / outdir}', f'--network={files / "digits.pkl"}', '--batch=4', seeds]
        outcome = run(*common, '--steps=2', '--device=cpu', *args)
        assert outcome.status == 1
        [line] = outcome.err.splitlines()
        assert contents(tmp_path / outdir) == before
        return line

    return refused


def contents(folder):
    """{path below the folder: bytes}"""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def image(path):
    with PIL.Image.open(path) as opened:
        return np.array(opened)


# ----------------------------------------------------------------------------
# The same command continues.


def test_only_batches_that_lack_an_image_are_drawn_again(sample, tmp_path):
    sample('out')
    before = contents(tmp_path / 'out')
    assert len(before) == 9
    old = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').iterdir()}
    lost = [tmp_path / 'out' / f'{seed:06d}.png' for seed in (5, 6)]
    for path in lost:
        path.unlink()
    printed = sample('out')
    assert '4 images in' in printed
    assert '4 were there already' in printed
    assert contents(tmp_path / 'out') == before
    assert all(path.stat().st_mtime_ns == time for path, time in old.items() if path not in lost)


def test_a_finished_run_draws_nothing(sample, tmp_path, monkeypatch):
    sample('out', '--subdirs')
    monkeypatch.setattr(draw, 'generate_images', None)
    before = contents(tmp_path / 'out')
    monkeypatch.undo()
    printed = sample('out', '--subdirs')
    assert 'All 8 images were there already' in printed
    assert 'network calls' not in printed
    assert contents(tmp_path / 'out') == before


def test_seeds_may_be_added_and_finished_images_stay(sample, tmp_path):
    """A kept image is what the pictures show, too: here it has been painted over."""
    sample('out', seeds='--seeds=0-2')
    painted = png(np.full([8, 8], 77, np.uint8))
    (tmp_path / 'out' / '000001.png').write_bytes(painted)
    printed = sample('out', f'--grid={tmp_path / "grid.png"}')
    assert '8 images in' in printed  # batches 0-3 and 4-7 both lack an image
    assert (tmp_path / 'out' / '000001.png').read_bytes() == painted
    grid = image(tmp_path / 'grid.png')
    assert grid.shape == (16, 32)
    assert (grid[:8, 8:16] == 77).all()
    assert np.array_equal(grid[8:, 24:], image(tmp_path / 'out' / '000007.png'))


def test_what_is_the_same_may_be_said_in_another_way(sample, files, tmp_path):
    sample('out')
    network_io.save_network(network_io.load_network(str(files / 'digits.pkl')), tmp_path / 'moved.safetensors')
    options = [f'--network={tmp_path / "moved.safetensors"}', '--rho=7', '--dtype=fp32', '--S_max=inf', '--class=0-2']
    assert 'All 8 images' in sample('out', *options[:-1])
    record = json.loads((tmp_path / 'out' / 'generate.json').read_text())
    assert record['settings']['S_max'] == 'inf'
    assert record['network'] == str(files / 'digits.pkl')


@pytest.mark.parametrize(
    ('args', 'change'),
    [
        (['--steps=3'], '--steps: 2 → 3'),
        (['--rho=5'], '--rho: 7 → 5.0'),
        (['--S_churn=1', '--S_min=0.5'], '--S_churn: 0 → 1.0, --S_min: 0 → 0.5'),
        (['--class=1'], '--class: random → 1'),
        (['--class=0-2'], '--class: random → [0, 1, 2]'),
        (['--batch=3'], '--batch: 4 → 3'),
        (['--dtype=bf16'], '--dtype: fp32 → bf16'),
        (['--subdirs'], '--subdirs: False → True'),
        (['--format=zip'], '--format: png → zip'),
        (['--network={files}/other.pkl'], '--network: '),
        (['--gnet={files}/grey.pkl', '--guidance=2'], '--guidance: none → 2.0'),
        (['--solver=heun'], '--solver: none → heun'),
        (['--randn_like=ddb'], '--sampler: heun → taylor'),
    ],
)
def test_other_settings_are_refused(sample, refused, files, args, change):
    sample('out')
    line = refused('out', *(arg.format(files=files) for arg in args))
    for words in (change, 'other settings', '--overwrite', 'another --outdir'):
        assert words in line


def test_images_of_another_version_of_the_samplers_are_refused(sample, refused, monkeypatch):
    sample('out')
    monkeypatch.setattr(draw, 'IMAGE_VERSION', draw.IMAGE_VERSION + 1)
    assert f'(version of the samplers: {draw.IMAGE_VERSION - 1} → {draw.IMAGE_VERSION})' in refused('out')


def test_a_folder_without_images_takes_any_settings(sample, tmp_path):
    sample('out')
    for path in (tmp_path / 'out').glob('*.png'):
        path.unlink()
    sample('out', '--steps=3')
    assert json.loads((tmp_path / 'out' / 'generate.json').read_text())['settings']['steps'] == 3


def test_images_of_unknown_origin_are_refused(sample, refused, tmp_path):
    sample('out', '--subdirs')
    (tmp_path / 'out' / 'generate.json').unlink()
    line = refused('out')
    assert '000000/000000.png' in line
    assert 'no generate.json' in line
    assert '--overwrite' in line


@pytest.mark.parametrize('content', ['', '[]', '{"settings": 1}', '{"a": 2}', '{'])
def test_a_foreign_generate_json_is_left_alone(refused, tmp_path, content):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'generate.json').write_text(content)
    for args in ([], ['--overwrite']):
        assert 'is not a record of generate.py' in refused('out', *args)


def test_what_a_kill_left_half_written_goes_and_nothing_else_of_that_kind(sample, tmp_path):
    sample('out', seeds='--seeds=0-3')
    mine = [f'.tmp_{"0" * 32}_000005.png', f'.tmp_{"f" * 32}_generate.json']
    theirs = [f'.tmp_{"0" * 32}_000050.png', '.tmp_000005.png', f'.tmp_{"0" * 32}_cat.png', 'cat.png']
    for name in mine + theirs:
        (tmp_path / 'out' / name).write_bytes(b'half')
    sample('out')
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    assert names == {*theirs, 'generate.json', *(f'{seed:06d}.png' for seed in range(8))}


# ----------------------------------------------------------------------------
# --overwrite.


def test_overwrite_starts_anew_and_deletes_only_what_is_ours(sample, tmp_path):
    sample('out', seeds='--seeds=0-9')
    foreign = {'notes.txt': b'keep', '12345.png': b'keep', 'cat.png': b'keep', 'mine/000001.png': b'keep'}
    for name, data in foreign.items():
        (tmp_path / 'out' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'out' / name).write_bytes(data)
    sample('out', '--overwrite', '--steps=3', '--subdirs', seeds='--seeds=0-3')
    sample('new', '--steps=3', '--subdirs', seeds='--seeds=0-3')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'new') | foreign


def test_overwrite_of_images_of_unknown_origin(sample, refused, tmp_path):
    sample('out')
    before = contents(tmp_path / 'out')
    (tmp_path / 'out' / 'generate.json').unlink()
    line = refused('out', '--overwrite', seeds='--seeds=0-5')
    assert '2 images that this command would not write, such as 000006.png' in line
    sample('out', '--overwrite')
    assert contents(tmp_path / 'out') == before


def test_overwrite_keeps_the_old_images_from_a_command_that_fails(sample, refused):
    sample('out')
    assert 'sigma_min=100' in refused('out', '--overwrite', '--sigma_min=100')


# ----------------------------------------------------------------------------
# Formats.


def test_zip_is_a_dataset_in_the_order_of_the_seeds(sample, tmp_path):
    seeds = '--seeds=5,2,9,2'
    sample('png', '--class=1,0', seeds=seeds)
    sample('zip', '--class=1,0', '--format=zip', seeds=seeds)
    assert sorted(contents(tmp_path / 'zip')) == ['generate.json', 'images.zip']
    dataset = ImageFolderDataset(tmp_path / 'zip' / 'images.zip', use_labels=True)
    assert dataset.label_dim == 2
    for row, seed in enumerate([5, 2, 9, 2]):
        pixels, label = dataset[row]
        assert np.array_equal(pixels[0], image(tmp_path / 'png' / f'{seed:06d}.png'))
        assert label.tolist() == [[0, 1], [1, 0]][seed % 2]


def test_npz_has_images_classes_and_seeds(sample, tmp_path):
    sample('png', seeds='--seeds=5,2,9')
    sample('npz', '--format=npz', seeds='--seeds=5,2,9')
    with np.load(tmp_path / 'npz' / 'images.npz') as archive:
        assert archive.files == ['arr_0', 'labels', 'seeds']
        assert (archive['arr_0'].dtype, archive['arr_0'].shape) == (np.uint8, (3, 8, 8, 1))
        assert archive['seeds'].tolist() == [5, 2, 9]
        for pixels, label, seed in zip(*(archive[name] for name in archive.files), strict=True):
            assert np.array_equal(pixels[:, :, 0], image(tmp_path / 'png' / f'{seed:06d}.png'))
            generator = torch.Generator().manual_seed(int(seed))
            torch.randn([1, 8, 8], generator=generator)
            assert label == int(torch.randint(3, [], generator=generator))


@pytest.mark.parametrize('image_format', ['zip', 'npz'])
def test_archives_without_classes(sample, tmp_path, image_format):
    sample('out', f'--format={image_format}', network='grey', seeds='--seeds=0-1')
    path = tmp_path / 'out' / f'images.{image_format}'
    if image_format == 'zip':
        assert not ImageFolderDataset(path, use_labels=True).has_labels
    else:
        assert np.load(path).files == ['arr_0', 'seeds']


@pytest.mark.parametrize('image_format', ['zip', 'npz'])
def test_archives_survive_a_kill_and_grow(sample, refused, tmp_path, image_format, monkeypatch):
    option = f'--format={image_format}'
    sample('whole', option)
    sample('out', option, seeds='--seeds=0-3')
    assemble = generate.Output.assemble
    monkeypatch.setattr(generate.Output, 'assemble', lambda *args: None)  # as if killed there
    sample('out', option)
    monkeypatch.setattr(generate.Output, 'assemble', assemble)
    parts = tmp_path / 'out' / f'images.{image_format}.partial' / '000000'
    assert sorted(path.name for path in parts.iterdir()) == [f'{seed:06d}.png' for seed in range(4, 8)]
    (parts / '000006.png').unlink()
    assert '4 were there already' in sample('out', option)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    line = refused('out', option, seeds='--seeds=2-9')
    assert '2 images that --seeds leaves out, such as that of seed 0' in line
    sample('out', option, '--overwrite', seeds='--seeds=2-9')
    sample('rest', option, seeds='--seeds=2-9')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'rest')


@pytest.mark.parametrize('image_format', ['png', 'zip', 'npz'])
def test_a_damaged_file_is_named(sample, refused, tmp_path, image_format):
    sample('out', f'--format={image_format}')
    path = tmp_path / 'out' / {'png': '000003.png'}.get(image_format, f'images.{image_format}')
    path.write_bytes(path.read_bytes()[:50])
    line = refused('out', f'--format={image_format}', f'--grid={tmp_path / "grid.png"}')
    assert str(path) in line
    assert 'damaged' in line


def test_seeds_that_repeat_a_stream_are_said_once(sample, tmp_path):
    printed = sample('out', seeds=f'--seeds=5,{2**32 + 5},{2**32 + 6},6')
    [line] = [line for line in printed.splitlines() if line.startswith('Warning: ')]
    assert line.endswith('modulo 2^32, as in EDM: 5 and 4294967301 have the same random numbers')
    assert (image(tmp_path / 'out' / '000005.png') == image(tmp_path / 'out' / '4294967301.png')).all()
    assert 'Warning' not in sample('other', seeds=f'--seeds=5,{2**32 + 6}')


@pytest.mark.parametrize(('option', 'made'), [('outdir', 'out'), ('grid', 'grid.png'), ('network', 'digits.pkl')])
def test_home_is_where_a_shell_has_it(files, tmp_path, monkeypatch, option, made):
    (tmp_path / 'home').mkdir()
    shutil.copy(files / 'digits.pkl', tmp_path / 'home')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    outcome = run('--outdir=images', f'--network={files}/digits.pkl', '--seeds=0', '--steps=1', f'--{option}=~/{made}')
    assert outcome.status == 0, outcome.err
    assert (tmp_path / 'home' / made).exists()
    assert not (tmp_path / '~').exists()


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no named pipes')
@pytest.mark.parametrize('option', ['network', 'gnet', 'ref', 'outdir'])
def test_a_pipe_is_no_file(files, tmp_path, option):
    os.mkfifo(tmp_path / 'pipe')
    outcome = run(f'--outdir={tmp_path}/out', '--seeds=0', f'--{option}={tmp_path}/pipe')
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].endswith(f'{tmp_path}/pipe is a pipe or a device, neither a file nor a folder')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no named pipes')
def test_a_pipe_is_no_record(refused, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / '000000.png').write_bytes(b'')
    os.mkfifo(tmp_path / 'out' / 'generate.json')
    assert 'generate.json is not a record of generate.py' in refused('out')


def test_label_vectors(sample, refused, files, tmp_path):
    """A row that is one-hot is a class; and what the images depend on is on record."""
    np.save(tmp_path / 'labels.npy', np.eye(3)[[2, 0]])
    vectors = f'--labels={tmp_path / "labels.npy"}'
    sample('classes', '--class=2,0')
    sample('vectors', vectors)
    pictures = [
        {name: data for name, data in contents(tmp_path / each).items() if name.endswith('.png')}
        for each in ('classes', 'vectors')
    ]
    assert len(pictures[0]) == 8
    assert pictures[0] == pictures[1]
    np.save(tmp_path / 'labels.npy', np.eye(3)[[2, 1]])
    assert '--labels: ' in refused('vectors', vectors)
    assert 'labels.npy has the shape [2]; this network has labels [N, 3]' in refused_labels(refused, tmp_path, [0, 1])
    assert 'not finite' in refused_labels(refused, tmp_path, [[0, 1, np.nan]])
    assert 'is no .npy file of numbers' in refused_labels(refused, tmp_path, np.array([[None] * 3]))


def refused_labels(refused, tmp_path, labels):
    np.save(tmp_path / 'labels.npy', labels)
    return refused('vectors', f'--labels={tmp_path / "labels.npy"}')


# ----------------------------------------------------------------------------
# Metrics and pictures of all images, drawn now or before.


def test_metrics_of_a_continued_run_are_those_of_all_images(sample, tmp_path):
    rng = np.random.RandomState(0)
    (tmp_path / 'real').mkdir()
    for i, pixels in enumerate(rng.randint(0, 256, [12, 8, 8], dtype=np.uint8)):
        (tmp_path / 'real' / f'{i}.png').write_bytes(png(pixels))
    ref = tmp_path / 'ref.npz'
    made = [
        'ref',
        f'--data={tmp_path / "real"}',
        f'--dest={ref}',
        '--with-features',
        '--detector=pixels',
        '--workers=0',
    ]
    assert CliRunner().invoke(fid.main, made).exit_code == 0
    metrics = ['--metrics=fid,swd', f'--ref={ref}', '--detector=pixels']
    whole = sample('whole', *metrics).splitlines()
    sample('out')
    for seed in (1, 2):
        (tmp_path / 'out' / f'{seed:06d}.png').unlink()
    for _ in range(2):  # four images of eight are there, then all
        assert sample('out', *metrics).splitlines() == whole
    assert [line.split()[0] for line in whole] == ['fid', 'swd']  # the numbers alone on stdout


def test_grid_has_the_first_hundred_images_and_needs_no_folder(files, tmp_path, sample):
    network = f'--network={files / "digits.pkl"}'
    path = tmp_path / 'a' / 'b' / 'grid.png'
    outcome = run(network, '--seeds=7,3-120', '--steps=1', '--device=cpu', f'--grid={path}')
    assert outcome.status == 0, outcome.err
    assert 'first 100 images' in outcome.out
    assert [path.name for path in tmp_path.rglob('*')] == ['a', 'b', 'grid.png']
    grid = image(path)
    assert grid.shape == (80, 80)
    sample('out', '--steps=1', batch=64, seeds='--seeds=7,3-120')
    assert np.array_equal(grid[:8, :8], image(tmp_path / 'out' / '000007.png'))
    assert np.array_equal(grid[72:, 72:], image(tmp_path / 'out' / '000101.png'))


@pytest.mark.parametrize('mode', [[], ['--S_churn=9', '--solver=heun'], ['--randn_like=ddb', '--scheme=rk']])
def test_trajectory_ends_in_the_images_and_changes_none(sample, tmp_path, mode):
    """Eight rows of 64x64, each pixel eight times as large, in ten columns: every step of ten, up to rounding."""
    sample('plain', '--steps=10', *mode, batch=3)
    for name in ('strip.png', 'film.gif'):
        sample('watched', '--steps=10', f'--trajectory={tmp_path / name}', *mode, batch=3)
    assert contents(tmp_path / 'watched') == contents(tmp_path / 'plain')
    strip = image(tmp_path / 'strip.png')[::8, ::8].reshape(8, 8, 10, 8).transpose(0, 2, 1, 3).astype(int)
    final = np.stack([image(tmp_path / 'plain' / f'{seed:06d}.png') for seed in range(8)]).astype(int)
    assert np.abs(strip[:, -1] - final).max() <= 1
    far = [np.abs(strip[:, column] - final).mean() for column in range(10)]
    assert far[0] > far[5] > far[9]
    with PIL.Image.open(tmp_path / 'film.gif') as film:
        assert (film.n_frames, film.size) == (10, (4 * 64, 2 * 64))
        film.seek(9)
        last = np.array(film.convert('L'))[::8, ::8].astype(int)
    assert np.abs(last[:8, :8] - final[0]).max() <= 1
    assert np.abs(last[8:, 24:] - final[7]).max() <= 1


# ----------------------------------------------------------------------------
# Classes and guidance.


def test_seeds_take_the_classes_in_turns(sample, tmp_path):
    sample('list', '--class=2,0-1', batch=1)
    for class_idx in range(3):
        sample(str(class_idx), f'--class={class_idx}', batch=1)
    for seed in range(8):
        name = f'{seed:06d}.png'
        expected = (tmp_path / str([2, 0, 1][seed % 3]) / name).read_bytes()
        assert (tmp_path / 'list' / name).read_bytes() == expected


def test_one_class_in_brackets_or_not(sample, tmp_path):
    sample('out', '--class=1')
    assert 'All 8' in sample('out', '--class=1-1')


def test_guidance_goes_from_one_network_to_the_other(sample, tmp_path, files):
    """0 is the guiding network, 1 the network, and work is counted; without churn, both start from the same latents."""
    guide = [f'--gnet={files / "grey.pkl"}']
    sample('net')
    sample('gnet', network='grey')
    printed = sample('one', *guide, '--guidance=1')
    assert '3 network calls, 0 of them with a JVP, and 0 calls of the guiding network' in printed
    printed = sample('zero', *guide, '--guidance=0')
    assert '3 network calls, 0 of them with a JVP, and 3 calls of the guiding network' in printed
    sample('two', *guide, '--guidance=2')
    net, gnet, one, zero, two = (
        np.stack([image(tmp_path / name / f'{seed:06d}.png') for seed in range(8)]).astype(int)
        for name in ('net', 'gnet', 'one', 'zero', 'two')
    )
    assert np.abs(net - gnet).mean() > 2
    assert np.array_equal(one, net)
    assert np.abs(zero - gnet).max() <= 1
    assert np.abs(two - gnet).mean() > 1.2 * np.abs(net - gnet).mean()


def test_a_guided_second_order_run_counts_its_products(sample, files):
    printed = sample('out', f'--gnet={files / "other.pkl"}', '--guidance=1.5', '--randn_like=ddb', '--steps=4')
    assert '4 network calls, 3 of them with a JVP, and 4 calls of the guiding network' in printed


# ----------------------------------------------------------------------------
# Processes.


def start(*args, processes=1):
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / 'generate.py'), '--device=cpu', *args]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, start_new_session=True, **pipes)


def wait_for_images(folder, process):
    deadline = time.time() + TIMEOUT
    while not list(folder.glob('0*.png')) and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_one_line(files, tmp_path, number):
    args = [f'--network={files / "digits.pkl"}', '--seeds=0-99999', '--batch=4', f'--outdir={tmp_path / "out"}']
    process = start(*args)
    wait_for_images(tmp_path / 'out', process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    last = output.splitlines()[-1]
    count = len(list((tmp_path / 'out').glob('*.png')))
    assert count % 4 == 0
    assert last == f'Stopped by {number.name} with {count} images in {tmp_path / "out"}; the same command continues'
    assert 'Traceback' not in output
    assert not list((tmp_path / 'out').glob('.tmp_*'))


def test_a_process_that_dies_ends_the_run(files, tmp_path):
    args = [f'--network={files / "digits.pkl"}', '--seeds=0-99999', '--batch=4', f'--outdir={tmp_path}']
    process = start(*args, processes=2)
    wait_for_images(tmp_path, process)
    ranks = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert re.search(r'Stopped by SIGTERM, .* another process has ended, .* the same command continues', output)
    assert 'SIGKILL' in output  # by torchrun


def test_a_peer_that_is_gone_when_all_is_drawn_is_no_riddle(files, tmp_path):
    """Without a launcher: nobody sends a signal, so rank 0 learns of it when it waits for rank 1."""
    group = {'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '0', 'OMP_NUM_THREADS': '1'}
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        group['MASTER_PORT'] = str(probe.getsockname()[1])
    args = [f'--network={files / "digits.pkl"}', '--batch=4', f'--outdir={tmp_path}', '--device=cpu']
    ranks = []
    for rank, seeds in enumerate(['--seeds=0-199', '--seeds=0-99999']):  # rank 1 has more to do, and dies over it
        command = [sys.executable, str(ROOT / 'generate.py'), *args, seeds]
        environment = {**os.environ, **group, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    wait_for_images(tmp_path, ranks[1])
    ranks[1].kill()
    ranks[1].communicate()
    _, err = ranks[0].communicate(timeout=TIMEOUT)
    assert ranks[0].returncode == 1
    assert 'Error: rank 0 lost contact with another process' in err.splitlines()[-1]
    assert 'the same command continues' in err.splitlines()[-1]


def test_a_full_disk_is_one_line(files, tmp_path, monkeypatch):
    calls = []

    def full_after_six(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(dnnlib.util.os, 'fsync', full_after_six)
    args = [f'--network={files / "digits.pkl"}', f'--outdir={tmp_path}', '--seeds=0-99', '--batch=4', '--steps=1']
    outcome = run(*args, '--device=cpu')
    monkeypatch.undo()
    assert outcome.status == 1
    last = outcome.err.splitlines()[-1]
    assert re.fullmatch(r'Error: cannot write .*\.png: No space left on device; .* the same command continues', last)
    there = contents(tmp_path)
    assert len(there) == 6
    assert not any(name.startswith('.tmp_') for name in there)
    assert run(*args, '--device=cpu').status == 0
    assert len(contents(tmp_path)) == 101


def test_a_batch_that_is_too_large_for_the_memory_is_one_line(files, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, 'to_uint8', lambda images: torch.empty(2**60))
    outcome = run(f'--network={files / "digits.pkl"}', f'--outdir={tmp_path}', '--steps=1', '--device=cpu')
    assert outcome.status == 1
    last = outcome.err.splitlines()[-1]
    assert re.fullmatch(r'Error: out of memory: .*tried to allocate 4611686018427387904 bytes.*; lower --batch', last)


def test_killed_and_continued_with_fewer_processes(files):
    """benchmarks/killed_run.py, small: it compares all files with those of an undisturbed run."""
    command = [sys.executable, str(ROOT / 'benchmarks' / 'killed_run.py'), '--num=64', '--steps=1', '--kills=2']
    command += ['--batch=4', f'--network={files / "digits.pkl"}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '65 files, all with the same SHA-256'
    assert 'run 1, 2 processes: ' in done.stdout


def test_two_processes_continue_what_one_began_in_an_archive_with_pictures(files, sample, tmp_path):
    pictures = [f'--grid={tmp_path / "grid.png"}', f'--trajectory={tmp_path / "strip.png"}']
    sample('one', '--format=zip', *pictures, batch=2)
    expected = [(tmp_path / name).read_bytes() for name in ('grid.png', 'strip.png')]
    sample('two', '--format=zip', batch=2, seeds='--seeds=0-1')
    args = [f'--network={files / "digits.pkl"}', SEEDS, '--batch=2', '--steps=2', '--format=zip', *pictures]
    process = start(*args, f'--outdir={tmp_path / "two"}', processes=2)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    assert '6 images in' in output
    assert contents(tmp_path / 'two') == contents(tmp_path / 'one')
    assert [(tmp_path / name).read_bytes() for name in ('grid.png', 'strip.png')] == expected


def test_ranks_overwrite_together(files, sample, tmp_path):
    sample('one', '--steps=3', batch=2)
    sample('two', batch=2)
    args = [f'--network={files / "digits.pkl"}', SEEDS, '--batch=2', '--steps=3', '--overwrite']
    process = start(*args, f'--outdir={tmp_path / "two"}', processes=2)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    assert contents(tmp_path / 'two') == contents(tmp_path / 'one')
