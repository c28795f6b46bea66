"""Read networks from EDM-style pickles without running the code inside them.

`load_network` is the way in. It works in two phases. `_Reader` turns the pickle into an inert tree: dicts, lists,
numbers, tensors, and one `_Object` per pickled object, which keeps a class name and a state but is no instance of that
class; anything that such files do not need is refused. Then `_rebuild` makes the built-in class of that name from the
constructor arguments stored in the file, and fills in the weights by name. What the file says its classes do is never
executed, so the network has this project's code, forward-mode derivatives included.

`trust_pickle=True` is the other way: plain unpickling, which runs whatever the file contains.
"""

import io
import math
import pickle
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

import dnnlib

NETWORK_CLASSES = {
    name: f'training.networks.{name}' for name in ('EDMPrecond', 'VPPrecond', 'VEPrecond', 'iDDPMPrecond')
}


class NetworkFileError(ValueError):
    """The file is not a network that this project can read; the message is one line that says why."""


def load_network(path_or_url: str, trust_pickle: bool = False) -> torch.nn.Module:
    """The network in a file: `ema` of a training snapshot, or a bare network. On the CPU, in eval mode, without grad.

    Args:
        path_or_url: a network pickle; URLs are downloaded once and cached.
        trust_pickle: execute the file's own code instead. For files from people you trust, of classes unknown here.

    Raises:
        NetworkFileError: not a pickle, or not of a known class, or the weights do not fit the class.
        OSError: the file cannot be opened or downloaded.
    """
    with dnnlib.util.open_url(path_or_url, verbose=True) as file:
        if trust_pickle:
            net = _load_trusted(file, path_or_url)
        else:
            try:
                net = _rebuild(_network_of(_read_tree(file)))
            except NetworkFileError as err:
                raise NetworkFileError(f'{path_or_url}: {textwrap.shorten(str(err), 500)}') from None
    return net.eval().requires_grad_(False)


def _network_of(data: Any) -> Any:
    """The network in a snapshot dict, or `data` itself."""
    if isinstance(data, dict):
        if 'ema' not in data:
            raise NetworkFileError(f"no entry 'ema' in this file; it has {', '.join(map(repr, data)) or 'none'}")
        return data['ema']
    return data


# ----------------------------------------------------------------------------
# Phase one: an inert tree.


@dataclass(eq=False)
class _Object:
    """A pickled object as data: the name of its class, and its state once BUILD has delivered it."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Global:
    """A name that the pickle may mention: what calling it, or making an instance of it, stands for."""

    call: Callable[..., Any]


def _read_tree(file: Any) -> Any:
    data = file.read()
    if data[:1] != b'\x80':
        raise NetworkFileError('this is not a pickle, and so not a network file')
    try:
        return _Reader(io.BytesIO(data)).load()
    except NetworkFileError:
        raise
    except Exception as err:  # a damaged or hostile stream can trip the interpreter anywhere
        raise NetworkFileError(f'this is not a readable network pickle ({type(err).__name__}: {err})') from None


def _persistent_object(meta: dict) -> _Object:
    if not isinstance(meta, dict) or meta.get('type') != 'class' or meta.get('version') != 6:
        raise NetworkFileError('an object in this file is not stored as a persistent class of format version 6')
    return _Object(str(meta['class_name']), _expect(meta['state'], dict))


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> torch.Tensor:
    """`torch._utils._rebuild_tensor_v2`, which does not check that the view stays inside its storage."""
    dtype, values = _expect(storage, torch.storage.TypedStorage).dtype, storage._untyped_storage
    size, stride = (tuple(_expect(n, int) for n in dims) for dims in (size, stride))
    available = values.nbytes() // dtype.itemsize
    last = _expect(offset, int) + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = min((offset, *size, *stride)) >= 0 and (0 in size or last < available)
    if not inside or math.prod(size) > available or dtype.is_complex or hooks:
        raise NetworkFileError(f'a tensor of size {size} and stride {stride} does not fit its storage of real numbers')
    return torch.empty(0, dtype=dtype).set_(values, offset, size, stride).clone()


def _storage(data: bytes) -> torch.storage.TypedStorage:
    """`torch.storage._load_from_bytes`: a second pickle inside the first, and the stock function would trust it."""
    stream = io.BytesIO(_expect(data, bytes))
    try:
        storage = torch.load(stream, map_location='cpu', weights_only=True)
    except Exception as err:  # not repeated: PyTorch's message advises the user to drop the protection
        raise NetworkFileError(f'a tensor in this file is damaged or hides code ({type(err).__name__})') from None
    return _expect(storage, torch.storage.TypedStorage)


def _latin1(text: str, encoding: str) -> bytes:
    """`_codecs.encode`: how bytes look in pickle protocol 2."""
    if encoding != 'latin1':
        raise NetworkFileError(f'bytes in this file are stored in the encoding {encoding!r}')
    return _expect(text, str).encode('latin1')


def _set(items: Any = ()) -> set:
    return {_key(item) for item in items}


def _key(value: Any) -> Any:
    """What may be hashed. Tuples may not: nested deeply, they would overflow the stack of the interpreter."""
    return _expect(value, (str, int))


def _numpy_scalar(dtype: _Object, data: bytes) -> Any:
    """A numpy number, as Python's."""
    code, byte_order = dtype.class_name, dtype.state.get('byte_order', '<')
    array = np.frombuffer(_expect(data, bytes), dtype=np.dtype(code).newbyteorder(byte_order))
    if array.size != 1:
        raise NetworkFileError('a numpy number in this file is damaged')
    return array[0].item()


def _numpy_dtype(code: str, align: bool = False, copy: bool = False) -> _Object:
    if code not in ('f2', 'f4', 'f8', 'i4', 'i8', 'u1', 'b1'):
        raise NetworkFileError(f'numpy type {code!r} does not belong in a network file')
    return _Object(code)


def _expect(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = ' or '.join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise NetworkFileError(f'found {type(value).__name__} where a network file has {wanted}')
    return value


_GLOBALS = {
    'torch_utils.persistence _reconstruct_persistent_obj': _Global(_persistent_object),
    'torch._utils _rebuild_parameter': _Global(lambda data, requires_grad, hooks: data),
    'torch._utils _rebuild_tensor_v2': _Global(_tensor),
    'torch.storage _load_from_bytes': _Global(_storage),
    'torch.nn.modules.container ModuleDict': _Global(lambda: _Object('ModuleDict')),
    'collections OrderedDict': _Global(lambda: {}),
    'dnnlib.util EasyDict': _Global(lambda: {}),
    'builtins set': _Global(_set),
    '__builtin__ set': _Global(_set),
    '_codecs encode': _Global(_latin1),
    'numpy dtype': _Global(_numpy_dtype),
    'numpy.core.multiarray scalar': _Global(_numpy_scalar),
    'numpy._core.multiarray scalar': _Global(_numpy_scalar),
}

_OPCODES = """
    PROTO FRAME MARK STOP MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2
    LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_DICT EMPTY_LIST EMPTY_SET
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS ADDITEMS SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ
    BUILD
"""


class _Reader(pickle._Unpickler):
    """The pure-Python unpickler, cut down to the opcodes that network files use, none of which can touch a live object.

    The one written in C is no basis: there, BUILD changes whatever lies on the stack, and only `find_class` can be
    replaced.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()
    }

    def find_class(self, module, name):
        known = _GLOBALS.get(f'{module} {name}')
        if known is None:
            raise NetworkFileError(
                f'this file wants to call {f"{module}.{name}"!r}, which no known network needs; '
                'if you trust its author, use --trust-pickle'
            )
        return known

    def load_reduce(self):
        args = self.stack.pop()
        self.stack[-1] = _expect(self.stack[-1], _Global).call(*_expect(args, tuple))

    def load_build(self):
        state = self.stack.pop()
        target = _expect(self.stack[-1], _Object)
        if isinstance(state, tuple):  # numpy.dtype: (version, byte order, …)
            state = {'byte_order': _expect(state[1], str)}
        target.state.update(_expect(state, dict))

    def load_setitems(self):
        items = self.pop_mark()
        _expect(self.stack[-1], dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        _expect(self.stack[-1], dict)[_key(key)] = value

    def load_appends(self):
        items = self.pop_mark()
        _expect(self.stack[-1], list).extend(items)

    def load_append(self):
        value = self.stack.pop()
        _expect(self.stack[-1], list).append(value)

    def load_additems(self):
        items = self.pop_mark()
        _expect(self.stack[-1], set).update(map(_key, items))

    dispatch.update(
        {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_reduce,
            pickle.BUILD[0]: load_build,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.APPEND[0]: load_append,
            pickle.APPENDS[0]: load_appends,
            pickle.ADDITEMS[0]: load_additems,
        }
    )


# ----------------------------------------------------------------------------
# Phase two: a network of our own.


def _rebuild(record: Any) -> torch.nn.Module:
    """The built-in class that `record` names, made from the arguments it stores, with its weights."""
    if not isinstance(record, _Object) or record.class_name not in NETWORK_CLASSES:
        what = record.class_name if isinstance(record, _Object) else type(record).__name__
        raise NetworkFileError(
            f'network of class {what!r}; known are {", ".join(NETWORK_CLASSES)}; if you trust its author, '
            'use --trust-pickle, which runs the code inside the file'
        )
    args, kwargs = record.state.get('_init_args'), record.state.get('_init_kwargs')
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise NetworkFileError(f'{record.class_name} does not store the arguments it was made with')
    weights = _state_dict(record)
    try:
        _check_sizes([args, kwargs], limit=max([4096, len(weights), *(n for w in weights.values() for n in w.shape)]))
        with torch.random.fork_rng(devices=[]):  # random weights, to be overwritten: leave the caller's stream alone
            net = dnnlib.util.construct_class_by_name(*args, class_name=NETWORK_CLASSES[record.class_name], **kwargs)
        net.load_state_dict(weights)
    except Exception as err:  # arguments out of a damaged or hostile file can trip the constructor anywhere
        raise NetworkFileError(f'this {record.class_name} differs from the built-in one ({err})') from None
    return net


def _check_sizes(arguments: list[Any], limit: int) -> None:
    """Refuse numbers of blocks or channels far above what the file has weights for: building them would not end."""
    pending, seen = arguments, set()
    while pending:
        value = pending.pop()
        if isinstance(value, int) and value > limit:
            raise NetworkFileError(f'the argument {value} is out of proportion')
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)


def _state_dict(record: _Object) -> dict[str, torch.Tensor]:
    """Parameters and buffers by dotted name, from the attributes where torch.nn.Module keeps them."""
    tensors: dict[str, torch.Tensor] = {}
    pending, seen = [('', record)], set()
    while pending:
        prefix, module = pending.pop()
        if module in seen:
            raise NetworkFileError(f'the module {prefix[:-1]!r} in this file stands in several places')
        seen.add(module)
        for kind in ('_parameters', '_buffers'):
            for name, value in _expect(module.state.get(kind, {}), dict).items():
                if value is not None:
                    tensors[f'{prefix}{name}'] = _expect(value, torch.Tensor)
        for name, child in _expect(module.state.get('_modules', {}), dict).items():
            if child is not None:
                pending.append((f'{prefix}{name}.', _expect(child, _Object)))
    return tensors


# ----------------------------------------------------------------------------
# The trusting way.


def _load_trusted(file: Any, name: str) -> torch.nn.Module:
    print(f'--trust-pickle: running the Python code inside {name}', file=sys.stderr)
    try:
        net = _network_of(pickle.load(file))
    except NetworkFileError as err:
        raise NetworkFileError(f'{name}: {err}') from None
    except Exception as err:
        raise NetworkFileError(f'{name}: the file does not unpickle ({type(err).__name__}: {err})') from err
    if not isinstance(net, torch.nn.Module):
        raise NetworkFileError(f'{name}: holds {type(net).__name__}, not a network')
    missing = [attr for attr in ('img_resolution', 'img_channels', 'label_dim') if not hasattr(net, attr)]
    if missing:
        raise NetworkFileError(f'{name}: its {type(net).__name__} is no denoiser of images, it has no {missing[0]}')
    _give_attention_a_forward_mode(net)
    return net


def _give_attention_a_forward_mode(net: torch.nn.Module) -> None:
    """Replace `AttentionOp` in the modules of the file's code: EDM's has a backward pass only."""
    replacement = dnnlib.util.get_obj_by_name('training.networks.AttentionOp')
    for name in {type(module).__module__ for module in net.modules()}:
        op = getattr(sys.modules.get(name), 'AttentionOp', None)
        if isinstance(op, type) and issubclass(op, torch.autograd.Function):
            sys.modules[name].AttentionOp = replacement  # type: ignore[attr-defined]
