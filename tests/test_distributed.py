"""One process: plain tests. Two processes: torchrun runs this file as a script, once for all tests of the outcome."""

import atexit
import datetime
import json
import os
import subprocess
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from torch_utils import distributed, misc, training_stats

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for key in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have so many GPUs, and mps or not; returns the list of GPUs made current."""

    def pretend(gpus=0, mps=False):
        current = []
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
        monkeypatch.setattr(torch.cuda, 'set_device', current.append)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        return current

    return pretend


# ----------------------------------------------------------------------------
# One process


def test_one_process_needs_no_group(capsys):
    assert distributed.init('cpu') == torch.device('cpu')
    assert not torch.distributed.is_initialized()
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    distributed.barrier()
    distributed.print0('one', 'line', sep=' ')
    assert capsys.readouterr().out == 'one line\n'


def test_job_hooks_do_nothing():
    assert distributed.should_stop() is False
    assert distributed.update_progress(3, 10) is None


@pytest.mark.parametrize(
    ('gpus', 'mps', 'world_size', 'expected'),
    [
        (2, True, '1', 'cuda:0'),
        (2, False, '2', 'cuda:0'),
        (0, True, '1', 'mps'),
        (0, True, '2', 'cpu'),
        (0, False, '1', 'cpu'),
    ],
)
def test_automatic_device(machine, monkeypatch, gpus, mps, world_size, expected):
    machine(gpus, mps)
    monkeypatch.setenv('WORLD_SIZE', world_size)
    assert distributed.select_device() == torch.device(expected)


@pytest.mark.parametrize(
    ('name', 'local_rank', 'index'), [(None, '1', 1), ('cuda', '1', 1), ('cuda', None, 0), ('cuda:0', '1', 0)]
)
def test_gpu_is_local_rank_unless_named(machine, monkeypatch, name, local_rank, index):
    current = machine(gpus=2)
    if local_rank is not None:
        monkeypatch.setenv('LOCAL_RANK', local_rank)
    assert distributed.select_device(name) == torch.device('cuda', index)
    assert current == [index]


def test_a_name_overrides(machine):
    machine(gpus=1, mps=True)
    assert distributed.select_device('cpu') == torch.device('cpu')
    assert distributed.select_device(torch.device('mps')) == torch.device('mps')


@pytest.mark.parametrize(
    ('name', 'gpus', 'local_rank', 'message'),
    [
        ('tpu', 0, '0', "--device must be 'cuda', 'cuda:N', 'mps' or 'cpu', got 'tpu'"),
        ('meta', 0, '0', "got 'meta'"),
        ('cuda', 0, '0', 'no CUDA device; use --device=cpu'),
        ('mps', 0, '0', 'mps is not available here; use --device=cpu'),
        ('mps', 1, '0', 'use --device=cuda'),
        ('cuda:1', 1, '0', 'asked for GPU 1, but PyTorch sees 1'),
        (None, 2, '2', 'start at most 2 processes per node'),
        (None, 1, 'one', "LOCAL_RANK must be an integer, got 'one'"),
    ],
)
def test_unavailable_devices_are_explained(machine, monkeypatch, name, gpus, local_rank, message):
    machine(gpus)
    monkeypatch.setenv('LOCAL_RANK', local_rank)
    with pytest.raises(ValueError, match=message):
        distributed.select_device(name)


@pytest.mark.parametrize(
    ('device', 'os_name', 'backend'), [('cuda', 'posix', 'nccl'), ('cuda', 'nt', 'gloo'), ('cpu', 'posix', 'gloo')]
)
def test_backend_and_defaults(machine, monkeypatch, device, os_name, backend):
    machine(gpus=2)
    calls, at_exit = [], []
    environ = {'WORLD_SIZE': '2', 'MASTER_PORT': '1234', 'RANK': '0'}
    monkeypatch.setattr(distributed, 'os', types.SimpleNamespace(name=os_name, environ=environ))
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(distributed.atexit, 'register', at_exit.append)
    selected = distributed.init(device)
    bound = {'device_id': selected} if backend == 'nccl' else {}
    assert calls == [{'backend': backend, 'init_method': 'env://', **bound}]
    assert environ == {
        'WORLD_SIZE': '2',
        'MASTER_ADDR': 'localhost',
        'MASTER_PORT': '1234',
        'RANK': '0',
        'LOCAL_RANK': '0',
    }
    assert len(at_exit) == 1


# ----------------------------------------------------------------------------
# Two processes


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    """What `_rank_main` wrote on each of two ranks, and what the launcher printed."""
    outdir = tmp_path_factory.mktemp('ranks')
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [*launcher, __file__, str(outdir)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((outdir / f'{rank}.json').read_text()) for rank in range(2)]
    return types.SimpleNamespace(ranks=ranks, stdout=done.stdout, stderr=done.stderr)


def test_two_ranks_form_a_group(two_ranks):
    assert [rank['group'] for rank in two_ranks.ranks] == [[0, 2, 'gloo', 'cpu'], [1, 2, 'gloo', 'cpu']]


@pytest.mark.parametrize('script', ['generate.py', 'train.py'])
def test_half_a_launcher_is_told_at_once(script, tmp_path):
    (tmp_path / 'data').mkdir()
    needed = [f'--outdir={tmp_path}/out', f'--data={tmp_path}/data'] if script == 'train.py' else ['--grid=x.png']
    env = {name: value for name, value in os.environ.items() if name != 'RANK'} | {'WORLD_SIZE': '2'}
    command = [sys.executable, str(ROOT / script), *needed]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr == (
        'Error: the environment has WORLD_SIZE=2, but no RANK: start the processes with torchrun, or unset WORLD_SIZE '
        'for a single one\n'
    )


def test_a_group_that_never_forms_is_one_line(monkeypatch, capsys):
    for name, value in {'WORLD_SIZE': '2', 'RANK': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)
    in_a_second = {'timeout': datetime.timedelta(seconds=1)}
    monkeypatch.setattr(torch.distributed, 'init_process_group', partial(INIT_PROCESS_GROUP, **in_a_second))
    with pytest.raises(ValueError, match='rank 1: the group of 2 processes at localhost:1 has not formed: '):
        distributed.init('cpu')
    assert capsys.readouterr().err == 'Rank 1 is waiting for the group of 2 processes at localhost:1 ...\n'


INIT_PROCESS_GROUP = torch.distributed.init_process_group


def test_print0_prints_once(two_ranks):
    assert two_ranks.stdout.count('hello from rank') == 1
    assert 'hello from rank 0' in two_ranks.stdout


def test_group_ends_without_complaint(two_ranks):
    # A thread of the group that outlives it aborts the process when it meets an interpreter that has ended.
    assert two_ranks.stdout.count('group at exit: False, threads: 0') == 2
    assert 'destroy_process_group' not in two_ranks.stderr


def test_statistics_add_up_over_ranks(two_ranks):
    first, second = (rank['stats'] for rank in two_ranks.ranks)
    assert first == second
    # Rank 0 reported 0, 1 and rank 1 reported 2, 3, 4.
    assert first['all'] == {'num': 5, 'mean': 2, 'std': pytest.approx(2**0.5)}
    assert first['rank 0'] == {'num': 1, 'mean': 10, 'std': 0}
    assert first['only 1'] == {'num': 2, 'mean': 6, 'std': 1}
    assert list(first) == ['all', 'rank 0', 'only 0', 'only 1']


def test_equal_modules_are_consistent(two_ranks):
    assert [rank['equal'] for rank in two_ranks.ranks] == [None, None]


def test_every_rank_names_the_tensors_that_differ(two_ranks):
    expected = 'not equal on all ranks: Tensors.weight, Tensors.flags, Tensors.count'
    assert [rank['unequal'] for rank in two_ranks.ranks] == [expected] * 2


def test_nan_differs_from_a_number(two_ranks):
    assert [rank['nan'] for rank in two_ranks.ranks] == ['not equal on all ranks: Tensors.weight'] * 2


def test_ignored_tensors_may_differ(two_ranks):
    assert [rank['ignored'] for rank in two_ranks.ranks] == [None, None]


def test_ddp_sync_decides_when_gradients_are_averaged(two_ranks):
    # The local gradient is 1 on rank 0 and 3 on rank 1; a second backward pass adds it again, then averages.
    assert [rank['grads'] for rank in two_ranks.ranks] == [[1, 4], [3, 4]]


class Tensors(torch.nn.Module):
    """Parameters and buffers of several types, with NaN in the same place on all ranks."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]).t())
        self.small = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
        self.register_buffer('flags', torch.tensor([True, False]))
        self.register_buffer('count', torch.tensor(5))
        self.register_buffer('empty', torch.zeros(0))


def _complaint(module, **kwargs):
    try:
        misc.check_ddp_consistency(module, **kwargs)
    except AssertionError as error:
        return str(error)
    return None


def _consistency(rank):
    module = Tensors()
    outcome = {'equal': _complaint(module)}
    with torch.no_grad():
        module.weight[0, 1] += rank
        module.flags[1] = rank == 1
        module.count += rank
    outcome['unequal'] = _complaint(module)
    outcome['ignored'] = _complaint(module, ignore_regex=r'Tensors\.(weight|flags|count)')
    module = Tensors()
    if rank == 1:
        torch.nn.init.ones_(module.weight[1:, :1].detach())
    outcome['nan'] = _complaint(module)
    return outcome


def _statistics(rank, device):
    training_stats.init_multiprocessing(rank=rank, sync_device=device)
    collector = training_stats.Collector()
    training_stats.report('all', [[0, 1], [2, 3, 4]][rank])
    training_stats.report0('rank 0', 10 + rank)
    training_stats.report(f'only {rank}', [5, 7])
    collector.update()
    collector.update()
    return collector.as_dict()


def _gradients(rank):
    net = torch.nn.Linear(1, 1, bias=False)
    ddp = torch.nn.parallel.DistributedDataParallel(net)
    grads = []
    for sync in (False, True):
        with misc.ddp_sync(ddp, sync):
            ddp(torch.tensor([[1.0 + 2 * rank]])).sum().backward()
        grads.append(net.weight.grad.item())
    return grads


def _print_remains():
    names = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]  # of the threads; Linux only
    threads = sum('gloo' in name for name in names)
    print(f'group at exit: {torch.distributed.is_initialized()}, threads: {threads}\n', end='')


def _rank_main(outdir):
    warnings.simplefilter('error')
    atexit.register(_print_remains)
    device = distributed.init('cpu')
    assert distributed.init('cpu') == device  # a second call keeps the group
    rank = distributed.get_rank()
    distributed.print0(f'hello from rank {rank}')
    outcome = {
        'group': [rank, distributed.get_world_size(), torch.distributed.get_backend(), str(device)],
        'stats': _statistics(rank, device),
        'grads': _gradients(rank),
        **_consistency(rank),
    }
    distributed.barrier()
    (Path(outdir) / f'{rank}.json').write_text(json.dumps(outcome))


if __name__ == '__main__':
    _rank_main(sys.argv[1])
