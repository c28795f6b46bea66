"""One file from a web server: what pooch calls to fetch it, within limits of size and time.

What pooch does not know is here: which errors are worth another attempt, that https stays https, and what servers send
in the place of files. All that a server sends is shown `printable`.
"""

import os
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from email.message import Message
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

import requests
from tqdm import tqdm

from .text import one_line, printable

MAX_BYTES = 8 << 30  # of one download; the largest published network has 3 GB
MAX_SECONDS = 12 * 3600  # for one download, all attempts together
HEAD_BYTES = 1 << 12  # of a file, by which a web page is told

_TIMEOUT = 30  # seconds, for connecting and between two packets
_CHUNK_SIZE = 1 << 18
_TRANSIENT_STATUS = {408, 429}  # beside 5xx


class Fetch:
    """pooch's downloader. What pooch shall try again stays a RequestException; other failures become an OSError.

    `check`: is called with the path of the complete file, and raises if it is not the one that was meant.
    `sent_name`: the name that the server gave the file, afterwards.
    """

    def __init__(self, num_attempts: int, verbose: bool, check: Callable[[str], None]):
        self._num_attempts, self._verbose, self._check = num_attempts, verbose, check
        self._attempt = 0
        self._end = time.monotonic() + MAX_SECONDS
        self.sent_name: str | None = None

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
        self._attempt += 1
        os.unlink(output_file)  # pooch's is closed to other users; a new one of that name has the usual permissions
        try:
            with open(output_file, 'wb') as file:
                _in_time(lambda: self._save(url, file), self._end, url)
                file.flush()
                os.fsync(file.fileno())
            self._check(output_file)
        except requests.RequestException as err:
            if not _is_transient(err):
                raise OSError(f'cannot download {printable(url)}: {reason(err)}') from err
            if self._verbose and self._attempt < self._num_attempts:
                print(f'{reason(err)}; attempt {self._attempt + 1} of {self._num_attempts} follows', file=sys.stderr)
            raise

    def _save(self, url: str, file: BinaryIO) -> None:
        with _Session() as session, session.get(url, headers=_HEADERS, stream=True, timeout=_TIMEOUT) as response:
            response.raise_for_status()
            if response.status_code != 200:
                raise OSError(f'cannot download {printable(url)}: {_status(response)}, not 200')
            self.sent_name = _sent_file_name(response.headers.get('Content-Disposition', ''))
            length = response.raw.length_remaining
            _check_size(length or 0, url)
            title = one_line((self.sent_name or url).rpartition('/')[2], 80)
            with tqdm(desc=title, total=length, unit='B', unit_scale=True, disable=not self._verbose) as bar:
                size = 0
                for chunk in response.iter_content(_CHUNK_SIZE):
                    size += len(chunk)
                    _check_size(size, url)
                    file.write(chunk)
                    bar.update(len(chunk))


# Unencoded, the body has the length that Content-Length says.
_HEADERS = {'Accept-Encoding': 'identity'}


class _Session(requests.Session):
    """Follows no redirect from https to anything else."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target is not None and urlsplit(resp.url).scheme == 'https':
            target = urljoin(resp.url, target)
            if urlsplit(target).scheme != 'https':
                resp.close()
                raise requests.exceptions.InvalidSchema(f'the server redirects from https to {one_line(target, 200)}')
        return target


def _in_time(work: Callable[[], None], end: float, url: str) -> None:
    """Call `work` in a thread, which is left to itself where it has not ended at this time.

    No limit of a socket would do: a server that sends a byte now and then keeps all of them, in headers as well.
    """
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            work()
        except BaseException as err:
            outcome.put(err)
        else:
            outcome.put(None)

    threading.Thread(target=run, daemon=True).start()
    try:
        err = outcome.get(timeout=max(0, end - time.monotonic()))
    except queue.Empty:
        raise OSError(f'cannot download {printable(url)}: it takes more than {MAX_SECONDS:g} seconds') from None
    if err is not None:
        raise err


def _check_size(size: int, url: str) -> None:
    if size > MAX_BYTES:
        raise OSError(f'cannot download {printable(url)}: it has more than {MAX_BYTES} bytes')


def _sent_file_name(content_disposition: str) -> str | None:
    message = Message()
    message['Content-Disposition'] = content_disposition
    return message.get_filename()


# ----------------------------------------------------------------------------
# What servers send in the place of files.


def no_file(path: str | os.PathLike) -> str:
    """What a file holds, if that is nothing or a web page, HTML or XML; '' for anything else."""
    with open(path, 'rb') as file:
        head = file.read(HEAD_BYTES)
        while head.isspace():
            head = file.read(HEAD_BYTES)
        head = head.removeprefix(b'\xef\xbb\xbf').lstrip()
        if not head:
            return 'an empty body'
        if head.startswith((b'\xff\xfe<\0', b'\xfe\xff\0<')):
            return 'a web page'
        if not re.match(rb'<[!?/a-zA-Z][\s -~]', head):
            return ''
        title = _title(head + file.read(16 * HEAD_BYTES))
    return f'the web page {one_line(title, 80)!r}' if title else 'a web page'


def _title(page: bytes) -> str:
    """The text of the first <title>; '' if there is none."""
    match = re.search(rb'<title[^>]{0,200}>([^<]*)', page, re.IGNORECASE)
    return match[1].decode('utf-8', errors='replace').strip() if match else ''


# ----------------------------------------------------------------------------
# What requests raises.


def reason(err: requests.RequestException) -> str:
    if err.response is not None:
        return _status(err.response)
    return one_line(re.sub(r'^(\w+\(host=.*?\)|<[^>]*>): ', '', str(_cause(err))[:5000]))


def _status(response: requests.Response) -> str:
    return f'HTTP status {response.status_code} {one_line(response.reason or "", 80)}'.rstrip()


def _is_transient(err: requests.RequestException) -> bool:
    if err.response is not None:
        return err.response.status_code >= 500 or err.response.status_code in _TRANSIENT_STATUS
    kinds = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    unknown_host = isinstance(_cause(err).__context__, socket.gaierror)
    return isinstance(err, kinds) and not isinstance(err, requests.exceptions.SSLError) and not unknown_host


def _cause(err: requests.RequestException) -> BaseException:
    """What urllib3 raised, without what requests wrapped around it."""
    inner = next((arg for arg in err.args if isinstance(arg, Exception)), err)
    reason = getattr(inner, 'reason', None)
    return reason if isinstance(reason, Exception) else inner
