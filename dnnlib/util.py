"""Attribute dictionaries, objects by name, log files, durations, and downloads with a cache on disk."""

import contextlib
import errno
import hashlib
import importlib
import io
import os
import re
import sys
import tempfile
import time
import types
import uuid
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast, overload
from urllib.parse import unquote, urlsplit

import requests
from tqdm import tqdm


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


# Objects by name.

_ABBREVIATIONS = {'np': 'numpy', 'tf': 'tensorflow'}


# ----------------------------------------------------------------------------
# Files that appear whole or not at all.


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """`with atomic_write(path) as file:` – a binary file that takes its name once it is complete and on disk.

    Written beside `path` under a temporary name; an exception, or a kill, leaves what was at `path` before.
    """
    target = Path(path)
    temp_path = target.with_name(f'.tmp_{uuid.uuid4().hex}_{target.name}')
    try:
        with open(temp_path, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp_path, target)
    finally:
        temp_path.unlink(missing_ok=True)


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
            for stream in self._streams():
                stream.write(text)
            if self.should_flush:
                self.flush()
        return size

    def flush(self) -> None:
        for stream in self._streams():
            stream.flush()

    def _streams(self) -> list[TextIO]:
        return [self.stdout] if self.file is None else [self.stdout, self.file]

    def close(self) -> None:
        """Give stdout and stderr back and close the file. Whoever kept this object still writes to stdout with it."""
        for name, before in [('stdout', self.stdout), ('stderr', self.stderr)]:
            if getattr(sys, name) is self:  # else a later Logger stands there, which will give back this one
                setattr(sys, name, before)
        if self.file is not None:
            self.file.close()
            self.file = None
        super().close()


# The cache.

_cache_root: str | None = None


def set_cache_dir(path: str | None) -> None:
    """Use this folder as the cache root of this process, before all environment variables; None takes that back."""
    global _cache_root
    _cache_root = path


def make_cache_dir_path(*paths: str) -> str:
    """The path of a file or folder below the cache root; nothing is created.

    The root is the first of these that is set: the argument of `set_cache_dir`, $DNNLIB_CACHE_DIR,
    $HOME/.cache/dnnlib, $USERPROFILE/.cache/dnnlib, and else .cache/dnnlib in the folder for temporary files.
    """
    root = _cache_root or os.environ.get('DNNLIB_CACHE_DIR')
    if not root:
        home = os.environ.get('HOME') or os.environ.get('USERPROFILE') or tempfile.gettempdir()
        root = os.path.join(home, '.cache', 'dnnlib')
    return os.path.join(root, *paths)


def _url_digest(url: str) -> str:
    return hashlib.md5(url.encode('utf-8'), usedforsecurity=False).hexdigest()


def _cache_file_name(url: str, name: str) -> str:
    return f'{_url_digest(url)}_' + re.sub(r'[^0-9a-zA-Z\-._]', '_', name)[:128]


def _find_cached(cache_dir: str, url: str) -> str | None:
    found = list(Path(cache_dir).glob(f'{_url_digest(url)}_*'))
    return str(found[0]) if len(found) == 1 else None


# Opening URLs.

_TIMEOUT = 30  # seconds, for connecting and between two packets
_CHUNK_SIZE = 1 << 18
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 4.0  # seconds; ten attempts wait for 24 s in all
_TRANSIENT_STATUS = {408, 429}  # beside 5xx


def is_url(obj: Any, allow_file_urls: bool = False) -> bool:
    """Whether obj is an http or https URL with a host, or (if allowed) a file URL."""
    if not isinstance(obj, str):
        return False
    try:
        parts = urlsplit(obj)
        host = parts.hostname
    except ValueError:
        return False
    return (parts.scheme in ('http', 'https') and bool(host)) or (allow_file_urls and obj.lower().startswith('file://'))


@overload
def open_url(
    url: str,
    cache_dir: str | None = ...,
    num_attempts: int = ...,
    verbose: bool = ...,
    return_filename: Literal[False] = ...,
    cache: bool = ...,
) -> BinaryIO: ...
@overload
def open_url(
    url: str,
    cache_dir: str | None = ...,
    num_attempts: int = ...,
    verbose: bool = ...,
    *,
    return_filename: Literal[True],
    cache: bool = ...,
) -> str: ...
def open_url(
    url: str,
    cache_dir: str | None = None,
    num_attempts: int = 10,
    verbose: bool = True,
    return_filename: bool = False,
    cache: bool = True,
) -> str | BinaryIO:
    """Open a local path, a file:// URL or an http(s) URL for reading bytes, downloading it at most once.

    Downloads are kept in cache_dir (default: 'downloads' below the cache root) as the MD5 of the URL, '_' and a name;
    one that is already there is used without asking the server. A file appears in the cache whole or not at all.

    num_attempts: how often a download is tried when the connection breaks or the server fails (5xx, 408, 429).
    verbose: show progress on stderr. return_filename: return the path instead of a file object.
    cache=False: neither look into the cache nor write to it; the body is then held in memory.

    Raises FileNotFoundError for an absent local file, ValueError for a URL of another kind or with a part missing, and
    OSError naming the URL if the download fails, is empty, or is a web page (a log-in, quota or virus-scan notice)
    instead of a file.
    """
    if num_attempts < 1:
        raise ValueError(f'num_attempts={num_attempts} must be at least 1')
    if return_filename and not cache:
        raise ValueError('return_filename=True needs cache=True: without the cache there is no file to name')
    path = _local_path(url)
    if path is not None:
        if not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    elif not is_url(url):
        raise ValueError(f'cannot open {url!r}: give a local path or an URL http://host/…, https://host/… or file:///…')
    elif not cache:
        body = io.BytesIO()
        _download(url, body, num_attempts, verbose)
        body.seek(0)
        return body
    else:
        cache_dir = cache_dir or make_cache_dir_path('downloads')
        path = _find_cached(cache_dir, url) or _download_to_cache(url, cache_dir, num_attempts, verbose)
    return path if return_filename else open(path, 'rb')


def _local_path(url: str) -> str | None:
    """The path that url stands for, or None if it is an URL of another kind than file://."""
    if not re.match('[a-z][a-z0-9+.-]*://', url, re.IGNORECASE):
        return url
    if not url.lower().startswith('file://'):
        return None
    parts = urlsplit(url)
    if parts.netloc not in ('', 'localhost'):
        raise ValueError(f'cannot open {url!r}: a file URL has three slashes before an absolute path, file:///…')
    path = unquote(parts.path)
    return path[1:] if re.match('/[a-zA-Z]:', path) else path


def _download_to_cache(url: str, cache_dir: str, num_attempts: int, verbose: bool) -> str:
    os.makedirs(cache_dir, exist_ok=True)
    temp_path = Path(cache_dir, f'tmp_{uuid.uuid4().hex}_{_cache_file_name(url, url)}')
    try:
        with temp_path.open('wb') as file:
            name = _download(url, file, num_attempts, verbose)
            file.flush()
            os.fsync(file.fileno())
        path = os.path.join(cache_dir, _cache_file_name(url, name))
        os.replace(temp_path, path)
    finally:
        temp_path.unlink(missing_ok=True)
    return path


def _download(url: str, file: BinaryIO, num_attempts: int, verbose: bool) -> str:
    """Write the body to file, trying again after transient errors. Returns the name that the server sent, else url."""
    attempt, pause = 1, _FIRST_PAUSE
    while True:
        file.seek(0)
        file.truncate()
        try:
            return _download_once(url, file, verbose)
        except requests.RequestException as err:
            if not _is_transient(err) or attempt == num_attempts:
                raise OSError(f'cannot download {url} (attempt {attempt} of {num_attempts}): {_reason(err)}') from err
            if verbose:
                print(f'{_reason(err)}; attempt {attempt + 1} of {num_attempts} in {pause:g} s', file=sys.stderr)
        time.sleep(pause)
        attempt, pause = attempt + 1, min(2 * pause, _LONGEST_PAUSE)


def _download_once(url: str, file: BinaryIO, verbose: bool) -> str:
    # Unencoded, the body has the length that Content-Length says.
    headers = {'Accept-Encoding': 'identity'}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        response.raise_for_status()
        length = response.raw.length_remaining
        name = _sent_file_name(response.headers.get('Content-Disposition', '')) or url
        head = b''
        bar = tqdm(desc=name.rpartition('/')[2], total=length, unit='B', unit_scale=True, disable=not verbose)
        with bar:
            for chunk in response.iter_content(_CHUNK_SIZE):
                head = head or chunk
                file.write(chunk)
                bar.update(len(chunk))
        # Older versions of urllib3 take a broken connection for the end of the body.
        if response.raw.length_remaining:
            raise requests.ConnectionError(f'the last {response.raw.length_remaining} of {length} bytes did not come')
    if not head:
        raise OSError(f'cannot download {url}: the server sent an empty body')
    if re.match(rb'(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)\b', head, re.IGNORECASE):
        raise OSError(
            f'cannot download {url}: {_describe_page(head)}; open the URL in a browser and pass the saved file'
        )
    return name


def _sent_file_name(content_disposition: str) -> str | None:
    message = Message()
    message['Content-Disposition'] = content_disposition
    return message.get_filename()


def _describe_page(page: bytes) -> str:
    match = re.search(r'<title[^>]*>(.*?)</title>', page.decode('utf-8', errors='replace'), re.IGNORECASE | re.DOTALL)
    title = ' '.join(match[1].split())[:80] if match else ''
    return f'the server sent the web page {title!r} instead of a file' if title else 'the server sent a web page'


def _is_transient(err: requests.RequestException) -> bool:
    if err.response is not None:
        return err.response.status_code >= 500 or err.response.status_code in _TRANSIENT_STATUS
    kinds = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(err, kinds) and not isinstance(err, requests.exceptions.SSLError)


def _reason(err: requests.RequestException) -> str:
    if err.response is not None:
        return f'HTTP status {err.response.status_code} {err.response.reason}'
    return ' '.join(str(err).split())
