"""Files by path, URL or name: opened, and downloaded once into a cache on disk.

`open_url` is the way in. pooch does the part that is the same for all files: a temporary file, the rename once it is
complete, more attempts; what it calls for each is in `fetch`. What it does not know is here: the names in the cache,
which are those of EDM, so that an existing cache serves; hashes behind a `#`; and that several processes download a
file once.
"""

import contextlib
import difflib
import errno
import hashlib
import io
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload
from urllib.parse import unquote, urlsplit

from .published import PUBLISHED
from .text import one_line, printable

# requests, pooch and filelock take longer to import than all else here, so what downloads imports them.

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


def _find_cached(cache_dir: str, url: str) -> Path | None:
    found = list(Path(cache_dir).glob(f'{_url_digest(url)}_*'))
    return found[0] if len(found) == 1 else None


# Opening.

_SCHEME = re.compile('[a-z][a-z0-9+.-]*://', re.IGNORECASE)
_PIN = re.compile(r'(.*)#sha256=([0-9a-fA-F]{64})', re.DOTALL)
_PIN_MEANT = re.compile(r'#\s*(sha|md5|blake|hash|checksum|[0-9a-f]{32})[^/\\]*$', re.IGNORECASE)


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


def pinned_hash(url: str) -> str | None:
    """The SHA-256 that the file must have: after the URL as `#sha256=…`, or that of a published file, if known.

    Raises ValueError for a hash that is none: whoever wrote it relies on it.
    """
    url, pin = _split_pin(url)
    return pin or (PUBLISHED[url].sha256 if _is_published(url) else None)


def is_remote(url: str) -> bool:
    """Whether what `open_url` opens comes from a server. Raises what `pinned_hash` does."""
    url, _ = _split_pin(url)
    return _is_published(url) or _local_path(url) is None


def label(url: str) -> str:
    """How messages name what `open_url` has opened: `printable`, and for a download with the file in the cache."""
    plain, _ = _split_pin(url)
    plain = PUBLISHED[plain].url if _is_published(plain) else plain
    found = _find_cached(make_cache_dir_path('downloads'), plain) if is_url(plain) else None
    return printable(f'{url} (in the cache as {found})' if found else url)


def _split_pin(url: str) -> tuple[str, str | None]:
    """The URL, path or name without the hash behind it; the hash."""
    match = _PIN.fullmatch(url)
    plain, pin = (match[1], match[2].lower()) if match else (url, None)
    is_path = not _SCHEME.match(plain)
    if _PIN_MEANT.search(plain) if is_path else '#' in plain:
        raise ValueError(f'cannot open {one_line(url)!r}: what follows # is not sha256= and 64 hexadecimal digits')
    return plain, pin


def _is_published(name: str) -> bool:
    return name in PUBLISHED and not os.path.exists(name)


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
    """Open a file for reading bytes, downloading it at most once.

    url: a local path, or the name of a published file (`dnnlib.published`), or an URL: http://, https://, file:///, or
    hf://user/repo[@revision]/file for the Hugging Face hub, which needs the extra `hub` and has a cache of its own.
    `#sha256=…` after any of these, or the entry of a published file, is the hash that the file must have.

    Downloads are kept in cache_dir (default: 'downloads' below the cache root) as the MD5 of the URL, '_' and a name;
    one that is already there is used without asking the server. A file appears in the cache whole or not at all. Where
    several processes want the same file, one downloads it and the others wait.

    num_attempts: how often a download is tried when the connection breaks or the server fails (5xx, 408, 429).
    verbose: show progress on stderr. return_filename: return the path instead of a file object.
    cache=False: neither look into the cache nor write to it; the content is then held in memory.

    Raises FileNotFoundError for an absent local file, ValueError for an URL of another kind, with a part missing, or
    with something else than such a hash behind the #, and OSError naming the URL if the download fails, is empty, has
    another hash, is a web page (a log-in, quota or virus-scan notice) instead of a file, or passes one of the limits
    `fetch.MAX_BYTES` and `fetch.MAX_SECONDS`. An error about what is in the cache names the file there.
    """
    if num_attempts < 1:
        raise ValueError(f'num_attempts={num_attempts} must be at least 1')
    if return_filename and not cache:
        raise ValueError('return_filename=True needs cache=True: without the cache there is no file to name')
    sha256 = pinned_hash(url)
    url, _ = _split_pin(url)
    if _is_published(url):
        url = PUBLISHED[url].url
    path = _local_path(url)
    if path is not None:
        if not os.path.exists(path):
            similar = difflib.get_close_matches(url, PUBLISHED)
            hint = f'; published are {", ".join(similar)}' if similar else ''
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT) + hint, path)
        if sha256 is not None:
            _check_hash(path, sha256, url)
    elif url.startswith('hf://'):
        path = _from_hub(url)
        _check_hash(path, sha256, f'{url} (in the cache as {path})')
    elif not is_url(url):
        raise ValueError(
            f'cannot open {url!r}: give a local path or an URL http://host/…, https://host/…, file:///… or hf://user/repo/…'
        )
    elif not cache:
        with tempfile.TemporaryDirectory() as folder:
            return io.BytesIO(_download(url, folder, num_attempts, verbose, sha256).read_bytes())
    else:
        path = str(_cached(url, cache_dir or make_cache_dir_path('downloads'), num_attempts, verbose, sha256))
    return path if return_filename else open(path, 'rb')


def _local_path(url: str) -> str | None:
    """The path that url stands for, or None if it is an URL of another kind than file://."""
    if not _SCHEME.match(url):
        return url
    if not url.lower().startswith('file://'):
        return None
    parts = urlsplit(url)
    if parts.netloc not in ('', 'localhost'):
        raise ValueError(f'cannot open {url!r}: a file URL has three slashes before an absolute path, file:///…')
    path = unquote(parts.path)
    return path[1:] if re.match('/[a-zA-Z]:', path) else path


# Downloading.


def _cached(url: str, cache_dir: str, num_attempts: int, verbose: bool, sha256: str | None) -> Path:
    """The file in the cache, downloaded if it is not there, by one process at a time."""
    import filelock

    from .fetch import no_file

    found = _find_cached(cache_dir, url)
    if found is None:
        os.makedirs(cache_dir, exist_ok=True)
        lock = Path(cache_dir, f'.{_url_digest(url)}.lock')
        with filelock.FileLock(lock):
            try:
                found = _find_cached(cache_dir, url)
                if found is None:
                    return _download(url, cache_dir, num_attempts, verbose, sha256)
            finally:
                with contextlib.suppress(OSError):  # on Windows, another process waits for it
                    lock.unlink()
    wrong = no_file(found)
    if wrong:
        raise OSError(f'cannot use {printable(url)}: {printable(found)} in the cache holds {wrong}; delete that file')
    _check_hash(found, sha256, f'{url} (in the cache as {found})')
    return found


def _check_hash(path: str | os.PathLike, sha256: str | None, name: str) -> None:
    if sha256 is None:
        return
    import pooch

    found = pooch.file_hash(os.fspath(path), 'sha256')
    if found != sha256:
        raise OSError(f'cannot use {printable(name)}: its SHA-256 is {found}, not {sha256}')


def _download(url: str, folder: str, num_attempts: int, verbose: bool, sha256: str | None) -> Path:
    """Download into the folder, under the name that the server sends, else that of the URL."""
    import pooch
    import requests

    from .fetch import Fetch, no_file, reason

    def check(path: str) -> None:
        wrong = no_file(path)
        if wrong:
            hint = 'open the URL in a browser and pass the saved file'
            raise OSError(f'cannot download {printable(url)}: the server sent {wrong} instead of a file; {hint}')
        _check_hash(path, sha256, f'the download of {url}')

    pooch.get_logger().setLevel(logging.ERROR)  # what it would tell is told here
    name = _cache_file_name(url, url)
    fetch = Fetch(num_attempts, verbose, check)
    store = pooch.create(folder, base_url='', registry={name: None}, urls={name: url}, retry_if_failed=num_attempts - 1)
    try:
        path = Path(store.fetch(name, downloader=fetch))
    except requests.RequestException as err:
        attempts = f'(attempt {num_attempts} of {num_attempts})'
        raise OSError(f'cannot download {printable(url)} {attempts}: {reason(err)}') from err
    sent_path = path.with_name(_cache_file_name(url, fetch.sent_name or url))
    os.replace(path, sent_path)
    return sent_path


def _from_hub(url: str) -> str:
    """The path of hf://user/repo[@revision]/file in the cache of huggingface_hub, downloaded if it is not there."""
    match = re.fullmatch(r'hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)', url)
    if match is None:
        raise ValueError(f'cannot open {url!r}: a file on the Hugging Face hub is hf://user/repo[@revision]/file')
    try:
        import huggingface_hub
    except ImportError as err:
        raise OSError(f'cannot open {printable(url)}: it needs huggingface_hub: pip install -e ".[hub]"') from err
    try:
        return huggingface_hub.hf_hub_download(match[1], match[3], revision=match[2])
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as err:
        raise OSError(f'cannot download {printable(url)}: {one_line(err)}') from err
