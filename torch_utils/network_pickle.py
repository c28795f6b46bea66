"""Network pickles of EDM and EDM2 as data: the class that a file names, its arguments, weights and source text.

`read` is the way in. The source text is kept as text, to be hashed; nothing runs it. What the names in such files stand
for is in `_table`: a persistent object becomes a `Record` of its class name, source and state, and a tensor is cut from
its storage after the cut is checked, which PyTorch's own function does not do. A storage is a file of `torch.save` in
its old form inside the pickle, a stream of five small pickles and the numbers; the same interpreter reads it, so that
`torch.load` has no part in any of this.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

from dnnlib import safe_pickle
from dnnlib.safe_pickle import Budget, Reader, Record, SafePickleError, Table, expect

FORMAT_VERSION = 6
MAX_DIMENSIONS = 16


@dataclass
class StoredNetwork:
    """What a file says of a network.

    Attributes:
        class_name: of the network, as its own module calls it; nothing says that such a class exists here.
        init_args, init_kwargs: what it was constructed with, plain values.
        weights: parameters and buffers by dotted name.
        sources: the Python texts that the file gives for the classes of the network and its parts.
        entries: what stands beside the network, by name: a class name, or the type of a value.
    """

    class_name: str
    init_args: tuple
    init_kwargs: dict[str, Any]
    weights: dict[str, torch.Tensor]
    sources: set[str] = field(default_factory=set)
    entries: dict[str, str] = field(default_factory=dict)


def refuse_name(module: str, name: str) -> NoReturn:
    raise SafePickleError(
        f'the file wants to call {f"{module}.{name}"!r}, which no known network needs; '
        'if you trust its author, use --trust-pickle'
    )


def read(data: bytes, unknown: Callable[[str, str], Callable[..., Any]] = refuse_name) -> StoredNetwork:
    """The network in a pickle: `ema` of a training snapshot, or a bare network.

    unknown: as in `safe_pickle.read_pickle`.

    Raises:
        SafePickleError: this is no pickle, or it is damaged, or it needs more than networks need, or has no network.
    """
    budget = Budget(len(data))
    tree = safe_pickle.read_pickle(data, _table(budget), unknown, budget)
    tree = safe_pickle.settle(tree, finish=lambda record: record, leaves=(torch.Tensor, np.ndarray))
    entries = {}
    if isinstance(tree, dict):
        entries = {str(name): _describe(value) for name, value in tree.items() if name != 'ema'}
        if 'ema' not in tree:
            raise SafePickleError(f"no entry 'ema' in this file; it has {', '.join(map(repr, entries)) or 'none'}")
        tree = tree['ema']
    if not isinstance(tree, Record) or tree.kind != 'persistent':
        raise SafePickleError(f'the file holds {_describe(tree)}, not a network')
    class_name = tree.args[0]
    args, kwargs = tree.state.get('_init_args'), tree.state.get('_init_kwargs')
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise SafePickleError(f'{class_name!r} does not store the arguments it was made with')
    weights, sources = _weights_and_sources(tree, budget)
    return StoredNetwork(class_name, args, kwargs, weights, sources, entries)


def _describe(value: Any) -> str:
    """The class of a persistent object, or else the type of a value."""
    if isinstance(value, Record):
        return value.args[0] if value.kind == 'persistent' else value.kind
    return type(value).__name__


def _weights_and_sources(network: Record, budget: Budget) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Parameters and buffers by dotted name, from where torch.nn.Module keeps them; the source texts of the modules.

    Each name pays for what a network will have under it, numbers in float32, as one tensor may have many names.
    """
    weights: dict[str, torch.Tensor] = {}
    sources: set[str] = set()
    pending, seen = [('', network)], set()
    while pending:
        prefix, module = pending.pop()
        if module in seen:
            raise SafePickleError(f'the module {prefix[:-1]!r} in this file stands in several places')
        seen.add(module)
        sources.update(module.args[1:])
        state = expect(module.state, dict)
        for kind in ('_parameters', '_buffers'):
            for name, value in expect(state.get(kind, {}), dict).items():
                budget.spend_bytes(_NAME_BYTES)
                if value is not None:
                    weights[_dotted(prefix, name)] = tensor = expect(value, torch.Tensor)
                    budget.spend_bytes(4 * tensor.numel())
        for name, child in expect(state.get('_modules', {}), dict).items():
            budget.spend_bytes(_NAME_BYTES)
            if child is not None:
                pending.append((_dotted(prefix, name) + '.', expect(child, Record)))
    return weights, sources


_NAME_BYTES = 512  # of a name with a tensor that is empty


def _dotted(prefix: str, name: Any) -> str:
    """The name behind the prefix. It has no dots itself, so that no two dotted names are the same."""
    if len(prefix) + len(expect(name, str)) > safe_pickle.MAX_NAME:
        raise SafePickleError(f'a part of the network in this file has a name of {len(prefix) + len(name)} signs')
    if '.' in name:
        raise SafePickleError(f'a part of the network in this file has the name {name!r}, with a dot')
    return prefix + name


# ----------------------------------------------------------------------------
# The names that network files use.


def _table(budget: Budget) -> Table:
    return {
        **safe_pickle.NUMPY_TABLE,  # an encoder's scales are arrays; up to protocol 4 they stay records
        ('torch_utils.persistence', '_reconstruct_persistent_obj'): _persistent_object,
        ('torch._utils', '_rebuild_parameter'): _parameter,
        ('torch._utils', '_rebuild_tensor_v2'): _tensor,
        ('torch.storage', '_load_from_bytes'): partial(_storage, budget=budget),
        ('torch.nn.modules.container', 'ModuleDict'): lambda: Record('ModuleDict'),
        ('collections', 'OrderedDict'): lambda: {},
        ('dnnlib.util', 'EasyDict'): lambda: {},
    }


def _persistent_object(meta: Any) -> Record:
    if expect(meta, dict).get('type') != 'class' or meta.get('version') != FORMAT_VERSION:
        raise SafePickleError('an object in this file is not stored as a persistent class of format version 6')
    if meta.keys() != {'type', 'version', 'module_src', 'class_name', 'state'}:
        raise SafePickleError(
            'an object in this file has other fields than type, version, module_src, class_name, state'
        )
    names = expect(meta['class_name'], str), expect(meta['module_src'], str)
    if len(names[0]) > safe_pickle.MAX_NAME:
        raise SafePickleError(f'a class in this file has a name of {len(names[0])} signs')
    return Record('persistent', names, expect(meta['state'], dict))


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> torch.Tensor:
    return expect(data, torch.Tensor)


@dataclass(frozen=True)
class _Storage:
    """The numbers that tensors are cut from: a vector."""

    values: torch.Tensor

    def __sizeof__(self) -> int:
        return self.values.nbytes


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    """`torch._utils._rebuild_tensor_v2`, which does not check that the view stays inside its storage."""
    values = expect(storage, _Storage).values
    size, stride = (tuple(expect(n, int) for n in expect(dims, tuple)) for dims in (size, stride))
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS or hooks or metadata:
        raise SafePickleError('a tensor in this file is not stored as weights are')
    last = expect(offset, int) + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = min((offset, *size, *stride)) >= 0 and (0 in size or last < len(values))
    if not inside or math.prod(size) > len(values):
        raise SafePickleError(f'a tensor of size {size} and stride {stride} does not fit its storage')
    return values.as_strided(size, stride, offset)


_DTYPES = {
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'DoubleStorage': torch.float64,
    'BFloat16Storage': torch.bfloat16,
}
_STORAGE_TABLE: Table = {('torch', name): safe_pickle.not_called for name in _DTYPES}
_MAGIC_AND_VERSION = 0x1950A86A20F9469CFC6C, 1001


def _storage(data: Any, budget: Budget) -> _Storage:
    """`torch.storage._load_from_bytes`: a second pickle inside the first, and the stock function would trust it.

    The stream: magic number, version, a dict on the machine, the storage as a persistent id ('storage', class, key,
    location, count, None), the list of the keys, each a pickle; then the count in 8 bytes, and the numbers.
    """
    try:
        reader = Reader(expect(data, bytes), _STORAGE_TABLE, budget=budget, persistent=_vector_record)
        magic_and_version, machine = (reader.read(), reader.read()), reader.read()
        record, keys = expect(reader.read(), Record), reader.read()
        dtype, key, count = record.args
        if magic_and_version != _MAGIC_AND_VERSION or not machine['little_endian'] or keys != [key]:
            raise SafePickleError('not a storage as torch.save writes it')
        values, size = memoryview(data)[reader.position + 8 :], reader.number('q')
        if count != size or count * dtype.itemsize != len(values):
            raise SafePickleError(f'{len(values)} bytes are not {count} numbers')
        budget.spend_bytes(len(data) - len(values))
    except MemoryError:
        raise
    except Exception as err:  # not a storage at all, if its parts are of other types
        raise SafePickleError(f'a tensor in this file is damaged or hides code ({err})') from None
    return _Storage(torch.frombuffer(bytearray(values), dtype=dtype) if count else torch.empty(0, dtype=dtype))


def _vector_record(persistent_id: Any) -> Record:
    kind, name, key, _location, count, view = expect(persistent_id, tuple)
    if kind != 'storage' or view is not None:
        raise SafePickleError('not a whole storage')
    return Record('storage', (_DTYPES[expect(name, safe_pickle.Name).name], expect(key, str), expect(count, int)))
