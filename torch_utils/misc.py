"""Small tools around tensors and modules that PyTorch lacks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist

P = ParamSpec('P')
T = TypeVar('T')

# ----------------------------------------------------------------------------
# Tensors.

nan_to_num = torch.nan_to_num  # (input, nan=0.0, posinf=None, neginf=None, *, out=None)

symbolic_assert = torch._assert  # (condition, message): an assertion that tracing can record

_constants: dict[tuple[Any, ...], torch.Tensor] = {}


def constant(
    value: Any,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """A constant tensor that is made once and then reused, so that a GPU gets it in one transfer, not one per call.

    Equal arguments give the same tensor object: never write to it.

    Args:
        value: number, nested sequence, or array.
        shape: the value is broadcast to it; its own shape if None.
        dtype: default floating-point type if None.
        device: cpu if None.
        memory_format: contiguous if None.
    """
    array = np.asarray(value)
    shape = tuple(array.shape if shape is None else shape)
    dtype = dtype or torch.get_default_dtype()
    device = _indexed(torch.device(device or 'cpu'))
    memory_format = memory_format or torch.contiguous_format
    key = (array.shape, array.dtype, array.tobytes(), shape, dtype, device, memory_format)
    if key not in _constants:
        # A tensor born in inference mode could not be used in autograd later on.
        with torch.inference_mode(False):
            tensor = torch.tensor(array, dtype=dtype).broadcast_to(shape)
            _constants[key] = tensor.to(device).contiguous(memory_format=memory_format)
    return _constants[key]


def const_like(ref: torch.Tensor, value: Any, shape: Sequence[int] | None = None, **options: Any) -> torch.Tensor:
    """`constant` with the dtype and on the device of `ref`. The source text in EDM2's pickles calls it."""
    return constant(value, shape, **{'dtype': ref.dtype, 'device': ref.device, **options})


def _indexed(device: torch.device) -> torch.device:
    """'cuda' means whichever GPU is current, so it cannot stand in a cache key."""
    if device.type == 'cuda' and device.index is None:
        return torch.device('cuda', torch.cuda.current_device())
    return device


@contextlib.contextmanager
def suppress_tracer_warnings() -> Iterator[None]:
    """Silence `torch.jit.TracerWarning` inside the `with` block, and no other warning."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', category=torch.jit.TracerWarning)
        yield


def assert_shape(tensor: torch.Tensor, ref_shape: Sequence[int | None]) -> None:
    """Check `tensor.shape` against `ref_shape`, where None stands for any size.

    Raises:
        AssertionError: names the number of dimensions, or the first dimension that differs.
    """
    if tensor.ndim != len(ref_shape):
        raise AssertionError(
            f'wrong number of dimensions: got {tensor.ndim}, expected {len(ref_shape)} '
            f'(shape {list(tensor.shape)}, expected {list(ref_shape)})'
        )
    for dim, (size, ref_size) in enumerate(zip(tensor.shape, ref_shape, strict=True)):
        with suppress_tracer_warnings():  # while tracing, sizes are tensors
            differs = ref_size is not None and int(size) != int(ref_size)
        if differs:
            raise AssertionError(
                f'wrong size of dimension {dim}: got {int(size)}, expected {ref_size} '
                f'(shape {list(tensor.shape)}, expected {list(ref_shape)})'
            )


def profiled_function(fn: Callable[P, T]) -> Callable[P, T]:
    """Decorator: calls of `fn` appear under its name in `torch.profiler` traces."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.profiler.record_function(fn.__name__):
            return fn(*args, **kwargs)

    return wrapper


def keep_freed_memory() -> bool:
    """Let the memory of one layer serve the next, instead of going back to the system in between.

    New memory comes page by page, each with an interrupt and filled with zeros. On a CPU that takes up to a fifth of a
    network's evaluation (benchmarks/cost.py); CUDA tensors have PyTorch's own cache. The process then keeps as much as
    it once used.

    Returns:
        Whether the C library can be told: glibc, on Linux, can.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # glibc's malloc.h
    most = 2**31 - 1
    return bool(mallopt(mmap_threshold, most) and mallopt(trim_threshold, most))


def is_out_of_memory(err: Exception) -> bool:
    """Whether a GPU, or the computer, had no memory left: on a CPU, PyTorch raises a plain RuntimeError for that."""
    if isinstance(err, (torch.cuda.OutOfMemoryError, MemoryError)):  # the former, also as torch.OutOfMemoryError
        return True
    causes = 'out of memory', "can't allocate memory", 'not enough memory', 'std::bad_alloc'
    return isinstance(err, RuntimeError) and any(cause in str(err) for cause in causes)


# ----------------------------------------------------------------------------
# Data order.


class InfiniteSampler(torch.utils.data.Sampler[int]):
    """Indices of a dataset, endlessly and in gradually changing order.

    All ranks compute the same stream; position k of it belongs to rank k mod `num_replicas`. The stream walks round a
    shuffled list of all n indices, and after each visit to place i swaps the entries at i and j, where j is uniform
    among the w = rint(`window_size`·n) places that end at i, cyclically (no swap if w < 2). So the order changes a
    little from pass to pass.

    Args:
        dataset: anything with a length.
        rank: which share of the stream to yield, in [0, num_replicas).
        num_replicas: number of shares.
        shuffle: False gives 0, 1, …, n−1 again and again.
        seed: of numpy's `RandomState`.
        window_size: w as a fraction of n, in [0, 1].
        start_idx: position to begin at in the stream of all ranks. To resume a run, the number of images that all ranks
            together have seen; `num_replicas` may differ from the run before.
    """

    def __init__(
        self,
        dataset: Sized,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        window_size: float = 0.5,
        start_idx: int = 0,
    ) -> None:
        super().__init__()  # without the dataset: newer PyTorch refuses the argument
        if len(dataset) == 0:
            raise ValueError('InfiniteSampler: the dataset is empty')
        if not 0 <= rank < num_replicas:
            raise ValueError(f'InfiniteSampler: rank must be in [0, num_replicas={num_replicas}), got {rank}')
        if not 0 <= window_size <= 1:
            raise ValueError(f'InfiniteSampler: window_size must be in [0, 1], got {window_size}')
        if start_idx < 0:
            raise ValueError(f'InfiniteSampler: start_idx must be at least 0, got {start_idx}')
        self.dataset = dataset
        self.start_idx = start_idx
        self.rank, self.num_replicas = rank, num_replicas
        self.shuffle, self.seed, self.window_size = shuffle, seed, window_size

    def __iter__(self) -> Iterator[int]:
        first = self.start_idx + (self.rank - self.start_idx) % self.num_replicas
        return itertools.islice(self._stream(), first, None, self.num_replicas)

    def _stream(self) -> Iterator[int]:
        n = len(self.dataset)
        order = np.arange(n)
        rnd = np.random.RandomState(self.seed)
        window = 0
        if self.shuffle:
            rnd.shuffle(order)
            window = int(np.rint(n * self.window_size))
        places = order.tolist()
        while True:
            # One draw per pass gives the same numbers as one draw per image, and makes skipping to start_idx fast.
            steps_back = rnd.randint(window, size=n).tolist() if window >= 2 else [0] * n
            for i, back in enumerate(steps_back):
                yield places[i]
                j = (i - back) % n
                places[i], places[j] = places[j], places[i]


# ----------------------------------------------------------------------------
# Modules.


def params_and_buffers(module: torch.nn.Module) -> list[torch.Tensor]:
    """All parameters of the module and its children, then all buffers."""
    return [*module.parameters(), *module.buffers()]


def named_params_and_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(dotted name, tensor) of all parameters of the module and its children, then of all buffers."""
    return [*module.named_parameters(), *module.named_buffers()]


@torch.no_grad()
def copy_params_and_buffers(
    src_module: torch.nn.Module, dst_module: torch.nn.Module, require_all: bool = False
) -> None:
    """Copy parameters and buffers by name; `dst_module` keeps its dtype, device and `requires_grad`.

    Names that only one of the modules has are left alone. All names are checked before anything is written.

    Raises:
        KeyError: with `require_all`, `dst_module` has a name that `src_module` lacks.
        ValueError: the same name has another shape.
    """
    src = dict(named_params_and_buffers(src_module))
    dst = dict(named_params_and_buffers(dst_module))
    if require_all and (missing := [name for name in dst if name not in src]):
        raise KeyError(f'{type(src_module).__name__} lacks {", ".join(missing)}')
    pairs = [(name, src[name], tensor) for name, tensor in dst.items() if name in src]
    for name, source, target in pairs:
        if source.shape != target.shape:
            raise ValueError(f'{name}: cannot copy shape {list(source.shape)} to shape {list(target.shape)}')
    for _name, source, target in pairs:
        target.copy_(source)


def ddp_sync(module: torch.nn.Module, sync: bool) -> contextlib.AbstractContextManager[None]:
    """Inside the `with` block, backward passes of a `DistributedDataParallel` module average gradients only if `sync`.

    Other modules are not affected. With several backward passes per step, only the last needs `sync=True`.
    """
    if isinstance(module, torch.nn.parallel.DistributedDataParallel) and not sync:
        return module.no_sync()
    return contextlib.nullcontext()


@torch.no_grad()
def check_ddp_consistency(module: torch.nn.Module, ignore_regex: str | None = None) -> None:
    """Check that all ranks hold the same parameters and buffers as rank 0; NaN equals NaN.

    Every rank must call this, and on failure every rank raises, so that none is left waiting. Without a process group
    there is nothing to check.

    Args:
        module: the module, with the same tensor names and shapes on all ranks.
        ignore_regex: tensors whose whole name, such as 'Linear.weight', matches are skipped.

    Raises:
        AssertionError: names the tensors that differ, as `ClassName.param.name`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    named = [(f'{type(module).__name__}.{name}', tensor) for name, tensor in named_params_and_buffers(module)]
    named = [(name, t) for name, t in named if ignore_regex is None or not re.fullmatch(ignore_regex, name)]
    if not named:
        return
    differs = torch.stack([_differs_from_rank0(tensor) for _name, tensor in named]).int()
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if bad := [name for (name, _tensor), flag in zip(named, differs.tolist(), strict=True) if flag]:
        raise AssertionError(f'not equal on all ranks: {", ".join(bad)}')


def _differs_from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    mine = tensor.detach().contiguous()
    theirs = mine.clone()
    dist.broadcast(theirs, src=0)
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    return ~same.all()


# ----------------------------------------------------------------------------
# Module summary.


def print_module_summary(
    module: torch.nn.Module, inputs: Sequence[Any], max_nesting: int = 3, skip_redundant: bool = True
) -> Any:
    """Run `module(*inputs)` once and print a table of its submodules: parameters, buffers, output shapes and dtypes.

    A row counts the elements of the tensors that the submodule itself owns; at depth `max_nesting` (the module itself
    has depth 0) also those of its children, which get no rows. So the columns add up to the totals; a shared tensor
    counts where it appears first. The module's mode, the grad mode and the random state are used as they are.

    Args:
        module: the module.
        inputs: positional arguments of its forward pass.
        max_nesting: depth of the deepest rows.
        skip_redundant: leave out rows that own nothing and only pass on what a child returned.

    Returns:
        What the module returned.
    """
    submodules = [(name, sub) for name, sub in module.named_modules() if _depth(name) <= max_nesting]
    outputs, redundant, result = _run_and_record(module, inputs, [sub for _name, sub in submodules])
    rows = []
    totals = [0, 0]
    counted: set[int] = set()
    for name, sub in submodules:
        recurse = _depth(name) == max_nesting
        counts = [_count_new(t, counted) for t in (sub.parameters(recurse=recurse), sub.buffers(recurse=recurse))]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        if skip_redundant and not any(counts) and (sub in redundant or sub not in outputs):
            continue
        rows += _module_rows(name or '<top-level>', counts, outputs.get(sub, []))
    _print_table(type(module).__name__, rows, totals)
    return result


def _depth(name: str) -> int:
    return name.count('.') + 1 if name else 0


def _run_and_record(
    module: torch.nn.Module, inputs: Sequence[Any], submodules: Iterable[torch.nn.Module]
) -> tuple[dict[torch.nn.Module, list[torch.Tensor]], set[torch.nn.Module], Any]:
    """The tensors that each submodule returned, the submodules that returned only tensors seen before, and the result.

    The recorded tensors stay referenced till the end of the run, else an id could be given out twice.
    """
    outputs: dict[torch.nn.Module, list[torch.Tensor]] = {}
    redundant: set[torch.nn.Module] = set()
    seen: dict[int, torch.Tensor] = {}

    def record(sub: torch.nn.Module, _args: Any, output: Any) -> None:
        tensors = _tensors_in(output)
        outputs[sub] = tensors
        if all(id(t) in seen for t in tensors):
            redundant.add(sub)
        seen.update({id(t): t for t in tensors})

    hooks = [sub.register_forward_hook(record) for sub in submodules]
    try:
        result = module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, redundant, result


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


def _count_new(tensors: Iterable[torch.Tensor], counted: set[int]) -> int:
    """Elements of those tensors that are not in `counted` yet; puts them there."""
    new = {id(t): t.numel() for t in tensors if id(t) not in counted}
    counted.update(new)
    return sum(new.values())


def _module_rows(name: str, counts: list[int], outputs: list[torch.Tensor]) -> list[list[str]]:
    """One row per output; only the first carries the name and the counts."""
    described = [(str(list(t.shape)), str(t.dtype).removeprefix('torch.')) for t in outputs] or [('-', '-')]
    labels = [name, *(f'{count:,}' if count else '-' for count in counts)]
    return [[*(labels if k == 0 else [f'{name}:{k}', '-', '-']), *text] for k, text in enumerate(described)]


def _print_table(title: str, rows: list[list[str]], totals: list[int]) -> None:
    header = [title, 'Parameters', 'Buffers', 'Output shape', 'Datatype']
    total = ['Total', *(f'{count:,}' for count in totals), '-', '-']
    table = [header, *rows, total]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    rule = ['-' * width for width in widths]
    for row in [header, rule, *rows, rule, total]:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
