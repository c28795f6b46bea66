"""One interface for one process and for many: device choice, process group, ranks.

A single process needs no process group: rank 0 of 1, and `barrier` returns at once. Under torchrun, or any launcher
that sets WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, `init` joins the group. Importing this module
starts nothing.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from dnnlib.util import one_line

T = TypeVar('T')

_GROUP_DEFAULTS = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500', 'LOCAL_RANK': '0'}
_LOST_PEER = r'gloo.transport|NCCL|Connection (closed|reset) by|Broken pipe'


def init(device: str | torch.device | None = None) -> torch.device:
    """Select the device of this process and, if WORLD_SIZE > 1, join the process group.

    The backend is nccl for CUDA (gloo on Windows, which has no nccl) and gloo otherwise. A group that exists already is
    kept; one made here is destroyed when the interpreter exits.

    Args:
        device: as in `select_device`.

    Returns:
        The device that this process computes on.

    Raises:
        ValueError: the device is not there, or the group does not form.
    """
    selected = select_device(device)
    if _env_int('WORLD_SIZE', 1) > 1 and not _has_group():
        _join_group(selected)
    return selected


def select_device(name: str | torch.device | None = None) -> torch.device:
    """The device to compute on: `name` if given, else the first available of cuda, mps, cpu.

    'cuda' without an index means the GPU numbered LOCAL_RANK (0 if unset), and the chosen GPU becomes the current one.
    mps is not chosen automatically for WORLD_SIZE > 1, because no backend exchanges mps tensors.

    Raises:
        ValueError: the name is unknown, or this machine lacks that device.
    """
    device = _parse_device(name) if name is not None else torch.device(_best_device_type())
    if device.type == 'cuda':
        return _select_cuda(device)
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise ValueError(
            f'--device={device}: mps is not available here; use --device={_best_device_type()}, or leave it out'
        )
    return device


def get_rank() -> int:
    """The number of this process in the group, from 0; 0 without a group."""
    return dist.get_rank() if _has_group() else 0


def get_world_size() -> int:
    """How many processes the group has; 1 without a group."""
    return dist.get_world_size() if _has_group() else 1


def barrier() -> None:
    """Wait until every process of the group has come here; without a group, return at once."""
    if _has_group():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """What rank 0 passes, on every rank. It must pickle."""
    values = [value]
    if _has_group():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def on_rank0(work: Callable[[], T]) -> T:
    """What `work()` returns on rank 0, on every rank.

    Raises:
        Exception: on rank 0, what `work()` raised there. The other ranks end, with SystemExit: rank 0 says why.
    """
    result: T | None = None
    error: Exception | None = None
    if get_rank() == 0:
        try:
            result = work()
        except Exception as err:  # whatever it is, the other ranks must not wait
            error = err
    result, failed = broadcast_object((result, error is not None))
    if error is not None:
        raise error
    if failed:
        raise SystemExit(1)
    return cast(T, result)


def my_share(batches: Sequence[T]) -> Sequence[T]:
    """The batches of this process, every world-size-th; rank 0 has as many as any."""
    return batches[get_rank() :: get_world_size()]


def all_gather_object(value: Any) -> list[Any]:
    """What the processes pass, in the order of their ranks, on every rank. It must pickle."""
    values = [value] * get_world_size()
    if _has_group():
        dist.all_gather_object(values, value)
    return values


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the processes of what each passes, as a new tensor on the same device."""
    total = tensor.clone()
    if not _has_group():
        return total
    total = total.cuda() if dist.get_backend() == 'nccl' else total
    dist.all_reduce(total)
    return total.to(tensor.device)


class AnyRank:
    """`any_rank(mine)` is True on every process at the same call, if `mine` was on one of them.

    With several processes the answer is that of the call before, so that no process has to wait for its GPU.

    Args:
        device: where the votes are counted: cuda for nccl, cpu for gloo.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._votes: torch.Tensor | None = None

    def __call__(self, mine: bool) -> bool:
        if not _has_group():
            return mine
        before, self._votes = self._votes, all_reduce(torch.tensor(float(mine), device=self._device))
        return before is not None and bool(before.item())


def lost_peer(err: RuntimeError) -> bool:
    """Whether PyTorch says with this error that another process of the group is gone."""
    return isinstance(err, dist.DistError) or re.search(_LOST_PEER, str(err)) is not None


def should_stop() -> bool:
    """Whether a long job should save and end early. Always False: a scheduler replaces this function."""
    return False


def update_progress(cur: int, total: int) -> None:
    """Tell a job scheduler that `cur` of `total` units are done. Does nothing: a scheduler replaces this function."""


def print0(*args: Any, **kwargs: Any) -> None:
    """`print` on rank 0, nothing on the other ranks."""
    if get_rank() == 0:
        print(*args, **kwargs)


# ----------------------------------------------------------------------------
# Process group.


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _join_group(device: torch.device) -> None:
    if 'RANK' not in os.environ:
        raise ValueError(
            f'the environment has WORLD_SIZE={os.environ["WORLD_SIZE"]}, but no RANK: start the processes with '
            'torchrun, or unset WORLD_SIZE for a single one'
        )
    for key, default in _GROUP_DEFAULTS.items():
        os.environ.setdefault(key, default)
    rank, world, address, port = (os.environ[key] for key in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'))
    group = f'{world} processes at {address}:{port}'
    if not dist.is_torchelastic_launched():  # torchrun knows of all processes; who else starts them may forget one
        print(f'Rank {rank} is waiting for the group of {group} ...', file=sys.stderr)
    # Its functions take the default group as a default argument: imported later, by DistributedDataParallel, they would
    # keep the group for ever, and its threads running into the end of the interpreter, which now and then aborts then.
    importlib.import_module('torch.distributed.nn')
    # Bound to its GPU, nccl need not guess one in `barrier`, which it does with a warning.
    on_gpu = device.type == 'cuda' and os.name != 'nt'
    chosen: dict[str, Any] = {'backend': 'nccl', 'device_id': device} if on_gpu else {'backend': 'gloo'}
    try:
        dist.init_process_group(init_method='env://', **chosen)
    except RuntimeError as err:
        raise ValueError(f'rank {rank}: the group of {group} has not formed: {one_line(err, 300)}') from err
    atexit.register(_leave_group)


def _leave_group() -> None:
    if _has_group():
        dist.destroy_process_group()
        gc.collect()  # a DistributedDataParallel, which is part of a reference cycle, holds the group too


def _env_int(key: str, default: int) -> int:
    text = os.environ.get(key, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f'environment variable {key} must be an integer, got {text!r}') from None


# ----------------------------------------------------------------------------
# Devices.


def _best_device_type() -> str:
    if torch.cuda.is_available():
        return 'cuda'
    if torch.backends.mps.is_available() and _env_int('WORLD_SIZE', 1) == 1:
        return 'mps'
    return 'cpu'


def _parse_device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cuda', 'mps', 'cpu'):
        raise ValueError(f"--device must be 'cuda', 'cuda:N', 'mps' or 'cpu', got {str(name)!r}")
    return device


def _select_cuda(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(
            f'--device={device}: PyTorch {torch.__version__} sees no CUDA device; '
            f'use --device={_best_device_type()}, or leave it out'
        )
    index = device.index if device.index is not None else _env_int('LOCAL_RANK', 0)
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(
            f'--device={device}: asked for GPU {index}, but PyTorch sees {count} (numbered from 0); '
            f'start at most {count} processes per node, or use --device=cpu'
        )
    torch.cuda.set_device(index)
    return torch.device('cuda', index)
