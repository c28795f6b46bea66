"""Downloads: what servers may send, how much and for how long; and how messages show it."""

import re
import time
from pathlib import Path

import click.testing
import pytest
import requests
import web_server
from web_server import BODY, sends

from dnnlib import downloads, fetch, published, text, util
from metrics.statistics import read_reference
from torch_utils import network_io

SHA256 = 64 * 'a'
SLEEP = time.sleep


@pytest.fixture(autouse=True)
def _own_cache_and_no_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr('pooch.core.time.sleep', lambda seconds: None)


@pytest.fixture
def server():
    with web_server.running() as server:
        yield server


@pytest.fixture
def downloaded(tmp_path):
    """The names of all files in the cache."""
    return lambda: [path.name for path in tmp_path.glob('cache/downloads/*')]


def content(url, **kwargs):
    with util.open_url(url, verbose=False, **kwargs) as file:
        return file.read()


def error_of(url, **kwargs):
    with pytest.raises(OSError, match='cannot') as info:
        util.open_url(url, num_attempts=1, verbose=False, **kwargs)
    message = str(info.value)
    assert message.isprintable()
    return message


# ----------------------------------------------------------------------------
# Hashes behind a #.


@pytest.mark.parametrize(
    'pin',
    [
        '#sha256=',
        '#sha256=' + 63 * 'a',
        '#sha256=' + 65 * 'a',
        '#sha256=' + 63 * 'a' + 'g',
        f'#sha256={SHA256}\n',
        f'#sha256={SHA256} ',
        f'#sha256:{SHA256}',
        f'#sha256 ={SHA256}',
        f'#SHA256={SHA256}',
        f'#sha-256={SHA256}',
        f'#sha1={40 * "a"}',
        f'#md5={32 * "a"}',
        f'#{SHA256}',
        f'#sha256={SHA256}#sha256={SHA256}',
        '#sha256',
    ],
)
@pytest.mark.parametrize('name', ['http://127.0.0.1:9/net.pkl', 'hf://user/repo/net.pkl', 'file:///net.pkl', 'net.pkl'])
def test_a_hash_that_is_none_is_refused(name, pin):
    for use in (util.open_url, util.pinned_hash, util.is_remote, util.label):
        with pytest.raises(ValueError, match='what follows # is not sha256= and 64 hexadecimal digits') as info:
            use(name + pin)
        assert str(info.value).isprintable()


def test_any_fragment_of_an_url_would_be_ignored():
    with pytest.raises(ValueError, match='what follows #'):
        util.open_url('https://127.0.0.1:9/net.pkl#part')


@pytest.mark.parametrize('name', ['a#1.pkl', '#shadows/net.pkl', 'a#b/c.pkl'])
def test_local_names_may_have_a_hash_sign(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(BODY)
    assert util.open_url(str(path), return_filename=True) == str(path)


# ----------------------------------------------------------------------------
# Size and time.


@pytest.mark.parametrize('length', ['none', None])
def test_a_download_has_a_largest_size(server, monkeypatch, downloaded, length):
    monkeypatch.setattr(fetch, 'MAX_BYTES', len(BODY))
    assert content(server.url('/x', sends(length=length))) == BODY
    monkeypatch.setattr(fetch, 'MAX_BYTES', len(BODY) - 1)
    url = server.url('/y', sends(length=length))
    assert error_of(url) == f'cannot download {url}: it has more than {len(BODY) - 1} bytes'
    assert len(downloaded()) == 1


def test_a_size_that_is_announced_is_not_waited_for(server, monkeypatch):
    url = server.url('/x', sends(b'', length=fetch.MAX_BYTES + 1))
    assert 'more than' in error_of(url)


def drips(before=b'', byte=b'x'):
    """Sends a byte now and then, for ever: no single wait is long."""

    def reply(handler):
        handler.close_connection = True
        handler.wfile.write(before)
        try:
            while not handler.server.released.wait(0.02):
                handler.wfile.write(byte)
        except OSError:
            pass

    return reply


@pytest.mark.parametrize(
    'reply',
    [
        drips(b'HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n'),
        drips(b'HTTP/1.1 200 OK\r\n\r\n'),
        drips(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;'),
        drips(b'HTTP/1.1 200 OK\r\nX-Header: '),
        drips(b'HTTP/1.1 ', b'1'),
        drips(b'', b'HTTP/1.1 100 Continue\r\n\r\n'),
    ],
    ids=['body', 'body without length', 'chunk', 'header', 'status line', 'continue'],
)
def test_a_download_has_a_longest_time(server, monkeypatch, downloaded, reply):
    monkeypatch.setattr(fetch, 'MAX_SECONDS', 0.3)
    url = server.url('/x', reply)
    start = time.monotonic()
    assert error_of(url) == f'cannot download {url}: it takes more than 0.3 seconds'
    assert time.monotonic() - start < 3
    assert downloaded() == []


def test_the_time_is_that_of_all_attempts(server, monkeypatch):
    monkeypatch.setattr(fetch, 'MAX_SECONDS', 0.3)
    monkeypatch.setattr('pooch.core.time.sleep', lambda seconds: SLEEP(0.2))
    with pytest.raises(OSError, match=r'more than 0\.3 seconds'):
        util.open_url(server.url('/x', sends(b'', 500)), num_attempts=100, verbose=False)
    assert server.hits['/x'] < 5


# ----------------------------------------------------------------------------
# Redirects.


@pytest.fixture
def https(monkeypatch):
    """https://127.0.0.1 is answered by the http server."""
    real = requests.adapters.HTTPAdapter.send

    def send(self, request, **kwargs):
        url = request.url
        request.url = url.replace('https://127.0.0.1', 'http://127.0.0.1')
        response = real(self, request, **kwargs)
        response.url = request.url = url
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', send)


def test_https_stays_https(server, https, downloaded):
    secure = server.url('/net.pkl', sends()).replace('http:', 'https:')
    for target in ('/net.pkl', secure, secure.removeprefix('https:')):
        start = server.url('/start', sends(b'', 302, Location=target))
        assert content(start.replace('http:', 'https:'), cache=False) == BODY
        assert content(start, cache=False) == BODY
    plain = secure.replace('https:', 'HTTP:')
    for start in ('/start', '/first'):
        server.url('/start', sends(b'', 302, Location=plain))
        url = server.url('/first', sends(b'', 302, Location='/start')).replace('http:', 'https:')
        message = error_of(url.replace('/first', start))
        assert message.endswith(f'the server redirects from https to {plain}')
    assert downloaded() == []


def test_nothing_but_the_web_is_redirected_to(server):
    for target in ('file:///etc/passwd', 'ftp://127.0.0.1/x', 'data:text/plain,x'):
        error_of(server.url('/x', sends(b'', 302, Location=target)))


# ----------------------------------------------------------------------------
# What is no file.

PAGES = {
    'doctype': b'<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>',
    'html': b'\n\n <HTML lang="en">',
    'head': b'<head><title>x</title>',
    'fragment': b'<div class="error">quota</div>',
    'comment': b'<!-- saved from a page --><p>',
    'xml': b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    'xml of s3': b'<Error><Code>NoSuchKey</Code></Error>',
    'mark of UTF-8': b'\xef\xbb\xbf<html>',
    'UTF-16': '\ufeff<html>'.encode('utf-16-le'),
    'much space': 100_000 * b' ' + b'<html>',
    'empty': b'',
    'blank': b'\n',
}


@pytest.mark.parametrize('name', PAGES)
def test_pages_are_not_kept(server, downloaded, name):
    message = error_of(server.url('/x', sends(PAGES[name])))
    what = 'an empty body' if name in ('empty', 'blank') else '(a|the) web page'
    assert re.search(f'the server sent {what}.* instead of a file; open the URL in a browser', message)
    assert downloaded() == []


@pytest.mark.parametrize('name', PAGES)
def test_pages_that_are_in_the_cache_are_named(server, tmp_path, name):
    url = server.url('/x', sends())
    cached = tmp_path / 'cache' / 'downloads' / f'{downloads._url_digest(url)}_x'
    cached.parent.mkdir(parents=True)
    cached.write_bytes(PAGES[name])
    assert re.search(f'{re.escape(str(cached))} in the cache holds .*; delete that file$', error_of(url))
    assert server.hits['/x'] == 0


@pytest.mark.parametrize('status', [201, 203, 204, 206, 300, 304, 400, 401, 404, 410, 500])
def test_other_replies_are_not_kept(server, downloaded, status):
    assert f'HTTP status {status} ' in error_of(server.url('/x', sends(b'' if status in (204, 304) else BODY, status)))
    assert downloaded() == []


@pytest.mark.parametrize(
    'start', [b'\x80\x04', b'PK\3\4', b'<\0\0\0\0\0\0\0{', b'<a\0\0\0\0\0\0{', b'(dp1\n', b'{"a":1}']
)
def test_files_are_no_pages(server, start):
    assert content(server.url('/x', sends(start + BODY)), cache=False) == start + BODY


@pytest.mark.parametrize(
    'unit', [b'<title>', b'<title', b'<title a>', b'<title>\0', b'</title>', b' <', b'<title' + 900 * b' ']
)
def test_a_title_is_looked_for_in_linear_time(tmp_path, unit):
    (tmp_path / 'page').write_bytes(b'<html>' + unit * (2_000_000 // len(unit)))
    start = time.process_time()
    assert fetch.no_file(tmp_path / 'page').endswith('web page') or len(unit) < 10
    assert time.process_time() - start < 0.2


def test_a_page_is_named_by_its_title(tmp_path):
    (tmp_path / 'page').write_bytes(b'<html><head>\n<TITLE id="x">Google\n Drive\x1b[2J \xc3\xa9</title>')
    assert fetch.no_file(tmp_path / 'page') == r"the web page 'Google Drive\\x1b[2J é'"


# ----------------------------------------------------------------------------
# Text.


def test_names_that_servers_send_are_escaped(server, capsys, downloaded):
    evil = 'a\x1b]0;pwned\x07.pkl'
    util.open_url(server.url('/x', sends(Content_Disposition=f'attachment; filename="{evil}"')), return_filename=True)
    err = capsys.readouterr().err
    assert r'a\x1b]0;pwned\x07.pkl: 100%' in err
    assert not {'\x1b', '\x07'} & set(err.replace('\x1b[A', ''))
    assert downloaded()[0].endswith('_a__0_pwned_.pkl')


def test_the_words_of_a_status_are_escaped(server):
    def reply(handler):
        handler.close_connection = True
        handler.wfile.write(b'HTTP/1.1 404 Not \x1b[2J Found\r\n\r\n')

    assert error_of(server.url('/x', reply)).endswith(r'HTTP status 404 Not \x1b[2J Found')


def test_the_label_of_a_download_names_its_file(server, monkeypatch):
    url = server.url('/x', sends())
    monkeypatch.setitem(published.PUBLISHED, 'a-network', published.PublishedFile(url, None))
    assert [util.label(name) for name in (url, 'a-network', 'a\x1b/b')] == [url, 'a-network', r'a\x1b/b']
    path = util.open_url(url, verbose=False, return_filename=True)
    for name in (url, 'a-network', f'{url}#sha256={SHA256}'):
        assert util.label(name) == f'{name} (in the cache as {path})'


def test_one_line_of_a_long_message_takes_no_time():
    start = time.process_time()
    for unit in ('x', 'x ', '\n', '\x1b', 'é '):
        line = util.one_line(unit * (30_000_000 // len(unit)))
        assert len(line) <= 500
        assert line.endswith(' [...]')
        assert line.isprintable()
    assert time.process_time() - start < 0.5  # most of it makes the messages


def test_one_line_shows_the_beginning():
    assert util.one_line(1000 * 'x', 20) == 14 * 'x' + ' [...]'
    assert util.one_line('cannot use ' + 1000 * 'x', 40) == 'cannot use ' + 23 * 'x' + ' [...]'
    assert util.one_line('one two  three\nfour', 17) == 'one two thr [...]'
    assert util.one_line('one two  three\nfour', 15) == 'one two [...]'
    assert util.one_line('one two  three\nfour', 18) == 'one two three four'
    assert util.one_line('one two' + 200 * ' ' + 'three', 18) == 'one two [...]'
    assert util.one_line(ValueError('a\tb\x1b')) == r'a b\x1b'


def test_there_is_one_such_function():
    assert (util.printable, util.one_line) == (text.printable, text.one_line)
    sources = set(Path(downloads.__file__).parents[1].glob('*/*.py')) - {Path(__file__)}
    found = [path.name for path in sources if "'unicode_escape'" in path.read_text(encoding='utf-8')]
    assert found == ['text.py']


# ----------------------------------------------------------------------------
# Errors about what is in the cache name the file.


def read_network(url):
    network_io.load_network(url)


@pytest.mark.parametrize('read', [read_network, read_reference])
def test_a_file_in_the_cache_that_is_none_is_named(server, tmp_path, read):
    url = server.url('/x', sends())
    with pytest.raises(ValueError, match=r'/x \(in the cache as ') as info:
        read(url)
    (cached,) = (tmp_path / 'cache' / 'downloads').iterdir()
    assert str(info.value).startswith(f'{url} (in the cache as {cached})')


def test_inspect_names_the_file_in_the_cache(server, tmp_path):
    done = click.testing.CliRunner().invoke(network_io.main, ['inspect', server.url('/x', sends())])
    (cached,) = (tmp_path / 'cache' / 'downloads').iterdir()
    assert done.exit_code == 2
    assert f'/x (in the cache as {cached})\n' in done.output
