"""Files by path, URL or name: opened, and downloaded once into a cache on disk.

`open_url` is the way in. pooch does the part that is the same for all files: a temporary file, the rename once it is
complete, more attempts. What it does not know is here: the names in the cache, which are those of EDM, so that an
existing cache serves; which errors are worth another attempt; web pages sent in the place of files; and that several
processes download a file once.
"""

import contextlib
import difflib
import errno
import hashlib
import io
import logging
import os
import re
import socket
import sys
import tempfile
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload
from urllib.parse import unquote, urlsplit

import filelock
import pooch
import requests
from tqdm import tqdm

from .published import PUBLISHED

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

_TIMEOUT = 30  # seconds, for connecting and between two packets
_CHUNK_SIZE = 1 << 18
_TRANSIENT_STATUS = {408, 429}  # beside 5xx
_PIN = re.compile(r'#sha256=([0-9a-fA-F]{64})$')


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
    """The SHA-256 that the file must have: after the URL as `#sha256=…`, or that of a published file, if known."""
    pin = _PIN.search(url)
    if pin:
        return pin[1].lower()
    return PUBLISHED[url].sha256 if _is_published(url) else None


def is_remote(url: str) -> bool:
    """Whether what `open_url` opens comes from a server."""
    url = _PIN.sub('', url)
    return _is_published(url) or _local_path(url) is None


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

    Raises FileNotFoundError for an absent local file, ValueError for an URL of another kind or with a part missing, and
    OSError naming the URL if the download fails, is empty, has another hash, or is a web page (a log-in, quota or
    virus-scan notice) instead of a file.
    """
    if num_attempts < 1:
        raise ValueError(f'num_attempts={num_attempts} must be at least 1')
    if return_filename and not cache:
        raise ValueError('return_filename=True needs cache=True: without the cache there is no file to name')
    sha256 = pinned_hash(url)
    url = _PIN.sub('', url)
    if _is_published(url):
        url = PUBLISHED[url].url
    path = _local_path(url)
    if path is not None:
        if not os.path.exists(path):
            similar = difflib.get_close_matches(url, PUBLISHED)
            hint = f'; published are {", ".join(similar)}' if similar else ''
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT) + hint, path)
        if sha256 is not None:
            _check_hash(Path(path), sha256, url)
    elif url.startswith('hf://'):
        path = _from_hub(url)
        _check_hash(Path(path), sha256, url)
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
    if not re.match('[a-z][a-z0-9+.-]*://', url, re.IGNORECASE):
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
    _check_hash(found, sha256, f'{url} (in the cache as {found})')
    return found


def _check_hash(path: Path, sha256: str | None, name: str) -> None:
    found = None if sha256 is None else pooch.file_hash(str(path), 'sha256')
    if found != sha256:
        raise OSError(f'cannot use {name}: its SHA-256 is {found}, not {sha256}')


def _download(url: str, folder: str, num_attempts: int, verbose: bool, sha256: str | None) -> Path:
    """Download into the folder, under the name that the server sends, else that of the URL."""
    pooch.get_logger().setLevel(logging.ERROR)  # what it would tell is told here
    name = _cache_file_name(url, url)
    fetch = _Fetch(num_attempts, verbose, sha256)
    store = pooch.create(folder, base_url='', registry={name: None}, urls={name: url}, retry_if_failed=num_attempts - 1)
    try:
        path = Path(store.fetch(name, downloader=fetch))
    except requests.RequestException as err:
        raise OSError(f'cannot download {url} (attempt {num_attempts} of {num_attempts}): {_reason(err)}') from err
    sent_path = path.with_name(_cache_file_name(url, fetch.sent_name or url))
    os.replace(path, sent_path)
    return sent_path


class _Fetch:
    """pooch's downloader. What pooch shall try again stays a RequestException; other failures become an OSError."""

    def __init__(self, num_attempts: int, verbose: bool, sha256: str | None):
        self._num_attempts, self._verbose, self._sha256 = num_attempts, verbose, sha256
        self._attempt = 0
        self.sent_name: str | None = None

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
        self._attempt += 1
        os.unlink(output_file)  # pooch's is closed to other users; a new one of that name has the usual permissions
        try:
            with open(output_file, 'wb') as file:
                self._fetch(url, file)
                file.flush()
                os.fsync(file.fileno())
            _check_hash(Path(output_file), self._sha256, f'the download of {url}')
        except requests.RequestException as err:
            if not _is_transient(err):
                raise OSError(f'cannot download {url}: {_reason(err)}') from err
            if self._verbose and self._attempt < self._num_attempts:
                print(f'{_reason(err)}; attempt {self._attempt + 1} of {self._num_attempts} follows', file=sys.stderr)
            raise

    def _fetch(self, url: str, file: BinaryIO) -> None:
        # Unencoded, the body has the length that Content-Length says.
        headers = {'Accept-Encoding': 'identity'}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            response.raise_for_status()
            length = response.raw.length_remaining
            self.sent_name = _sent_file_name(response.headers.get('Content-Disposition', ''))
            head = b''
            title = (self.sent_name or url).rpartition('/')[2]
            with tqdm(desc=title, total=length, unit='B', unit_scale=True, disable=not self._verbose) as bar:
                for chunk in response.iter_content(_CHUNK_SIZE):
                    head = head or chunk
                    file.write(chunk)
                    bar.update(len(chunk))
            # Older versions of urllib3 take a broken connection for the end of the body.
            if response.raw.length_remaining:
                raise requests.ConnectionError(
                    f'the last {response.raw.length_remaining} of {length} bytes did not come'
                )
        if not head:
            raise OSError(f'cannot download {url}: the server sent an empty body')
        if re.match(rb'(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)\b', head, re.IGNORECASE):
            raise OSError(
                f'cannot download {url}: {_describe_page(head)}; open the URL in a browser and pass the saved file'
            )


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
    unknown_host = isinstance(_cause(err).__context__, socket.gaierror)
    return isinstance(err, kinds) and not isinstance(err, requests.exceptions.SSLError) and not unknown_host


def _reason(err: requests.RequestException) -> str:
    if err.response is not None:
        return f'HTTP status {err.response.status_code} {err.response.reason}'
    text = re.sub(r'^\w+\(host=.*?\): ', '', str(_cause(err)))
    return ' '.join(text.split())


def _cause(err: requests.RequestException) -> BaseException:
    """What urllib3 raised, without what requests wrapped around it."""
    inner = next((arg for arg in err.args if isinstance(arg, Exception)), err)
    reason = getattr(inner, 'reason', None)
    return reason if isinstance(reason, Exception) else inner


def _from_hub(url: str) -> str:
    """The path of hf://user/repo[@revision]/file in the cache of huggingface_hub, downloaded if it is not there."""
    match = re.fullmatch(r'hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)', url)
    if match is None:
        raise ValueError(f'cannot open {url!r}: a file on the Hugging Face hub is hf://user/repo[@revision]/file')
    try:
        import huggingface_hub
    except ImportError as err:
        raise OSError(f'cannot open {url}: it needs huggingface_hub: pip install -e ".[hub]"') from err
    try:
        return huggingface_hub.hf_hub_download(match[1], match[3], revision=match[2])
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as err:
        raise OSError(f'cannot download {url}: {" ".join(str(err).split())}') from err
