"""Training by several processes: torchrun runs this file as a script.

How the data order is made equal: position k of the shuffled stream belongs to rank k mod R, so that in each step two
ranks with 32 images share the 64 images that one rank alone would have. What remains is the noise, which each rank
draws from a generator of its own. Here σ and n of an image are drawn from the image itself (`PerImageLoss`), dropout
and augmentation are off, and everything is computed in float64: then only the order of sums differs.
"""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import dataset_tool
import train
from torch_utils import distributed
from training import loss, run_state, training_loop

ROOT = Path(train.__file__).parent
TIMEOUT = 900  # seconds: a loaded machine is no failure
STEPS, BATCH = 50, 64
TRAIN_OPTIONS = ['--cbase=8', '--cres=1', '--num-blocks=1', '--batch=16', '--augment=0', '--workers=0', '--tick=1']


class PerImageLoss(loss.EDMLoss):
    """EDM's loss, with σ and n that depend on the image only."""

    def __call__(self, net, images, labels, augment_pipe=None):
        draws = torch.stack([self._draw(image) for image in images])
        sigma = (self.P_mean + self.P_std * draws[:, :1]).exp().reshape(-1, 1, 1, 1)
        n = sigma * draws[:, 1:].reshape(images.shape)
        return self.weight(sigma) * (net(images + n, sigma, labels) - images) ** 2

    def _draw(self, image):
        generator = torch.Generator().manual_seed(zlib.crc32(image.numpy().tobytes()))
        return torch.randn(1 + image.numel(), generator=generator, dtype=torch.float64)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'digits.zip'
    run = CliRunner().invoke(dataset_tool.main, ['--source=digits', f'--dest={path}', '--max-images=200'])
    assert run.exit_code == 0, run.output
    return path


def command(processes, *arguments):
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    return [sys.executable, *launcher, __file__, *map(str, arguments)]


def start(processes, *arguments):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(
        command(processes, *arguments),
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process):
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope='module')
def runs(data, tmp_path_factory):
    """Folders of the same training: by one process, in rounds of 16, and by two processes."""
    outdir = tmp_path_factory.mktemp('runs')
    for processes, rounds in [(1, ['one', 'accumulated']), (2, ['two'])]:
        finish(start(processes, 'equal', data, outdir, *rounds))
    return outdir


@pytest.mark.parametrize('other', ['accumulated', 'two'])
def test_the_same_batch_in_parts_gives_the_same_training(runs, other):
    losses, states = [], []
    for name in ('one', other):
        rows = [json.loads(line) for line in (runs / name / 'stats.jsonl').read_text().splitlines()]
        losses.append([row['Loss/loss']['mean'] for row in rows])
        states.append(torch.load(runs / name / 'training-state-000003.pt', weights_only=True))
    assert len(losses[0]) == 6
    assert losses[0][-1] < losses[0][1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # statistics are reduced in float32
    for part in ('net', 'ema'):
        for name, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], value, rtol=1e-8, atol=1e-9)


def test_two_processes_save_the_random_numbers_of_both(runs):
    state = torch.load(runs / 'two' / 'training-state-000003.pt', weights_only=True)
    first, second = (rank['cpu'] for rank in state['rng'])
    assert not torch.equal(first, second)


def test_a_process_that_dies_ends_the_run(data, tmp_path):
    process = start(2, 'die', data, tmp_path)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert 'rank 0 lost contact with another process of this run' in output
    assert 'Signal 9 (SIGKILL)' in output  # by torchrun


def test_two_processes_stop_together(data, tmp_path):
    process = start(2, 'train', data, tmp_path)
    deadline = time.time() + TIMEOUT
    while not (tmp_path / 'network-snapshot-000000.pkl').exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    output, _ = process.communicate(timeout=TIMEOUT)
    assert 'Stopped by SIGTERM at' in output
    [state] = tmp_path.glob('training-state-*.pt')
    assert run_state.find_damage(str(state)) is None
    assert len(torch.load(state, weights_only=True)['rng']) == 2


# ----------------------------------------------------------------------------
# What the processes do.


def _train_equally(data, run_dir, batch_gpu):
    if distributed.get_rank() == 0:
        run_dir.mkdir()
    distributed.barrier()
    training_loop.training_loop(
        run_dir=str(run_dir),
        dataset_kwargs={'class_name': 'training.dataset.ImageFolderDataset', 'path': data},
        data_loader_kwargs={'num_workers': 0},
        network_kwargs={
            'class_name': 'training.networks.EDMPrecond',
            'model_type': 'SongUNet',
            'model_channels': 8,
            'channel_mult': [1],
            'num_blocks': 1,
            'dropout': 0,
        },
        loss_kwargs={'class_name': f'{__name__}.PerImageLoss'},
        optimizer_kwargs={'class_name': 'torch.optim.Adam', 'lr': 1e-3},
        batch_size=BATCH,
        batch_gpu=batch_gpu,
        total_kimg=STEPS * BATCH / 1000,
        lr_rampup_kimg=0.5,
        kimg_per_tick=BATCH / 100,  # ten steps
        snapshot_ticks=100,
        snapshot_format='safetensors',
    )


def _main(job, data, outdir, *names):
    if job == 'equal':
        device = distributed.init('cpu')
        world = distributed.get_world_size()
        train.training_stats.init_multiprocessing(distributed.get_rank(), device if world > 1 else None)
        torch.set_default_dtype(torch.float64)
        for name in names:
            _train_equally(data, Path(outdir) / name, 16 if name == 'accumulated' else None)
        return
    if job == 'die':
        steps = iter(range(1, 1000))
        distributed.should_stop = lambda: (
            next(steps) == 5 and distributed.get_rank() == 1 and os.kill(os.getpid(), signal.SIGKILL)
        )
    options = [*TRAIN_OPTIONS, f'--outdir={outdir}', f'--data={data}', '--nosubdir', '--device=cpu', '--duration=10']
    train.main(options)


if __name__ == '__main__':
    _main(*sys.argv[1:])
