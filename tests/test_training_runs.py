"""Runs of train.py that go on, stop, fail or show what they do: on scikit-learn's digits, mostly in this process."""

import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import dataset_tool
import dnnlib
import train
from images import pictures
from sampling import choose, draw
from torch_utils import distributed, interrupts, misc, network_io
from training import networks, reporter, run_state, training_loop

ROOT = pathlib.Path(train.__file__).parent
TIMEOUT = 900  # seconds: a loaded machine is no failure
NETWORK = ['--cbase=8', '--cres=1', '--num-blocks=1']
SMALL = [*NETWORK, '--batch=16', '--augment=0', '--workers=0', '--tick=1', '--dump=1', '--seed=1', '--device=cpu']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'digits.zip'
    run = CliRunner().invoke(dataset_tool.main, ['--source=digits', f'--dest={path}', '--max-images=40'])
    assert run.exit_code == 0, run.output
    return path


def train_here(data, outdir, *options):
    return CliRunner().invoke(train.main, [f'--outdir={outdir}', f'--data={data}', *SMALL, '--nosubdir', *options])


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory):
    """Two kimg in one go: the states 1 and 2, with sample sheets."""
    outdir = tmp_path_factory.mktemp('run') / 'finished'
    run = train_here(data, outdir, '--duration=0.002', '--samples=3', '--snap=1')
    assert run.exit_code == 0, run.output
    return outdir


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / 'copied')


def assert_same_state(first, second):
    first, second = (torch.load(path, weights_only=True) for path in (first, second))
    for part in ('net', 'ema'):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items()), part
    for key, moments in first['optimizer']['state'].items():
        assert torch.equal(moments['exp_avg_sq'], second['optimizer']['state'][key]['exp_avg_sq'])
    assert torch.equal(first['rng'][0]['cpu'], second['rng'][0]['cpu'])
    assert (first['cur_nimg'], first['cur_tick']) == (second['cur_nimg'], second['cur_tick'])


# ----------------------------------------------------------------------------
# Going on.


def test_loading_processes_end_with_the_run(data, tmp_path):
    """Left to the interpreter, they would keep it waiting for GRACE_SEC seconds."""
    run = train_here(data, tmp_path, '--duration=0.0001', '--workers=1')
    assert run.exit_code == 0, run.output
    assert multiprocessing.active_children() == []


def test_the_same_command_again_goes_on(data, finished, tmp_path, monkeypatch):
    """Stopped in the middle of a tick; and neither the stop nor --samples leaves a trace in the weights."""
    steps = itertools.count(1)
    monkeypatch.setattr(distributed, 'should_stop', lambda: next(steps) == 90)
    options = [data, tmp_path, '--duration=0.002']
    stopped = train_here(*options)
    assert stopped.exit_code == 0, stopped.output
    assert 'Stopped by request at 1.4 kimg' in stopped.output
    assert torch.load(tmp_path / 'training-state-000001.pt', weights_only=True)['cur_nimg'] == 90 * 16
    assert train_here(*options).exit_code == 0
    assert_same_state(finished / 'training-state-000002.pt', tmp_path / 'training-state-000002.pt')

    again = train_here(*options)
    assert again.exit_code == 0
    assert 'This run is complete: 2.0 of 2 kimg' in again.output


def test_the_seed_goes_on_too(data, copied):
    config = dry_run(data, copied, '--nosubdir', '--augment=0')
    assert '"seed": 1,' in config
    assert '"resume_kimg": 2,' in config
    assert f'"resume_state_dump": "{copied}/training-state-000002.pt"' in config
    assert f'"resume_pkl": "{copied}/network-snapshot-000002.pkl"' in config


def dry_run(data, outdir, *options):
    run = CliRunner().invoke(train.main, [f'--outdir={outdir}', f'--data={data}', *NETWORK, '--dry-run', *options])
    assert run.exit_code == 0, run.output
    return run.output


def test_latest_is_of_the_newest_run_of_the_same_name(tmp_path):
    for name in ('00000-a', '00002-a', '00010-b', '00011-a'):
        (tmp_path / name).mkdir()
    for name in ('00000-a', '00002-a', '00010-b'):
        torch.save({}, tmp_path / name / 'training-state-000001.pt')
    state = train.find_state('latest', str(tmp_path / '00012-a'))
    assert state == str(tmp_path / '00002-a' / 'training-state-000001.pt')
    with pytest.raises(train.click.ClickException, match='found no training-state'):
        train.find_state('latest', str(tmp_path / '00012-c'))
    with pytest.raises(train.click.ClickException, match='no training-state'):
        train.find_state(str(tmp_path / '00011-a'), 'unused')
    assert train.find_state(None, str(tmp_path / '00013-a')) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    """Within the weights, where PyTorch would not notice."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('damage', [truncate, flip_a_bit])
def test_a_damaged_state_is_told_and_the_one_before_taken(data, copied, capsys, damage):
    newest = copied / 'training-state-000002.pt'
    damage(newest)
    assert train.find_state(str(copied), 'unused') == str(copied / 'training-state-000001.pt')
    assert f'{newest} is damaged' in capsys.readouterr().out
    run = train_here(data, copied, '--duration=0.003', f'--resume={newest}')
    assert run.exit_code == 1
    assert f'{newest} is damaged' in run.output
    assert 'Traceback' not in run.output


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no named pipes')
def test_a_pipe_is_no_state(data, copied):
    os.mkfifo(copied / 'training-state-000009.pt')
    run = train_here(data, copied, '--duration=0.002', '--samples=3', '--snap=1')
    assert 'training-state-000009.pt is damaged (it is not a file); passed over' in run.output
    assert 'This run is complete' in run.output


def test_damaged_states_alone_start_nothing(data, copied, tmp_path):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    for path in copied.glob('*.pt'):
        truncate(path)
    for options in ([], [f'--resume={copied}'], ['--resume=latest']):
        run = train_here(data, copied, '--duration=0.003', *options)
        assert run.exit_code == 1, options
        assert f'all 2 training states in {copied} are damaged; delete them to start anew' in run.output
    assert all(path.suffix == '.pt' or path.read_bytes() == before[path.name] for path in copied.iterdir())


def test_a_state_of_something_else_is_refused(data, copied):
    options = copied / 'training_options.json'
    before = options.read_text()
    other = train_here(data, copied, '--duration=0.003', '--cbase=16', '--lr=1e-4', '--precond=vp')
    assert other.exit_code == 1
    message = other.stderr
    assert f'{copied}/training-state-000002.pt is of another network' in message
    assert 'class_name: training.networks.EDMPrecond → training.networks.VPPrecond' in message
    assert 'model_channels: 8 → 16' in message
    assert 'lr:' not in message
    assert options.read_text() == before
    options.unlink()  # a state that someone moved
    other = train_here(data, copied, '--duration=0.003', '--cbase=16')
    assert other.exit_code == 1
    assert 'does not fit this run' in other.output
    options.write_text(before)
    torch.save({'weights': torch.zeros(1)}, copied / 'training-state-000002.pt')
    no_state = train_here(data, copied, '--duration=0.003')
    assert no_state.exit_code == 1
    assert 'is not the state of a training run' in no_state.output
    with zipfile.ZipFile(copied / 'training-state-000002.pt', 'w') as archive:
        archive.writestr('readme.txt', 'no tensors')
    no_state = train_here(data, copied, '--duration=0.003')
    assert no_state.exit_code == 1
    assert 'is not the state of a training run' in no_state.output
    assert '--trust-pickle' not in no_state.output


@pytest.mark.parametrize('change', [{'elapsed_sec': float('nan')}, {'cur_nimg': 'many'}, {'net': 5}, {'rng': None}])
def test_a_state_with_odd_content_is_refused(data, copied, change):
    path = copied / 'training-state-000002.pt'
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    run = train_here(data, copied, '--duration=0.003')
    assert run.exit_code == 1
    assert f'{path} does not fit this run' in run.output
    assert 'Traceback' not in run.output


def test_what_a_run_that_goes_on_does_otherwise_is_told(data, copied):
    run = dry_run(
        data, copied, '--nosubdir', '--batch=16', '--augment=0', '--workers=0', '--tick=1', '--dump=1', '--lr=1e-4'
    )
    [line] = [line for line in run.splitlines() if line.startswith('Changed since')]
    assert line.startswith(f'Changed since {copied}/training-state-000002.pt: ')
    assert 'lr: 0.001 → 0.0001' in line
    assert 'total_kimg: 2 → 200000' in line
    assert 'kimg_per_tick' not in line
    assert 'resume_kimg' not in line


# ----------------------------------------------------------------------------
# EDM's own states: the network as an object, Adam's state, and nothing else.


def small_run(seed):
    torch.manual_seed(seed)
    net = networks.EDMPrecond(8, 1, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1)
    ema = networks.EDMPrecond(8, 1, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1)
    kwargs = {'class_name': 'torch.optim.Adam', 'lr': 1e-3}
    run = run_state.Run(net, ema, training_loop.make_optimizer(net, kwargs))
    net(torch.ones(2, 1, 8, 8), torch.ones(2)).sum().backward()
    run.optimizer.step()
    return run


@pytest.fixture
def edm_run(tmp_path):
    theirs = small_run(seed=1)
    optimizer_state = theirs.optimizer.state_dict()
    for group in optimizer_state['param_groups']:
        group.update(fused=None)
    torch.save({'net': theirs.net, 'optimizer_state': optimizer_state}, tmp_path / 'training-state-000005.pt')
    network_io.save_network(theirs.ema, tmp_path / 'network-snapshot-000005.pkl')
    return theirs, str(tmp_path / 'training-state-000005.pt'), str(tmp_path / 'network-snapshot-000005.pkl')


def test_states_of_edm_are_read_on_trust(edm_run):
    theirs, state, snapshot = edm_run
    ours = small_run(seed=2)
    ours.load(state, snapshot, trust_pickle=True)
    for part in ('net', 'ema'):
        pairs = zip(getattr(theirs, part).parameters(), getattr(ours, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), part
    moments = [run.optimizer.state_dict()['state'][0]['exp_avg'] for run in (theirs, ours)]
    assert torch.equal(*moments)
    assert ours.optimizer.param_groups[0]['fused'] is True
    assert (ours.cur_nimg, ours.tick_start_nimg, ours.cur_tick) == (5000, 5000, 0)
    with pytest.raises(ValueError, match='has to lie beside it'):
        ours.load(state, None, trust_pickle=True)


def test_states_of_edm_are_not_read_without_trust(data, edm_run):
    _, state, _ = edm_run
    run = train_here(data, os.path.dirname(state), '--duration=0.01')
    assert run.exit_code == 1
    assert '--trust-pickle' in run.output
    assert 'Traceback' not in run.output


# ----------------------------------------------------------------------------
# Ends before the end.


@pytest.mark.parametrize(('number', 'workers'), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGHUP, 0)])
def test_signals_end_a_run_with_a_state(data, tmp_path, number, workers):
    """SIGINT as the terminal sends it, to the loading process as well."""
    command = [sys.executable, str(ROOT / 'train.py'), f'--outdir={tmp_path}', f'--data={data}', *SMALL, '--nosubdir']
    run = subprocess.Popen(
        [*command, f'--workers={workers}', '--duration=10'],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + TIMEOUT
    while not (tmp_path / 'network-snapshot-000000.pkl').exists() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, number)
    output, _ = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 0, output
    assert f'Stopped by {number.name} at' in output
    assert 'Traceback' not in output
    [state] = list(tmp_path.glob('training-state-*.pt'))
    assert f'--resume={state}' in output
    assert run_state.find_damage(str(state)) is None
    assert torch.load(state, weights_only=True)['cur_nimg'] > 0
    snapshot = str(state).replace('training-state', 'network-snapshot').replace('.pt', '.pkl')
    assert network_io.load_network(snapshot).img_resolution == 8


def test_a_closed_pipe_ends_a_run_with_a_state(data, tmp_path):
    """As `train.py … | head` has it."""
    command = [sys.executable, str(ROOT / 'train.py'), f'--outdir={tmp_path}', f'--data={data}', *SMALL, '--nosubdir']
    run = subprocess.Popen([*command, '--duration=10'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + TIMEOUT
    while not (tmp_path / 'network-snapshot-000000.pkl').exists() and time.time() < deadline:
        time.sleep(0.05)
    run.stdout.close()
    _, err = run.communicate(timeout=TIMEOUT)
    assert (run.returncode, err) == (0, '')
    assert 'Stopped by SIGHUP at' in (tmp_path / 'log.txt').read_text()
    [state] = list(tmp_path.glob('training-state-*.pt'))
    assert run_state.find_damage(str(state)) is None


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='this system has no such signal')
def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupts.Interrupts() as noted:
        signal.raise_signal(signal.SIGHUP)
        assert noted.received is None
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_a_stop_at_the_end_of_a_tick_finishes_the_tick(data, tmp_path, monkeypatch):
    step = training_loop.Trainer.step
    monkeypatch.setattr(training_loop.Trainer, 'step', lambda self: (step(self), signal.raise_signal(signal.SIGTERM)))
    run = train_here(data, tmp_path, '--duration=0.003', '--batch=1000', '--snap=1')
    assert run.exit_code == 0, run.output
    assert 'Stopped by SIGTERM at 1.0 kimg' in run.output
    assert (tmp_path / 'network-snapshot-000001.pkl').exists()
    assert len((tmp_path / 'stats.jsonl').read_text().splitlines()) == 1


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal has it: a shell that starts a program in the background lets it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('interruptible')
def test_a_repeated_signal_ends_a_run_only_after_a_while(monkeypatch):
    clock = iter([0.0, 0.5, 1.5])
    monkeypatch.setattr(interrupts, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))  # of no other thread
    with interrupts.Interrupts() as noted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # Ctrl-C, and the launcher passes it on
        assert noted.received == 'SIGINT'
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_transferred_run_goes_on_with_its_own_average(data, finished, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    start = [f'--transfer={finished}/network-snapshot-000002.pkl', '--ema=0.5']
    assert train_here(data, whole, *start, '--duration=0.002').exit_code == 0
    assert train_here(data, parts, *start, '--duration=0.001').exit_code == 0
    run = train_here(data, parts, f'--resume={parts}', '--ema=0.5', '--duration=0.002')
    assert run.exit_code == 0, run.output
    assert_same_state(whole / 'training-state-000002.pt', parts / 'training-state-000002.pt')


def test_a_folder_that_cannot_be_written_is_one_line(data, tmp_path):
    (tmp_path / 'file').touch()
    run = train_here(data, tmp_path / 'file' / 'run')
    assert run.exit_code == 1
    assert run.stderr.splitlines()[-1].startswith(f'Error: cannot write to the run directory {tmp_path}/file/run: ')


def test_what_a_killed_run_had_half_written_goes(data, copied):
    (copied / '.tmp_0_training-state-000003.pt').touch()
    assert train_here(data, copied, '--duration=0.002').exit_code == 0
    assert not list(copied.glob('.tmp_*'))


def test_two_runs_do_not_share_a_folder(data, copied, tmp_path, monkeypatch):
    """Nor does the second delete what the first is about to write."""
    (copied / '.tmp_0_training-state-000003.pt').touch()
    with dnnlib.util.in_use(copied / 'log.txt') as alone:
        assert alone
        before = {path.name: path.read_bytes() for path in copied.iterdir()}
        second = train_here(data, copied, '--duration=0.003')
        assert second.exit_code == 1
        assert second.stderr.splitlines()[-1] == f'Error: another run is training in {copied}; choose another --outdir'
        assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_runs_that_start_at_once_get_folders_of_their_own(data, tmp_path, monkeypatch):
    """Another run makes the folder just after this one has chosen it."""
    make_config = train.make_config

    def overtaken(opts, dataset, state):
        os.mkdir(train.run_dir_name(opts, dataset.name))
        return make_config(opts, dataset, state)

    monkeypatch.setattr(train, 'make_config', overtaken)
    command = [f'--outdir={tmp_path}', f'--data={data}', *SMALL, '--duration=0.00001']
    run = CliRunner().invoke(train.main, command)
    assert run.exit_code == 0, run.output
    first, second = sorted(tmp_path.iterdir())
    assert (first.name[:6], second.name[:6]) == ('00000-', '00001-')
    assert list(first.iterdir()) == []
    assert f'Another run has made that directory; this one has {second}' in run.output
    assert (second / 'training-state-000001.pt').exists()


def test_a_clock_that_goes_back_spoils_no_state(data, copied, monkeypatch):
    path = copied / 'training-state-000002.pt'
    torch.save({**torch.load(path, weights_only=True), 'elapsed_sec': -3591.05}, path)  # as version 0.1 wrote it
    now = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, 'time', lambda: next(now))
    run = train_here(data, copied, '--duration=0.003')
    assert run.exit_code == 0, run.output
    assert 0 <= torch.load(copied / 'training-state-000003.pt', weights_only=True)['elapsed_sec'] < 600


def test_a_full_disk_ends_the_run_and_spares_the_files(data, copied):
    resource = pytest.importorskip('resource')
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.suffix in ('.pt', '.pkl')}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before['training-state-000002.pt']) // 2, hard))
    try:
        run = train_here(data, copied, '--duration=0.003', '--snap=1000')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.exit_code == 1
    assert re.search(r'cannot write .*File too large.*the files written before are whole', run.output), run.output
    assert 'Traceback' not in run.output
    assert all((copied / name).read_bytes() == content for name, content in before.items())
    assert not (copied / 'training-state-000003.pt').exists()
    assert not list(copied.glob('.tmp*'))


def test_a_loss_without_end_is_reported_and_training_goes_on(data, tmp_path):
    run = train_here(data, tmp_path, '--duration=0.001', '--lr=1e30', '--lr-rampup=0')
    assert run.exit_code == 0, run.output
    warnings = re.findall(r'Warning: (step \d+), rank 0: the loss of (\d+) of 16 .* images ([\d, ]+), …', run.output)
    assert len(warnings) == training_loop.MAX_WARNINGS
    # The first step has learning rate 0, the second ruins the weights, so the third is the first without a number.
    order = itertools.islice(misc.InfiniteSampler(range(40), seed=1), 32, 40)
    assert warnings[0] == ('step 3', '16', ', '.join(map(str, order)))
    assert (tmp_path / 'training-state-000001.pt').exists()


def write_png(path, *shape):
    PIL.Image.fromarray(np.zeros(shape, dtype=np.uint8)).save(path)


def test_an_image_of_another_shape_ends_the_run(tmp_path):
    for i in range(20):
        write_png(tmp_path / f'{i:02d}.png', *([8, 8] if i != 17 else [16, 16]))
    run = train_here(tmp_path, tmp_path / 'out', '--duration=0.001')
    assert run.exit_code == 1
    assert f'{tmp_path}: 17.png has shape [1, 16, 16], the first image [1, 8, 8]' in run.output.splitlines()[-1]


def test_a_bad_image_ends_loading_processes_at_once(data, tmp_path):
    for i in range(20):
        write_png(tmp_path / f'{i:02d}.png', *([8, 8] if i != 17 else [16, 16]))
    command = [sys.executable, 'train.py', f'--outdir={tmp_path}/out', f'--data={tmp_path}', '--nosubdir', *SMALL]
    run = subprocess.run([*command, '--workers=2'], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert run.returncode == 1
    assert '17.png has shape' in run.stderr.splitlines()[-1]
    assert 'Exception ignored' not in run.stderr
    assert '17.png has shape' in (tmp_path / 'out' / 'log.txt').read_text()


def test_errors_of_loading_processes_are_one_line():
    try:
        raise OSError('x.zip: 17.png has shape …')
    except OSError:
        wrapper = torch._utils.ExceptionWrapper(where='in DataLoader worker process 0')
    with pytest.raises(OSError, match='Traceback') as caught:
        wrapper.reraise()
    assert train.explain(caught.value) == 'x.zip: 17.png has shape …'
    assert '--workers=0' in train.explain(RuntimeError('DataLoader worker (pid 5) is killed by signal: Killed.'))
    assert train.explain(RuntimeError('a bug')) is None


@pytest.mark.parametrize(
    ('size', 'options', 'message'),
    [
        ([8, 12], [], '--transform=center-crop --resolution=8x8'),
        ([8, 8], ['--cbase=7', '--augment=0.1'], 'no network has --cbase=7, --cres=[1]: '),
        ([8, 8], ['--desc=../x'], "--desc='../x': letters, digits and ._+=,- only"),
        ([8, 8], ['--resume=latest', '--desc=a+b'], 'found no training-state-*.pt'),
        ([12, 12], ['--cres=1,1,1,1'], '12x12 cannot be halved 3 times'),
        ([8, 8], ['--fp16=1', '--bf16=1'], '--fp16 and --bf16 exclude each other'),
        ([8, 8], ['--resume=latest'], '--resume=latest: found no training-state-*.pt'),
    ],
)
def test_bad_input_gets_one_line(tmp_path, size, options, message):
    (tmp_path / 'data').mkdir()
    write_png(tmp_path / 'data' / '0.png', *size)
    run = train_here(tmp_path / 'data', tmp_path / 'out', *options)
    assert run.exit_code == 1
    assert message in run.output
    assert 'Traceback' not in run.output
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('option', ['tensorboard', 'plot'])
def test_missing_extras_are_named(data, tmp_path, monkeypatch, option):
    monkeypatch.setattr(train.importlib.util, 'find_spec', lambda name: None)
    run = train_here(data, tmp_path, f'--{option}=1')
    assert run.exit_code == 1
    assert f'pip install -e ".[{option}]"' in run.output


# ----------------------------------------------------------------------------
# Pictures.


def test_contact_sheet_fills_up_with_white():
    sheet = pictures.contact_sheet([np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)] * 2, gap=1)
    assert sheet[:, :, 0].tolist() == [[0, 1, 255, 0, 1], [2, 255, 255, 2, 255]]


def test_samples_are_those_of_generate(finished):
    """Three of 8x8 from each sampler, in squares of two by two; the same seeds each time."""
    sheets = [np.array(PIL.Image.open(finished / f'samples-{kimg:06d}.png')) for kimg in (0, 1, 2)]
    assert [sheet.shape for sheet in sheets] == [(16, 36)] * 3
    net = network_io.load_network(str(finished / 'network-snapshot-000002.pkl'))
    for name, left in [('heun', 0), ('rk', 20)]:
        sampler = choose.make(name, num_steps=choose.samplers()[name].num_steps)
        [(_, images)] = draw.generate_images(net, [[0, 1, 2]], sampler, torch.device('cpu'))
        grid = sheets[2][:, left : left + 16]
        for image, (y, x) in zip(images, [(0, 0), (0, 8), (8, 0)], strict=True):
            assert np.abs(grid[y : y + 8, x : x + 8].astype(int) - image[:, :, 0]).max() <= 1
    assert not np.array_equal(sheets[0], sheets[2])


def test_samples_of_a_network_of_label_vectors_have_the_labels_of_the_data(tmp_path):
    vectors = [[0.5, -1, 2], [1, 1, 0], [3, 0.25, 0]]
    data = tmp_path / 'data'
    data.mkdir()
    for i in range(3):
        PIL.Image.fromarray(np.full([8, 8], 80 * i, dtype=np.uint8)).save(data / f'{i}.png')
    (data / 'dataset.json').write_text(json.dumps({'labels': [[f'{i}.png', vectors[i]] for i in range(3)]}))
    options = ['--cond=1', '--duration=0.001', '--samples=2', '--sampler=heun', '--snap=1']
    run = train_here(data, tmp_path / 'run', *options)
    assert run.exit_code == 0, run.output
    sheet = np.array(PIL.Image.open(tmp_path / 'run' / 'samples-000001.png')).astype(int)
    net = network_io.load_network(str(tmp_path / 'run' / 'network-snapshot-000001.pkl'))
    labels = torch.tensor(vectors[:2])
    rnd = draw.StackedRandomGenerator('cpu', [0, 1])
    latents, _ = draw.draw_start(net, rnd, [0, 1], None)
    images = draw.to_uint8(choose.make('heun')(net, latents, labels, randn_like=rnd.randn_like))
    assert np.abs(sheet[:8, :8] - images[0, :, :, 0]).max() <= 1
    assert np.abs(sheet[:8, 8:16] - images[1, :, :, 0]).max() <= 1


def test_loss_curve(data, finished, tmp_path):
    pytest.importorskip('matplotlib')
    stats = finished / 'stats.jsonl'
    assert reporter.read_losses(stats)[0] == pytest.approx([0.016, 1.024, 2])
    reporter.draw_losses({'loss': stats}, tmp_path / 'loss.png')
    with PIL.Image.open(tmp_path / 'loss.png') as picture:
        assert picture.size == (600, 320)


def test_tensorboard(data, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ['--duration=0.001', '--lr-rampup=0.01', '--tensorboard=1', '--samples=1']
    assert train_here(data, tmp_path, *options).exit_code == 0
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()['scalars']) == {'Loss/loss', 'Progress/lr', 'Progress/grad_norm'}
    assert [event.step for event in events.Scalars('Progress/lr')] == [16, 1008]
    assert events.Scalars('Progress/lr')[-1].value == pytest.approx(1e-3 * 992 / 10_000)
    assert events.Scalars('Progress/grad_norm')[0].value > 0
    assert len(events.Images('samples')) == 2


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda moments: moments.update(exp_avg=torch.zeros(1)), 'the moments of parameter 0 are'),
        (lambda moments: moments.update(exp_avg=torch.zeros(0)), 'the moments of parameter 0 are'),
        (lambda moments: moments.update(exp_avg_sq=moments['exp_avg_sq'].flatten()[:-1]), 'the moments of parameter 0'),
        (lambda moments: moments.update(exp_avg=moments['exp_avg'].to(torch.int64)), 'not in floating point'),
        (lambda moments: moments.pop('exp_avg_sq'), 'the moments of parameter 0 are'),
        (lambda moments: moments.update(more=torch.zeros(3)), 'the moments of parameter 0 are'),
        (lambda moments: moments.update(step=torch.zeros(4)), 'the moments of parameter 0 are'),
    ],
)
def test_moments_of_another_shape_or_kind_are_refused(data, copied, change, words):
    """Adam's kernels write as far as they are told to."""
    path = copied / 'training-state-000002.pt'
    content = torch.load(path, weights_only=True)
    change(content['optimizer']['state'][0])
    torch.save(content, path)
    run = train_here(data, copied, '--duration=0.003', f'--resume={path}')
    assert run.exit_code == 1
    assert words in run.output.splitlines()[-1]
    assert 'does not fit this run' in run.output


def test_hyperparameters_of_a_state_are_not_taken(data, copied):
    path = copied / 'training-state-000002.pt'
    content = torch.load(path, weights_only=True)
    content['optimizer']['param_groups'][0] |= {
        'betas': (float('nan'), 2.0),
        'eps': -1.0,
        'lr': 1e30,
        'weight_decay': 9,
    }
    torch.save(content, path)
    assert train_here(data, copied, '--duration=0.003', f'--resume={path}', '--dump=1').exit_code == 0
    group = torch.load(copied / 'training-state-000003.pt', weights_only=True)['optimizer']['param_groups'][0]
    assert (group['betas'], group['eps'], group['weight_decay']) == ((0.9, 0.999), 1e-8, 0)
