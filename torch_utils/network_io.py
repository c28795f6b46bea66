"""Network files: read without running what is in them, written, inspected, converted.

`load_network` reads both formats: EDM's pickles (`torch_utils.network_pickle`) and safetensors with the class and its
arguments as JSON metadata. Either way a file is data, a `StoredNetwork`; `build` makes the built-in class of the stored
name from the stored arguments, and fills in the weights. What the file says its classes do is never executed, so the
network has this project's code, forward-mode derivatives included. `save_network` writes both formats.

    python -m torch_utils.network_io inspect FILE|URL
    python -m torch_utils.network_io convert SRC DEST

`trust_pickle=True` is the other way: plain unpickling, which runs whatever the file contains.
"""

import contextlib
import copy
import difflib
import functools
import hashlib
import inspect as python_inspect
import json
import math
import os
import pickle
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode

import dnnlib
from dnnlib import plain_json, safe_pickle
from dnnlib.options import user_path
from dnnlib.published import NETWORKS
from torch_utils import distributed as dist
from torch_utils import misc, network_pickle, persistence
from torch_utils.network_pickle import StoredNetwork

# A file has the name of a class and its source text, but no module. So a name stands for one class here; whether the
# file means that one is told by the text (`origin`) and by the weights, whose names and shapes have to fit.
NETWORK_CLASSES = {
    **{name: f'training.networks.{name}' for name in ('EDMPrecond', 'VPPrecond', 'VEPrecond', 'iDDPMPrecond')},
    'Precond': 'training.networks_edm2.Precond',
}

# Source texts whose classes do what the built-in ones of the same name do: SHA-256 and where the text is from. Those of
# training/networks.py and networks_edm2.py in this checkout are known without an entry.
KNOWN_SOURCES = {
    '5db27dcd96674b95c72d5e6491b879cdc35e24039ada3411b4b46a28ed1fe284': 'EDM, training/networks.py',
    '2294828d5f59f5fd008f7141e6b8af2095918f2ce019f280a933e4779b5c3cef': 'EDM, its first training/networks.py',
    '7298880db4bf955d2941496cce3a554a970867b3eae4d22276cb1c293c131fa2': 'EDM2, training/networks_edm2.py',
    'f46463375f94d55deb9394d1efeb8e87d14a28b585dfc0f092565b8dc2064b60': 'version 0.1.0 of this project',
    '56a72d24883d09362e617177378121e12cdac5adf5602d0ce2fe22a71e80303a': 'version 0.1.0 of this project, November 2026',
    'f42da8235e12dafb20a31a64e3bfc5dd8e9fcf46de386ab513321f44e365e63a': 'version 0.1.0 of this project, 26 November',
    '6bf4850a62925903bbde449df1f0108e2955f3ff2fe6baa568ed60a87e758e68': 'version 0.1.0 of this project, shipped before',
    'c3abde1182ae5ebf006bfc05e3b4d9c95c769261f3c162386efd39de8d27b8ad': 'version 0.1.0 of this project, 28 November',
    '4792ae7b208860284c08b94adc94bce11f878231ba37100066d97021b6f0db35': 'version 0.1.0 of this project, shipped',
}

INSTALL_RULES = 'training.fast.install'  # of speed and forward mode, which every network that is read gets
ENDINGS = ('.pkl', '.safetensors')
MAX_ARGUMENT = 32768  # ImageNet has 21,841 classes
MAX_LIST = 64
MAX_ARGUMENTS = 1000  # values in all arguments together, keys included
MAX_ARGUMENT_TEXT = 10_000  # signs in all of them
MAX_HEADER = 4 << 20  # bytes of a safetensors file's; that of the largest published network has 0.1 MB
MAX_NAMED = 20  # of things of one kind that a message lists
_METADATA_KEY = 'network'
_SNAPSHOT_ENTRIES = {'loss_fn', 'augment_pipe', 'dataset_kwargs', 'encoder'}
_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class NetworkFileError(ValueError):
    """The file is not a network that this project can read; the message is one line that says why."""


def load_network(path_or_url: str, trust_pickle: bool = False) -> torch.nn.Module:
    """The network in a file: `ema` of a training snapshot, or a bare network. On the CPU, in eval mode, without grad.

    A pickle whose classes have a source text unknown here is read with a warning on stderr: the network does what the
    built-in class of the same name does.

    Args:
        path_or_url: a pickle or a safetensors file: what `dnnlib.util.open_url` opens.
        trust_pickle: execute the file's own code instead. For files from people you trust, of classes unknown here.

    Raises:
        NetworkFileError: not a network file, or not of a known class, or the weights do not fit the class.
        OSError: the file cannot be opened or downloaded; the message names what is there instead.
    """
    if trust_pickle:
        _check_pinned(path_or_url)
    data = read_bytes(path_or_url)
    try:
        if trust_pickle:
            _check_hash(data, dnnlib.util.pinned_hash(path_or_url))
        if trust_pickle and not _is_safetensors(data):
            net = _load_trusted(data, path_or_url)
        else:
            stored = read_network(data)
            net = build(stored)
            _warn_of_unknown_source(stored, path_or_url)
    except ValueError as err:
        raise NetworkFileError(f'{dnnlib.util.label(path_or_url)}: {dnnlib.util.one_line(err)}') from None
    dnnlib.util.call_func_by_name(net, func_name=INSTALL_RULES)
    return net.eval().requires_grad_(False)


def read_bytes(path_or_url: str) -> bytes:
    """The content of a network file. Raises what `load_network` does where it cannot be opened."""
    try:
        with dnnlib.util.open_url(path_or_url, verbose=True) as file:
            return file.read()
    except FileNotFoundError as err:
        raise FileNotFoundError(f'{path_or_url}: no such file{_instead_of(Path(err.filename))}') from None
    except OSError as err:
        if err.filename is None or not os.path.isdir(err.filename):
            raise
        there = _networks_in(Path(err.filename)) or 'no network files'
        raise IsADirectoryError(f'{path_or_url} is a folder, not a network file; it has {there}') from None


def _instead_of(path: Path) -> str:
    """What may have been meant by a name that no file has; '' if nothing comes to mind."""
    if path.name == str(path) and path.suffix not in ENDINGS:
        similar = difflib.get_close_matches(path.name, NETWORKS)
        known = f'are {", ".join(similar)}' if similar else f'such as {NETWORKS[0]} are in dnnlib/published.py'
        return f'; known names {known}'
    if not path.parent.is_dir():
        return f'; there is no folder {path.parent}'
    there = _networks_in(path.parent)
    return f'; {path.parent} has {there}' if there else ''


def _networks_in(folder: Path, num: int = 3) -> str:
    """The newest network files of a folder, the latest first; '' if it has none."""
    files = [file for file in folder.iterdir() if file.suffix in ENDINGS and not file.name.startswith('.')]
    newest = sorted(files, key=lambda file: (file.stat().st_mtime, file.name), reverse=True)
    names = ', '.join(file.name for file in newest[:num])
    return f'{names} and {len(files) - num} older' if len(files) > num else names


def read_network(data: bytes, unknown: Callable[..., Any] = network_pickle.refuse_name) -> StoredNetwork:
    """What a network file says, in either format. Raises ValueError."""
    if _is_pickle(data):
        stored = network_pickle.read(data, unknown)
    elif _is_safetensors(data):
        stored = _read_safetensors(data)
    else:
        raise NetworkFileError('this is neither a pickle nor a safetensors file, and so not a network file')
    _check_extent([stored.init_args, stored.init_kwargs])
    return stored


def save_network(net: torch.nn.Module, path: str | Path, **entries: Any) -> None:
    """Write a network of a built-in class, on the CPU; the file appears whole or not at all.

    The ending of `path` is the format: .pkl, which an unmodified EDM or EDM2 checkout reads, with `entries` beside the
    network (loss_fn, …); or .safetensors, the weights with class and arguments, without `entries`.

    Raises:
        ValueError: another ending, or layers that no file can hold, such as those of `training.folding`.
    """
    foreign = {type(module).__name__ for module in net.modules() if not _has_a_stored_form(module)}
    if foreign:
        raise ValueError(f'{path}: a network with {", ".join(sorted(foreign))} in it is for evaluation only')
    net = copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if str(path).endswith('.pkl'):
        with dnnlib.util.atomic_write(path) as file:
            pickle.dump({'ema': net, **entries}, file, protocol=4)
    elif str(path).endswith('.safetensors'):
        with dnnlib.util.atomic_write(path) as file:
            file.write(_safetensors(net))
    else:
        raise ValueError(f'{path}: the name of a network file ends in .pkl or .safetensors')


def _has_a_stored_form(module: torch.nn.Module) -> bool:
    return persistence.is_persistent(module) or type(module).__module__.startswith('torch.nn.')


def _is_pickle(data: bytes) -> bool:
    return data[:1] == pickle.PROTO


def _is_safetensors(data: bytes) -> bool:
    return data[8:9] == b'{'  # after the length of the header


# ----------------------------------------------------------------------------
# safetensors.


def _safetensors(net: Any) -> bytes:
    description = {'class_name': type(net).__name__, 'init_args': net.init_args, 'init_kwargs': net.init_kwargs}
    weights = {name: value.detach().contiguous() for name, value in net.state_dict().items()}
    return safetensors.torch.save(weights, {_METADATA_KEY: json.dumps(description)})


def _read_safetensors(data: bytes) -> StoredNetwork:
    (size,) = struct.unpack('<Q', data[:8])
    if size > MAX_HEADER:
        raise NetworkFileError(f'the header of this safetensors file has {size} bytes; at most {MAX_HEADER} are read')
    try:
        header = plain_json.parse(data[8 : 8 + size])
        description = plain_json.parse(header['__metadata__'][_METADATA_KEY])
        weights = safetensors.torch.load(data)  # checks the header as well
        class_name, args, kwargs = (description[name] for name in ('class_name', 'init_args', 'init_kwargs'))
    except KeyError as err:
        raise NetworkFileError(f'this safetensors file does not say what network it holds (no {err})') from None
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError) as err:
        raise NetworkFileError(f'this safetensors file is damaged ({dnnlib.util.one_line(err, 200)})') from None
    if (type(class_name), type(args), type(kwargs)) != (str, list, dict):
        raise NetworkFileError('this safetensors file does not say what network it holds')
    return StoredNetwork(class_name, tuple(args), kwargs, weights)


# ----------------------------------------------------------------------------
# A network of our own.


def build(stored: StoredNetwork) -> torch.nn.Module:
    """The built-in class of the stored name, made from the stored arguments, with the stored weights in float32.

    Raises:
        NetworkFileError: the class is unknown, or the arguments or the weights do not fit it.
    """
    if stored.class_name not in NETWORK_CLASSES:
        raise NetworkFileError(
            f'network of class {stored.class_name!r}; known are {", ".join(NETWORK_CLASSES)}; if you trust its author, '
            'use --trust-pickle, which runs the code inside the file'
        )
    _check_arguments([stored.init_args, stored.init_kwargs])
    weights = {name: _float32(name, value) for name, value in stored.weights.items()}
    network_class = dnnlib.util.get_obj_by_name(NETWORK_CLASSES[stored.class_name])
    try:
        with _Blueprint(weights):
            net = network_class(*stored.init_args, **stored.init_kwargs)
        net.load_state_dict(weights, assign=True)
    except Exception as err:  # arguments out of a damaged or hostile file can trip the constructor anywhere
        if misc.is_out_of_memory(err):
            raise
        built_in = NETWORK_CLASSES[stored.class_name]
        raise NetworkFileError(
            f'this {stored.class_name} differs from the built-in one, {built_in} ({dnnlib.util.one_line(err)})'
        ) from None
    return net


def _float32(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.dtype not in _PRECISIONS:
        raise NetworkFileError(f'the weight {name!r} is of {value.dtype}, not of real numbers')
    if not torch.isfinite(value).all():
        raise NetworkFileError(
            f'the weight {name!r} has numbers that are not finite; training has gone wrong before it was saved'
        )
    return value.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _check_extent(arguments: list[Any]) -> None:
    """Refuse what is no plain value, and what would be too long to be printed: a text may occur often in a file."""
    values = signs = 0
    pending = [*arguments]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            signs += len(value)
        elif isinstance(value, (dict, list, tuple)):
            values += len(value) * (2 if isinstance(value, dict) else 1)
            if values <= MAX_ARGUMENTS:
                pending.extend((*value, *value.values()) if isinstance(value, dict) else value)
        elif not isinstance(value, (type(None), bool, int, float)):
            raise NetworkFileError(f'an argument of the network is of the type {type(value).__name__}')
        if values > MAX_ARGUMENTS or signs > MAX_ARGUMENT_TEXT:
            raise NetworkFileError(
                f'the arguments of the network are over {MAX_ARGUMENTS} values, or {MAX_ARGUMENT_TEXT} signs of text'
            )


def _check_arguments(arguments: list[Any]) -> None:
    """Refuse what no network is made with, and numbers for which construction would not end."""
    _check_extent(arguments)
    pending = [*arguments]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend((*value, *value.values()))
        elif isinstance(value, (list, tuple)):
            if len(value) > MAX_LIST:
                raise NetworkFileError(f'an argument is a list of {len(value)} values')
            pending.extend(value)
        elif isinstance(value, int) and abs(value) > MAX_ARGUMENT:
            raise NetworkFileError(f'the argument {value} is out of proportion')
        elif value != value:
            raise NetworkFileError('an argument is no number')


class _Blueprint(TorchFunctionMode):
    """Constructs a network without drawing its initial weights, which the file's will replace.

    It gives the constructor zeros in the place of random numbers, and no more tensors and elements than the file has
    weights for, so that arguments out of proportion end at once.
    """

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.tensors = len(weights) + 16
        self.elements = sum(weight.numel() for weight in weights.values()) + 65536

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.rand, torch.randn):
            func = torch.zeros
        if func in (torch.empty, torch.zeros, torch.ones):
            size = args[0] if args and not isinstance(args[0], int) else args
            self.tensors -= 1
            self.elements -= math.prod(size)
            if min(self.tensors, self.elements) < 0:
                raise ValueError('its arguments ask for more weights than the file has')
        return func(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------
# Sources.


def unknown_sources(stored: StoredNetwork) -> list[str]:
    """SHA-256 of the file's source texts that `origin` cannot tell."""
    return sorted(digest for digest in map(_digest, stored.sources) if origin(digest) is None)


def origin(digest: str) -> str | None:
    """Where the source text with this SHA-256 is from, if that is known."""
    return KNOWN_SOURCES.get(digest) or ('this checkout' if digest in _own_digests() else None)


@functools.cache
def _own_digests() -> frozenset[str]:
    modules = {name.rpartition('.')[0] for name in NETWORK_CLASSES.values()}
    return frozenset(_digest(python_inspect.getsource(dnnlib.util.get_obj_by_name(module))) for module in modules)


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode('utf-8', 'surrogatepass')).hexdigest()


def _warn_of_unknown_source(stored: StoredNetwork, name: str) -> None:
    unknown = unknown_sources(stored)
    if unknown:
        dist.print0(
            f'Warning: {dnnlib.util.printable(name)}: the source text of {stored.class_name} (SHA-256 '
            f'{_listed(unknown)}) is unknown and is not run; the network does what '
            f'{NETWORK_CLASSES[stored.class_name]} does',
            file=sys.stderr,
        )


def _listed(names: Sequence[str], show: Callable[[str], str] = str, between: str = ', ') -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - MAX_NAMED
    return between.join(map(show, names[:MAX_NAMED])) + (f' and {more} more' if more > 0 else '')


# ----------------------------------------------------------------------------
# The trusting way.


def _check_pinned(path_or_url: str) -> None:
    """What a server sends today need not be what it sent yesterday, so trust in it goes with a hash."""
    if dnnlib.util.is_remote(path_or_url) and not dnnlib.util.pinned_hash(path_or_url):
        raise NetworkFileError(
            f'{path_or_url}: --trust-pickle runs what is in the file, and so wants a local file, '
            'or the hash of the file after the URL: …#sha256=0123…'
        )


def _check_hash(data: bytes, expected: str | None) -> None:
    """The bytes that will run have to be those with the hash, not what the file held when it was downloaded."""
    found = hashlib.sha256(data).hexdigest()
    if expected not in (None, found):
        raise NetworkFileError(f'its SHA-256 is {found}, not {expected}')


def _load_trusted(data: bytes, name: str) -> torch.nn.Module:
    stars = 78 * '*'
    print(
        f'{stars}\n--trust-pickle: running the Python code inside {name}\n'
        f'(SHA-256 {hashlib.sha256(data).hexdigest()}), with all that you may do on this computer.\n{stars}',
        file=sys.stderr,
    )
    try:
        net = pickle.loads(data)
    except Exception as err:
        raise NetworkFileError(f'the file does not unpickle ({type(err).__name__}: {err})') from err
    if isinstance(net, dict):
        if 'ema' not in net:
            raise NetworkFileError(f"no entry 'ema' in this file; it has {', '.join(map(repr, net)) or 'none'}")
        net = net['ema']
    if not isinstance(net, torch.nn.Module):
        raise NetworkFileError(f'holds {type(net).__name__}, not a network')
    missing = [attr for attr in ('img_resolution', 'img_channels', 'label_dim') if not hasattr(net, attr)]
    if missing:
        raise NetworkFileError(f'its {type(net).__name__} is no denoiser of images, it has no {missing[0]}')
    _give_attention_a_forward_mode(net)
    return net


def _give_attention_a_forward_mode(net: torch.nn.Module) -> None:
    """Replace `AttentionOp` in the modules of the file's code: EDM's has a backward pass only."""
    replacement = dnnlib.util.get_obj_by_name('training.networks.AttentionOp')
    for name in {type(module).__module__ for module in net.modules()}:
        op = getattr(sys.modules.get(name), 'AttentionOp', None)
        if isinstance(op, type) and issubclass(op, torch.autograd.Function):
            sys.modules[name].AttentionOp = replacement  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------
# Command line.


@click.group(context_settings={'max_content_width': 120})
def main() -> None:
    """Inspect network files, and convert them between formats, without running what is in them."""


@main.command('inspect')
@click.argument('file', metavar='FILE|URL', type=user_path)
@click.pass_context
def inspect_command(context: click.Context, file: str) -> None:
    """Say what is in a network file: class, arguments, weights, source, and anything unusual.

    Exit status: 0, it loads and nothing is unusual; 1, it loads, with the remarks printed; 2, it does not load.
    """
    with _one_line_errors():
        error, remarks = _inspect(file)
    for remark in remarks or ([] if error else ['nothing']):
        click.echo(f'{"unusual":12s}{dnnlib.util.one_line(remark, 2000)}')
    if error:
        click.echo(f'{"refused":12s}{dnnlib.util.one_line(error)}')
    context.exit(2 if error else 1 if remarks else 0)


def _inspect(file: str) -> tuple[str, list[str]]:
    """Prints what is in the file. Returns why it does not load, '' if it does; and what is unusual."""
    data = read_bytes(file)
    names: set[str] = set()

    def note(module: str, name: str) -> Callable[..., Any]:
        names.add(f'{module}.{name}')
        return lambda *args: safe_pickle.Record('unknown')

    click.echo(dnnlib.util.label(file))
    click.echo(f'{"file":12s}{_format(data)}, {len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}')
    remarks: list[str] = []
    error = ''
    try:
        stored = read_network(data, note)
        _describe(stored)
        remarks = unusual(stored)
        build(stored)
    except ValueError as err:
        error = dnnlib.util.one_line(err)
    if names:
        error = f'it calls {_listed(sorted(names), repr)}' + (error and f'; {error}')
    return error, remarks


def unusual(stored: StoredNetwork) -> list[str]:
    """What a reader of this file should know and most files do not have, one line each."""
    unknown = unknown_sources(stored)
    remarks = [f'source text unknown, SHA-256 {digest}' for digest in unknown[:MAX_NAMED]]
    if len(unknown) > MAX_NAMED:
        remarks.append(f'{len(unknown) - MAX_NAMED} more source texts unknown')
    extra = sorted(set(stored.entries) - _SNAPSHOT_ENTRIES)
    if extra:
        remarks.append(f'entries that snapshots do not have: {_listed(extra, repr)}')
    broken = [name for name, value in stored.weights.items() if not value.isfinite().all()]
    if broken:
        remarks.append(f'{len(broken)} tensors with infinite or undefined numbers, such as {broken[0]!r}')
    return remarks


def _describe(stored: StoredNetwork) -> None:
    arguments = [*map(repr, stored.init_args), *(f'{name}={value!r}' for name, value in stored.init_kwargs.items())]
    sizes = [value.numel() for value in stored.weights.values()]
    types = sorted({str(value.dtype).removeprefix('torch.') for value in stored.weights.values()})
    built_in = NETWORK_CLASSES.get(stored.class_name)
    rows = {
        'class': f'{stored.class_name} ({built_in.rpartition(".")[0] if built_in else "unknown"})',
        'arguments': ', '.join(arguments),
        'parameters': f'{sum(sizes):,} with buffers, in {len(sizes)} tensors, {", ".join(types)}',
    }
    if stored.sources:
        digests = sorted(map(_digest, stored.sources))
        rows['source'] = _listed(digests, lambda digest: f'SHA-256 {digest}, {origin(digest) or "unknown"}', '; ')
    if stored.entries:
        rows['beside it'] = _listed([*stored.entries], lambda name: f'{name}: {stored.entries[name]}')
    for title, text in rows.items():
        click.echo(f'{title:12s}{dnnlib.util.one_line(text, 2000)}')


def _format(data: bytes) -> str:
    if _is_pickle(data):
        return f'pickle of protocol {int.from_bytes(data[1:2], "little")}'
    return 'safetensors' if _is_safetensors(data) else 'neither pickle nor safetensors'


class _CannotRead(click.ClickException):
    exit_code = 2

    def __init__(self, err: Exception):
        super().__init__(dnnlib.util.one_line(err))


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as err:
        raise _CannotRead(err) from None
    except (RuntimeError, MemoryError) as err:
        if not misc.is_out_of_memory(err):
            raise
        raise _CannotRead(MemoryError(f'out of memory: {dnnlib.util.one_line(err, 200)}')) from None


@main.command()
@click.argument('src', metavar='SRC', type=user_path)
@click.argument('dest', metavar='DEST', type=user_path)
def convert(src: str, dest: str) -> None:
    """Write the network of the file or URL SRC to DEST, whose ending is the format: .safetensors or .pkl.

    The weights become float32. What stands beside a network in a snapshot (loss_fn, …) stays behind. An unmodified EDM
    or EDM2 checkout loads the .pkl, which carries the source text of this project's classes.
    """
    with _one_line_errors():
        if Path(dest).exists():
            raise ValueError(f'{dest} exists already')
        net = load_network(src)
        Path(dest).parent.mkdir(parents=True, exist_ok=True)
        save_network(net, dest)
    click.echo(f'Wrote {dest}: {type(net).__name__}, {Path(dest).stat().st_size:,} bytes')


if __name__ == '__main__':
    dnnlib.util.print_any_text()
    main()
