"""Attribute dictionaries, whole files, objects by name, durations, log files; and downloads, text for terminals."""

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import types
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from .downloads import is_remote, is_url, label, make_cache_dir_path, open_url, pinned_hash, set_cache_dir  # noqa: F401
from .text import one_line, printable


class EasyDict(dict[str, Any]):
    """A dict whose entries are also attributes: `d.x` is `d['x']`, for reading, setting and deleting.

    Reading or deleting an absent attribute raises AttributeError. An entry named like a method of dict
    ('keys', 'items', …) is reached by subscript only.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f'no entry {name!r}', name=name, obj=self) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f'no entry {name!r}', name=name, obj=self)
        del self[name]


# ----------------------------------------------------------------------------
# Files that appear whole or not at all.


def zip_entry(name: str) -> zipfile.ZipInfo:
    """Stored; time, system and permissions are constants, so that an archive depends on nothing but its files."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix
    entry.external_attr = 0o100644 << 16
    return entry


class FailedWriteError(OSError):
    """A file could not be written; the message is one line that names it."""


@contextlib.contextmanager
def explain_failed_write(path: str | os.PathLike) -> Iterator[None]:
    """Around what writes to `path`: an OSError becomes a FailedWriteError."""
    try:
        yield
    except FailedWriteError:
        raise
    except OSError as err:
        reason = one_line(err.strerror or err, 200)
        raise FailedWriteError(f'cannot write {printable(path)}: {reason}; the files written before are whole') from err


class _ExplainedFile(io.FileIO):
    """A raw file whose failed writes say which file it was to become."""

    def __init__(self, path: Path, target: Path):
        super().__init__(path, 'wb')
        self._target = target

    def write(self, data: Any) -> int:
        with explain_failed_write(self._target):
            return super().write(data)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, replace: bool = True) -> Iterator[BinaryIO]:
    """`with atomic_write(path) as file:` – a binary file that takes its name once it is complete and on disk.

    Written beside `path` under a temporary name; an exception, or a kill, leaves what was at `path` before.

    Raises:
        FailedWriteError: the disk is full, or the folder cannot be written to. What else the block raises passes.
        FileExistsError: without `replace`, there is a file of this name. Of several processes, one makes it.
    """
    target = Path(path)
    temp_path = target.with_name(f'.tmp_{uuid.uuid4().hex}_{target.name}')
    try:
        with explain_failed_write(target):
            raw = _ExplainedFile(temp_path, target)
        with io.BufferedWriter(raw) as file:
            yield cast(BinaryIO, file)
            with explain_failed_write(target):
                file.flush()
                os.fsync(file.fileno())
        if replace or not _link(temp_path, target):
            with explain_failed_write(target):
                os.replace(temp_path, target)
    except RuntimeError as err:  # PyTorch's, on top of what the file has raised
        if isinstance(err.__context__, FailedWriteError):
            raise err.__context__ from None
        raise
    finally:
        temp_path.unlink(missing_ok=True)


def _link(path: Path, name: Path) -> bool:
    """Give the file a second name, if none has it; False where the file system has no such names."""
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def in_use(path: str | os.PathLike) -> Iterator[bool]:
    """`with in_use(path) as alone:` – whether no other process is in such a block for this file or folder.

    By flock, which ends with its process. Where there is none (Windows, some network file systems) all are alone.
    """
    if fcntl is None:
        yield True
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        alone = _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _lock(descriptor, fcntl.LOCK_SH)  # for the rest of the block, so that another one sees this one, and waits not
        yield alone
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool:
    """Whether no other process has it."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return True


# ----------------------------------------------------------------------------
# Streams.


def print_any_text() -> None:
    """Let stdout and stderr escape what their encoding (cp1252, ascii) has no sign for, instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


@contextlib.contextmanager
def alone_on_stdout() -> Iterator[TextIO]:
    """Gives stdout, for programs that read it; what is printed for people inside the `with` block goes to stderr."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield stdout


# ----------------------------------------------------------------------------
# Objects by name.

_ABBREVIATIONS = {'np': 'numpy', 'tf': 'tensorflow'}


def get_module_from_obj_name(obj_name: str) -> tuple[types.ModuleType, str]:
    """Import the module that holds the object with this dotted name.

    Returns the module and the rest of the name: 'collections.Counter.update' → (collections, 'Counter.update').
    The longest importable prefix that has the object wins; the rest is '' where the name is that of a module.
    'np.' and 'tf.' stand for 'numpy.' and 'tensorflow.'.

    Raises ImportError where nothing has this name. An error raised while a module is being imported passes unchanged.
    """
    parts = obj_name.split('.')
    parts[0] = _ABBREVIATIONS.get(parts[0], parts[0])
    if not all(parts):
        raise ImportError(f'{obj_name!r} is not a dotted name such as package.module.Class')
    # The whole name comes last: after `from .sin import sin`, package.sin means the function, as it does in Python.
    lengths = [*range(len(parts) - 1, 0, -1), len(parts)]
    found = None
    for length in lengths:
        module = _import_if_present('.'.join(parts[:length]))
        if module is None:
            continue
        local_name = '.'.join(parts[length:])
        if _has_obj(module, local_name):
            return module, local_name
        found = found or module
    reason = f'module {found.__name__!r} lacks it' if found else f'there is no module {parts[0]!r}'
    raise ImportError(f'cannot find {obj_name!r}: {reason}')


def _import_if_present(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as err:
        # The module exists, and something else that it imports does not: that is what the user must hear about.
        if err.name is None or not f'{name}.'.startswith(f'{err.name}.'):
            raise
        return None


def _has_obj(module: types.ModuleType, local_name: str) -> bool:
    try:
        get_obj_from_module(module, local_name)
    except AttributeError:
        return False
    return True


def get_obj_from_module(module: types.ModuleType, obj_name: str) -> Any:
    """The object that a dotted name stands for inside a module; the module itself for ''. Raises AttributeError."""
    obj: Any = module
    for part in filter(None, obj_name.split('.')):
        obj = getattr(obj, part)
    return obj


def get_obj_by_name(name: str) -> Any:
    """The class, function, module or other object with this dotted name, imported where needed.

    'np.' and 'tf.' stand for 'numpy.' and 'tensorflow.'. Raises ImportError where nothing has this name.
    """
    return get_obj_from_module(*get_module_from_obj_name(name))


def call_func_by_name(*args: Any, func_name: str | Callable[..., Any], **kwargs: Any) -> Any:
    """Call a function given by its dotted name, or the function itself, with the other arguments."""
    func = get_obj_by_name(func_name) if isinstance(func_name, str) else func_name
    if not callable(func):
        raise TypeError(f'{func_name!r} is not callable: it is of type {type(func).__name__!r}')
    return func(*args, **kwargs)


def construct_class_by_name(*args: Any, class_name: str | type, **kwargs: Any) -> Any:
    """An instance of a class given by its dotted name, or the class itself, made with the other arguments."""
    return call_func_by_name(*args, func_name=class_name, **kwargs)


def is_top_level_function(obj: Any) -> bool:
    """Whether obj is callable and its module holds it under its own name, so that another process can import it."""
    module = sys.modules.get(getattr(obj, '__module__', None) or '')
    name = getattr(obj, '__qualname__', None)
    return callable(obj) and name is not None and getattr(module, name, None) is obj


def get_top_level_function_name(obj: Any) -> str:
    """The dotted name under which `get_obj_by_name` finds a top-level function; ValueError for any other object.

    A function of the running script is named after the script's file, as '__main__' is another module elsewhere.
    """
    if not is_top_level_function(obj):
        raise ValueError(f'{obj!r} is not a function at the top level of a module')
    module = obj.__module__
    if module == '__main__':
        module = Path(sys.modules[module].__file__ or module).stem
    return f'{module}.{obj.__qualname__}'


# ----------------------------------------------------------------------------
# Durations.


def format_time(seconds: float) -> str:
    """A duration in seconds, rounded to whole ones, in at most 3 units: '5s', '1m 05s', '2h 00m 09s', '1d 03h 00m'."""
    return _format_time(seconds, max_units=3)


def format_time_brief(seconds: float) -> str:
    """A duration in seconds, rounded to whole ones, in at most 2 units: '5s', '1m 05s', '2h 00m', '1d 03h'."""
    return _format_time(seconds, max_units=2)


def _format_time(seconds: float, max_units: int) -> str:
    total = round(float(seconds))
    if total < 60:
        return f'{total}s'
    minutes, s = divmod(total, 60)
    hours, m = divmod(minutes, 60)
    d, h = divmod(hours, 24)
    fields = [(d, 'd'), (h, 'h'), (m, 'm'), (s, 's')]
    while fields[0][0] == 0:
        fields.pop(0)
    (lead, unit), *rest = fields[:max_units]
    return ' '.join([f'{lead}{unit}', *(f'{value:02d}{unit}' for value, unit in rest)])


# ----------------------------------------------------------------------------
# Log files.


class Logger(io.TextIOBase):
    """Copies everything printed into a file, from the moment it is made until `close()` or the end of its `with` block.

    It takes the place of sys.stdout and sys.stderr; what is written goes to the stdout before it and, in UTF-8, to the
    file (none if file_name is None). file_mode is that of `open`: 'w' starts the file afresh, 'a' adds to it.
    should_flush flushes both after every write, so that a killed run leaves a complete log.
    """

    def __init__(self, file_name: str | None = None, file_mode: str = 'w', should_flush: bool = True):
        self.should_flush = should_flush
        self.stdout = sys.stdout
        self.stderr = sys.stderr
        self.file: TextIO | None = None
        if file_name is not None:
            self.file = cast(TextIO, open(file_name, file_mode, encoding='utf-8'))  # noqa: SIM115
        sys.stdout = sys.stderr = cast(TextIO, self)

    def writable(self) -> bool:
        return True

    def write(self, text: str | bytes) -> int:
        size = len(text)
        if isinstance(text, bytes):
            text = text.decode('utf-8', errors='replace')
        if text:
            with self._giving_up_stdout():
                self.stdout.write(text)
            with self._giving_up_the_file():
                if self.file is not None:
                    self.file.write(text)
            if self.should_flush:
                self.flush()
        return size

    def flush(self) -> None:
        with self._giving_up_stdout():
            self.stdout.flush()
        with self._giving_up_the_file():
            if self.file is not None:
                self.file.flush()

    @contextlib.contextmanager
    def _giving_up_stdout(self) -> Iterator[None]:
        """A pipe that nobody reads any more counts as a terminal that was closed; what is printed goes to the file."""
        try:
            yield
        except OSError as err:
            if err.errno not in (errno.EPIPE, errno.EIO):
                raise
            with open(os.devnull, 'wb') as nowhere:  # so that the interpreter can flush its stdout at the end
                os.dup2(nowhere.fileno(), self.stdout.fileno())
            signal.raise_signal(getattr(signal, 'SIGHUP', signal.SIGTERM))

    @contextlib.contextmanager
    def _giving_up_the_file(self) -> Iterator[None]:
        """A full disk is an error once; what is printed after it goes to stdout only."""
        try:
            yield
        except OSError as err:
            file, self.file = cast(TextIO, self.file), None
            with contextlib.suppress(OSError):
                file.close()
            raise OSError(f'cannot write {file.name}: {err}') from err

    def close(self) -> None:
        """Give stdout and stderr back and close the file. Whoever kept this object still writes to stdout with it."""
        for name, before in [('stdout', self.stdout), ('stderr', self.stderr)]:
            if getattr(sys, name) is self:  # else a later Logger stands there, which will give back this one
                setattr(sys, name, before)
        with self._giving_up_the_file():
            if self.file is not None:
                self.file.close()
                self.file = None
        super().close()
