import copy
import hashlib
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import pytest
import web_server
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm
from web_server import BODY, Server, hangs_up, sends, stalls

import dnnlib
from dnnlib import downloads, fetch, published, util

ROOT = Path(__file__).parents[1]
PUBLISHED = 'https://nvlabs-fi-cdn.nvidia.com/edm/'


def run_python(*args, cwd=None):
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# EasyDict.


def test_package_has_the_names_in_use_and_nothing_of_pytorch():
    code = """import sys, dnnlib
dnnlib.EasyDict, dnnlib.util.open_url, dnnlib.make_cache_dir_path
print('torch' in sys.modules)"""
    assert run_python('-c', code, cwd=Path(dnnlib.__file__).parents[1]) == 'False'


def test_easydict_entries_are_attributes():
    d = dnnlib.EasyDict(a=1)
    d.b = 2
    d['c'] = 3
    assert (d.a, d['b'], d.c) == (1, 2, 3)
    del d.a
    assert d == {'b': 2, 'c': 3}
    assert not vars(d)


@pytest.mark.parametrize('access', [lambda d: d.absent, lambda d: delattr(d, 'absent')])
def test_easydict_absent_attribute(access):
    with pytest.raises(AttributeError, match="no entry 'absent'"):
        access(dnnlib.EasyDict(a=1))
    assert not hasattr(dnnlib.EasyDict(), 'absent')


@pytest.mark.parametrize('clone', [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_easydict_survives_copy_and_pickle(clone):
    d = dnnlib.EasyDict(a=1, nested=dnnlib.EasyDict(b=2))
    other = clone(d)
    assert type(other) is dnnlib.EasyDict
    assert other == d
    assert other.nested.b == 2


# Objects by name.


@pytest.mark.parametrize(
    ('name', 'obj'),
    [
        ('dnnlib', dnnlib),
        ('dnnlib.util', util),
        ('dnnlib.util.EasyDict', dnnlib.EasyDict),
        ('dnnlib.EasyDict', dnnlib.EasyDict),
        ('np.linalg.norm', np.linalg.norm),
        ('numpy.sin', np.sin),
        ('builtins.len', len),
        ('collections.OrderedDict.move_to_end', OrderedDict.move_to_end),
    ],
)
def test_get_obj_by_name(name, obj):
    assert util.get_obj_by_name(name) is obj


def test_module_and_rest_of_name():
    assert util.get_module_from_obj_name('np.linalg.norm') == (np.linalg, 'norm')
    assert util.get_module_from_obj_name('dnnlib.util') == (dnnlib, 'util')
    assert util.get_obj_from_module(util, 'EasyDict.__name__') == 'EasyDict'
    with pytest.raises(AttributeError, match='Nothing'):
        util.get_obj_from_module(util, 'Nothing')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('dnnlib.util.Nothing', "cannot find 'dnnlib.util.Nothing': module 'dnnlib.util' lacks it"),
        ('dnnlib.nothing.at.all', "cannot find 'dnnlib.nothing.at.all': module 'dnnlib' lacks it"),
        ('no_such_package.Net', "cannot find 'no_such_package.Net': there is no module 'no_such_package'"),
        ('', 'not a dotted name'),
        ('.util', 'not a dotted name'),
        ('dnnlib..util', 'not a dotted name'),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ImportError, match=re.escape(message)):
        util.get_obj_by_name(name)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Its submodules: one behind a function of the same name, one not yet imported, one that cannot be imported."""
    folder = tmp_path / 'dnnlib_test_package'
    folder.mkdir()
    (folder / '__init__.py').write_text('from .shadow import shadow\n')
    (folder / 'shadow.py').write_text('def shadow(): return 1\ndef other(): return 2\n')
    (folder / 'later.py').write_text('value = 3\n')
    (folder / 'broken.py').write_text('import no_such_dependency\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield folder.name
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def test_names_mean_what_python_means_by_them(package):
    assert util.call_func_by_name(func_name=f'{package}.shadow') == 1
    assert util.call_func_by_name(func_name=f'{package}.shadow.other') == 2
    assert util.get_obj_by_name(f'{package}.later').value == 3


def test_failing_import_is_not_hidden(package):
    with pytest.raises(ModuleNotFoundError, match='no_such_dependency'):
        util.get_obj_by_name(f'{package}.broken.Net')


@pytest.mark.parametrize('class_name', ['collections.OrderedDict', OrderedDict])
def test_construct_class_by_name(class_name):
    made = util.construct_class_by_name([('a', 1)], class_name=class_name, b=2)
    assert type(made) is OrderedDict
    assert made == {'a': 1, 'b': 2}


@pytest.mark.parametrize('func_name', ['np.full', np.full])
def test_call_func_by_name(func_name):
    assert util.call_func_by_name(2, func_name=func_name, fill_value=7).tolist() == [7, 7]


def test_call_func_by_name_needs_a_callable():
    with pytest.raises(TypeError, match=r"'dnnlib\.util' is not callable"):
        util.call_func_by_name(func_name='dnnlib.util')


@pytest.mark.parametrize('func', [run_python, util.format_time, len, dnnlib.EasyDict])
def test_top_level_function_names(func):
    assert util.is_top_level_function(func)
    assert util.get_obj_by_name(util.get_top_level_function_name(func)) is func


@pytest.mark.parametrize('obj', [lambda: 0, np.zeros(1).sum, OrderedDict.fromkeys, 'text', None, 3])
def test_not_top_level_functions(obj):
    assert not util.is_top_level_function(obj)
    with pytest.raises(ValueError, match='top level of a module'):
        util.get_top_level_function_name(obj)


def test_top_level_function_of_a_script(tmp_path):
    root = str(Path(dnnlib.__file__).parents[1])
    (tmp_path / 'script.py').write_text(
        f'import sys; sys.path.append({root!r})\n'
        'from dnnlib.util import get_top_level_function_name\n'
        'def job(): pass\n'
        'print(get_top_level_function_name(job))\n'
    )
    assert run_python(str(tmp_path / 'script.py')) == 'script.job'


# Durations.


@pytest.mark.parametrize(
    ('seconds', 'full', 'brief'),
    [
        (0, '0s', '0s'),
        (5.4, '5s', '5s'),
        (59.4, '59s', '59s'),
        (59.6, '1m 00s', '1m 00s'),
        (65, '1m 05s', '1m 05s'),
        (3599.4, '59m 59s', '59m 59s'),
        (3600, '1h 00m 00s', '1h 00m'),
        (2 * 3600 + 9, '2h 00m 09s', '2h 00m'),
        (86399, '23h 59m 59s', '23h 59m'),
        (86400, '1d 00h 00m', '1d 00h'),
        (86400 + 3 * 3600 + 20 * 60 + 59, '1d 03h 20m', '1d 03h'),
        (100 * 86400, '100d 00h 00m', '100d 00h'),
        (-5, '-5s', '-5s'),
        (np.float32(61), '1m 01s', '1m 01s'),
    ],
)
def test_format_time(seconds, full, brief):
    assert util.format_time(seconds) == full
    assert util.format_time_brief(seconds) == brief


UNIT_SECONDS = {'d': 86400, 'h': 3600, 'm': 60, 's': 1}


@given(st.floats(0, 1e9))
def test_format_time_can_be_read_back(seconds):
    fields = util.format_time(seconds).split()
    value = sum(int(field[:-1]) * UNIT_SECONDS[field[-1]] for field in fields)
    assert 0 <= round(seconds) - value < UNIT_SECONDS[fields[-1][-1]]
    assert all(re.fullmatch(r'\d\d[hms]', field) for field in fields[1:])


@given(st.floats(0, 1e9))
def test_brief_time_is_the_start_of_the_full_one(seconds):
    full, brief = util.format_time(seconds), util.format_time_brief(seconds)
    assert full.split()[:2] == brief.split()


# Logger.


def test_logger_copies_both_streams_and_restores_them(tmp_path, capsys):
    before = sys.stdout, sys.stderr
    with util.Logger(str(tmp_path / 'log.txt')) as logger:
        assert sys.stdout is logger
        assert sys.stderr is logger
        print('out σ')
        print('err', file=sys.stderr)
        logger.write(b'bytes \xcf\x83 \xff\n')
        assert logger.write('') == 0
        assert (tmp_path / 'log.txt').read_text('utf-8') == 'out σ\nerr\nbytes σ \ufffd\n'  # flushed after every write
    assert (sys.stdout, sys.stderr) == before
    print('after')
    assert capsys.readouterr() == ('out σ\nerr\nbytes σ \ufffd\nafter\n', '')
    assert 'after' not in (tmp_path / 'log.txt').read_text('utf-8')


def test_logger_restores_after_an_error_and_when_closed_twice(tmp_path):
    before = sys.stdout, sys.stderr
    logger = util.Logger(str(tmp_path / 'log.txt'))
    with pytest.raises(ZeroDivisionError), logger:
        print(1 / 0)
    logger.close()
    assert (sys.stdout, sys.stderr) == before


def test_logger_file_mode(tmp_path):
    path = tmp_path / 'log.txt'
    for mode, text in [('w', 'a\n'), ('a', 'a\nb\n'), ('w', 'c\n')]:
        with util.Logger(str(path), file_mode=mode):
            print(text[-2])
        assert path.read_text() == text


def test_logger_without_a_file(capsys):
    with util.Logger():
        print('only here', file=sys.stderr)
    assert capsys.readouterr().out == 'only here\n'


def test_logger_that_cannot_open_its_file_changes_nothing(tmp_path):
    before = sys.stdout, sys.stderr
    with pytest.raises(FileNotFoundError, match='absent'):
        util.Logger(str(tmp_path / 'absent' / 'log.txt'))
    assert (sys.stdout, sys.stderr) == before


def test_nested_loggers_closed_in_either_order(tmp_path, capsys):
    before = sys.stdout, sys.stderr
    outer = util.Logger(str(tmp_path / 'outer.txt'))
    inner = util.Logger(str(tmp_path / 'inner.txt'))
    print('1')
    outer.close()
    print('2')
    inner.close()
    assert sys.stdout is outer  # what inner had found; it passes everything on
    print('3')
    sys.stdout, sys.stderr = before
    assert (tmp_path / 'outer.txt').read_text() == '1\n'
    assert (tmp_path / 'inner.txt').read_text() == '1\n2\n'
    assert capsys.readouterr().out == '1\n2\n3\n'


def test_logger_takes_click_and_progress_bars(tmp_path, capsys):
    with util.Logger(str(tmp_path / 'log.txt'), should_flush=False):
        click.echo('σ by click')
        click.echo('err by click', err=True)
        list(tqdm(range(3), desc='bar'))
        assert not sys.stdout.isatty()
    text = (tmp_path / 'log.txt').read_text('utf-8')
    assert text.startswith('σ by click\nerr by click\n')
    assert '3/3' in text


# The cache folder.


@pytest.fixture(autouse=True)
def _own_cache_and_no_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr('pooch.core.time.sleep', lambda seconds: None)


def test_cache_root_in_order_of_preference(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', '/h')
    monkeypatch.setenv('USERPROFILE', '/u')
    monkeypatch.setattr(downloads.tempfile, 'tempdir', '/t')
    util.set_cache_dir('/mine')
    try:
        assert dnnlib.make_cache_dir_path() == '/mine'
    finally:
        util.set_cache_dir(None)
    assert dnnlib.make_cache_dir_path('a', 'b') == str(tmp_path / 'cache' / 'a' / 'b')
    for name, root in [('DNNLIB_CACHE_DIR', '/h'), ('HOME', '/u'), ('USERPROFILE', '/t')]:
        monkeypatch.delenv(name)
        assert dnnlib.make_cache_dir_path('a') == f'{root}/.cache/dnnlib/a'
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize(
    ('path', 'digest'),
    [
        ('pretrained/edm-cifar10-32x32-cond-vp.pkl', '8a0cade18e36ff627fc6c7a9dce1bd11'),
        ('pretrained/edm-cifar10-32x32-uncond-vp.pkl', 'c320a0e2338e26e7ce763402b5b56d98'),
        ('pretrained/edm-ffhq-64x64-uncond-vp.pkl', '35d31d0db80c6846cfe376859f74d64c'),
        ('pretrained/edm-afhqv2-64x64-uncond-vp.pkl', 'c3238fd63e57b9ea1562999e0c55f411'),
        ('pretrained/edm-imagenet-64x64-cond-adm.pkl', '8b9a74a815e2cf3084dfec9f4876c76d'),
        ('fid-refs/cifar10-32x32.npz', 'fb5723973c843f2c5ec8c9c512572ae2'),
    ],
)
def test_a_cache_filled_beforehand_serves_published_files(tmp_path, path, digest):
    cached = tmp_path / 'cache' / 'downloads' / f'{digest}_any name'
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b'stored')
    assert util.open_url(PUBLISHED + path, return_filename=True) == str(cached)
    with util.open_url(PUBLISHED + path) as file:
        assert file.read() == b'stored'


@given(st.text(), st.text())
def test_cache_names_are_safe(url, name):
    cache_name = downloads._cache_file_name(url, name)
    assert re.fullmatch(r'[0-9a-f]{32}_[0-9a-zA-Z._-]{0,128}', cache_name)
    assert len(cache_name) == 33 + min(len(name), 128)
    assert cache_name[:33] == downloads._cache_file_name(url, '')


# Local files.


def test_open_local_files(tmp_path):
    path = tmp_path / 'a file #1%.bin'
    path.write_bytes(b'local')
    for url in [str(path), path.as_uri(), path.as_uri().replace('file://', 'file://localhost')]:
        with util.open_url(url) as file:
            assert file.read() == b'local'
        assert util.open_url(url, return_filename=True) == str(path)
    with util.open_url(str(path), cache=False) as file:
        assert file.read() == b'local'
    assert not (tmp_path / 'cache').exists()


def test_drive_letter_in_file_url():
    assert downloads._local_path('file:///C:/data/net.pkl') == 'C:/data/net.pkl'
    assert downloads._local_path('C:\\data\\net.pkl') == 'C:\\data\\net.pkl'


@pytest.mark.parametrize('return_filename', [False, True])
@pytest.mark.parametrize('url', ['absent/net.pkl', 'file:///absent/net.pkl', 'http:/absent/net.pkl', ''])
def test_missing_local_file(url, return_filename):
    with pytest.raises(FileNotFoundError, match='net.pkl' if url else "''"):
        util.open_url(url, return_filename=return_filename)


@pytest.mark.parametrize(
    'url',
    ['ftp://host/net.pkl', 's3://bucket/net.pkl', 'http://', 'http:///net.pkl', 'http://[::1/x', 'file://net.pkl'],
)
def test_malformed_and_unsupported_urls(url):
    with pytest.raises(ValueError, match=re.escape(f'cannot open {url!r}: ')):
        util.open_url(url)


@pytest.mark.parametrize('kwargs', [{'num_attempts': 0}, {'return_filename': True, 'cache': False}])
def test_impossible_arguments(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        util.open_url('http://host/x', **kwargs)


@pytest.mark.parametrize(
    ('obj', 'plain', 'with_files'),
    [
        ('http://host/x', True, True),
        ('HTTPS://localhost:8000', True, True),
        ('file:///x', False, True),
        ('file:x', False, False),
        ('ftp://host/x', False, False),
        ('http://', False, False),
        ('http://[::1', False, False),
        ('/tmp/x', False, False),
        ('', False, False),
        (None, False, False),
        (Path('x'), False, False),
    ],
)
def test_is_url(obj, plain, with_files):
    assert util.is_url(obj) is plain
    assert util.is_url(obj, allow_file_urls=True) is with_files


# Downloads.


@pytest.fixture
def server():
    with web_server.running() as server:
        yield server


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / 'mine' / '[1]*'  # not to be taken for a pattern


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_download_once_and_keep(server, cache_dir):
    url = server.url('/dir/net.pkl', sends())
    path = util.open_url(url, cache_dir=str(cache_dir), return_filename=True)
    assert Path(path).read_bytes() == BODY
    assert names_in(cache_dir) == [downloads._cache_file_name(url, url)] == [Path(path).name]
    with util.open_url(url, cache_dir=str(cache_dir)) as file:
        assert file.read() == BODY
    assert server.hits['/dir/net.pkl'] == 1


def test_default_cache_is_below_the_cache_root(server, tmp_path):
    with util.open_url(server.url('/net.pkl', sends())) as file:
        assert Path(file.name).parent == tmp_path / 'cache' / 'downloads'
        assert file.read() == BODY


def test_download_without_the_cache(server, tmp_path):
    url = server.url('/net.pkl', sends())
    for _ in range(2):
        assert util.open_url(url, cache=False).read() == BODY
    assert server.hits['/net.pkl'] == 2
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('length', ['none', None])
def test_body_with_and_without_announced_length(server, length):
    assert util.open_url(server.url('/x', sends(length=length)), cache=False).read() == BODY


@pytest.mark.parametrize(
    ('header', 'name'),
    [
        ('attachment; filename="my net.pkl"', 'my_net.pkl'),
        ("attachment; filename*=UTF-8''n%C3%A9t.pkl", 'n_t.pkl'),
        ('attachment; filename="../../etc/passwd"', '.._.._etc_passwd'),
        ('attachment; filename=' + 200 * 'x', 128 * 'x'),
        ('attachment; filename=""', None),
        ('attachment', None),
    ],
)
def test_name_that_the_server_sends(server, cache_dir, header, name):
    url = server.url('/get?id=1', sends(Content_Disposition=header))
    path = util.open_url(url, cache_dir=str(cache_dir), return_filename=True)
    expected = re.sub('[^0-9a-zA-Z-._]', '_', url) if name is None else name
    assert Path(path).name == f'{downloads._url_digest(url)}_{expected}'
    assert names_in(cache_dir) == [Path(path).name]


def test_ambiguous_cache_is_not_used(server, cache_dir):
    url = server.url('/net.pkl', sends())
    cache_dir.mkdir(parents=True)
    for name in 'ab':
        (cache_dir / f'{downloads._url_digest(url)}_{name}').write_bytes(b'old')
    with util.open_url(url, cache_dir=str(cache_dir)) as file:
        assert file.read() == BODY
    assert server.hits['/net.pkl'] == 1


def test_leftover_of_a_killed_download_is_not_used(server, cache_dir):
    url = server.url('/net.pkl', sends())
    cache_dir.mkdir(parents=True)
    (cache_dir / f'tmp_0_{downloads._cache_file_name(url, url)}').write_bytes(b'half')
    with util.open_url(url, cache_dir=str(cache_dir)) as file:
        assert file.read() == BODY


def test_downloads_side_by_side_leave_one_whole_file(server, cache_dir):
    url = server.url('/net.pkl', sends())
    with ThreadPoolExecutor(4) as pool:
        paths = {*pool.map(lambda _: util.open_url(url, str(cache_dir), verbose=False, return_filename=True), range(4))}
    assert names_in(cache_dir) == [Path(path).name for path in paths]
    assert server.hits['/net.pkl'] == 1
    assert Path(paths.pop()).read_bytes() == BODY


@pytest.mark.parametrize(
    'failure',
    [hangs_up, sends(b'', 500), sends(b'busy', 503), sends(b'', 429), sends(BODY[:-1], length=len(BODY))],
    ids=['hangs up', '500', '503', '429', 'truncated'],
)
def test_transient_failures_are_tried_again(server, cache_dir, failure, capsys):
    url = server.url('/net.pkl', failure, failure, sends())
    path = util.open_url(url, cache_dir=str(cache_dir), return_filename=True)
    assert Path(path).read_bytes() == BODY
    assert names_in(cache_dir) == [Path(path).name]
    assert re.findall(r'attempt (\d) of 10 follows', capsys.readouterr().err) == ['2', '3']


def test_silent_server_is_tried_again(server, monkeypatch):
    monkeypatch.setattr(fetch, '_TIMEOUT', 0.2)
    assert util.open_url(server.url('/x', stalls, sends()), cache=False).read() == BODY


@pytest.mark.parametrize(
    ('failure', 'attempts', 'reason'),
    [
        (sends(b'', 404), 1, 'HTTP status 404 Not Found'),
        (sends(b'', 403), 1, 'HTTP status 403 Forbidden'),
        (sends(b'', 302, Location='/x'), 1, 'HTTP status 302 Found'),
        (sends(b'', 500), 3, 'HTTP status 500 Internal Server Error'),
        (sends(BODY[:-1], length=len(BODY)), 3, '1 more expected'),
        (hangs_up, 3, 'Connection aborted'),
        (sends(b''), 1, 'empty body'),
        (
            sends(b'<!DOCTYPE html><html><head><title>Google Drive -\n Quota exceeded</title></head></html>'),
            1,
            "web page 'Google Drive - Quota exceeded' instead of a file",
        ),
        (
            sends(b'\xef\xbb\xbf\n<HTML lang="en">' + 20000 * b'x'),
            1,
            'the server sent a web page instead of a file; open the URL',
        ),
    ],
    ids=['404', '403', 'redirect loop', '500', 'truncated', 'hangs up', 'empty', 'quota page', 'other page'],
)
def test_failed_download_names_the_url_and_leaves_nothing(server, cache_dir, failure, attempts, reason):
    url = server.url('/x', failure)
    with pytest.raises(OSError, match=reason) as info:
        util.open_url(url, cache_dir=str(cache_dir), num_attempts=3)
    assert str(info.value).startswith(f'cannot download {url}')
    assert '\n' not in str(info.value)
    assert names_in(cache_dir) == []
    assert reason == 'HTTP status 302 Found' or server.hits['/x'] == attempts


def test_no_server_at_all(cache_dir):
    with Server() as closed:
        url = closed.url('/net.pkl')
    with pytest.raises(OSError, match='cannot download') as info:
        util.open_url(url, cache_dir=str(cache_dir), num_attempts=2)
    assert url in str(info.value)
    assert names_in(cache_dir) == []


def test_unknown_host_is_asked_for_once(cache_dir, capsys):
    url = 'http://no-such-host.invalid/net.pkl'
    with pytest.raises(OSError, match=r'^cannot download http://no-such-host.invalid/net.pkl: Failed to resolve'):
        util.open_url(url, cache_dir=str(cache_dir))
    assert capsys.readouterr().err == ''
    assert names_in(cache_dir) == []


def test_interrupted_download_leaves_nothing(server, cache_dir, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, '_sent_file_name', interrupt)
    with pytest.raises(KeyboardInterrupt):
        util.open_url(server.url('/net.pkl', sends()), cache_dir=str(cache_dir))
    assert names_in(cache_dir) == []


@pytest.mark.parametrize('verbose', [True, False])
def test_progress_goes_to_stderr(server, capsys, verbose):
    util.open_url(server.url('/dir/net.pkl', hangs_up, sends()), cache=False, verbose=verbose)
    out, err = capsys.readouterr()
    assert out == ''
    assert ('net.pkl: 100%' in err) is verbose
    assert bool(err) is verbose


def test_one_process_downloads_and_the_others_wait(server, cache_dir):
    def slow(handler):
        time.sleep(0.3)
        sends()(handler)

    url = server.url('/net.pkl', slow)
    root = str(Path(dnnlib.__file__).parents[1])
    code = (
        f'import dnnlib; print(dnnlib.util.open_url({url!r}, {str(cache_dir)!r}, verbose=False, return_filename=True))'
    )
    with ThreadPoolExecutor(3) as pool:
        paths = {*pool.map(lambda _: run_python('-c', code, cwd=root), range(3))}
    assert server.hits['/net.pkl'] == 1
    assert names_in(cache_dir) == [Path(path).name for path in paths]


def test_cached_files_have_the_usual_permissions(server, cache_dir):
    path = util.open_url(server.url('/net.pkl', sends()), str(cache_dir), return_filename=True)
    (cache_dir / 'other').touch()
    assert Path(path).stat().st_mode == (cache_dir / 'other').stat().st_mode


# Hashes, names and the hub.

SHA256 = hashlib.sha256(BODY).hexdigest()
WRONG = 64 * '0'


def test_pinned_hash_that_fits(server, cache_dir):
    url = server.url('/net.pkl', sends())
    for _ in range(2):
        with util.open_url(f'{url}#sha256={SHA256}', str(cache_dir)) as file:
            assert file.read() == BODY
    assert server.hits['/net.pkl'] == 1
    assert names_in(cache_dir) == [downloads._cache_file_name(url, url)]


def test_download_with_another_hash_leaves_nothing(server, cache_dir):
    url = server.url('/net.pkl', sends())
    with pytest.raises(OSError, match=f'SHA-256 is {SHA256}, not {WRONG}') as info:
        util.open_url(f'{url}#sha256={WRONG}', str(cache_dir))
    assert url in str(info.value)
    assert names_in(cache_dir) == []
    assert server.hits['/net.pkl'] == 1


def test_files_that_are_there_are_checked_too(server, cache_dir, tmp_path):
    url = server.url('/net.pkl', sends())
    path = util.open_url(url, str(cache_dir), return_filename=True)
    for name in (url, path):
        with pytest.raises(OSError, match=f'SHA-256 is {SHA256}, not {WRONG}'):
            util.open_url(f'{name}#sha256={WRONG}', str(cache_dir))
    assert Path(path).read_bytes() == BODY


def test_published_files_open_by_name(server, cache_dir, monkeypatch):
    entry = published.PublishedFile(server.url('/net.pkl', sends()), SHA256)
    monkeypatch.setitem(published.PUBLISHED, 'a-network', entry)
    with util.open_url('a-network', str(cache_dir)) as file:
        assert file.read() == BODY
    assert util.pinned_hash('a-network') == SHA256
    with pytest.raises(OSError, match=f'not {WRONG}'):
        util.open_url(f'a-network#sha256={WRONG}', str(cache_dir))
    assert util.is_remote(f'a-network#sha256={WRONG}')
    monkeypatch.setitem(published.PUBLISHED, 'a-network', published.PublishedFile(entry.url, WRONG))
    with pytest.raises(OSError, match=f'not {WRONG}'):
        util.open_url('a-network', str(cache_dir))


def test_a_local_file_comes_before_a_published_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('edm-ffhq-64x64-uncond-vp').write_bytes(b'mine')
    with util.open_url('edm-ffhq-64x64-uncond-vp') as file:
        assert file.read() == b'mine'
    assert not util.is_remote('edm-ffhq-64x64-uncond-vp')


def test_names_of_published_files():
    assert (
        published.PUBLISHED['edm-cifar10-32x32-cond-vp'].url == PUBLISHED + 'pretrained/edm-cifar10-32x32-cond-vp.pkl'
    )
    assert published.PUBLISHED['fid-ref-cifar10-32x32'].url == PUBLISHED + 'fid-refs/cifar10-32x32.npz'
    assert downloads._url_digest(published.PUBLISHED['inception-2015-12-05'].url) == '18d9c1159d16cd4cc6adf7db0f2dd2a9'
    assert len(published.PUBLISHED) == 18 + 36 + 35 + 16  # EDM's; EDM2's names, their networks, and guides
    assert len({file.url for file in published.PUBLISHED.values()}) == 18 + 35 + 16
    assert all(re.fullmatch('[0-9a-f]{64}', file.sha256 or WRONG) for file in published.PUBLISHED.values())


def test_misspelt_names_are_helped():
    with pytest.raises(FileNotFoundError, match='published are edm-ffhq-64x64-uncond-v'):
        util.open_url('edm-ffhq-64x64-uncond')


class Hub:
    """In the place of `huggingface_hub`."""

    class errors:
        class HfHubHTTPError(OSError):
            pass

    def __init__(self, path):
        self.path, self.calls = path, []

    def hf_hub_download(self, repo, name, revision):
        self.calls.append((repo, name, revision))
        if repo == 'user/absent':
            raise self.errors.HfHubHTTPError('404 Client Error.\n\nRepository Not Found')
        return str(self.path)


def test_hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / 'net.pkl')
    hub.path.write_bytes(BODY)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    for url in ['hf://user/repo/net.pkl', f'hf://user/repo@v1.0/a/net.pkl#sha256={SHA256}']:
        with util.open_url(url) as file:
            assert file.read() == BODY
    assert hub.calls == [('user/repo', 'net.pkl', None), ('user/repo', 'a/net.pkl', 'v1.0')]
    with pytest.raises(OSError, match=f'not {WRONG}'):
        util.open_url(f'hf://user/repo/net.pkl#sha256={WRONG}')
    with pytest.raises(OSError, match=r'cannot download hf://user/absent/x: 404 Client Error\. Repository Not Found'):
        util.open_url('hf://user/absent/x')
    with pytest.raises(ValueError, match='hf://user/repo'):
        util.open_url('hf://user')


def test_hub_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(OSError, match=r'it needs huggingface_hub: pip install -e "\.\[hub\]"'):
        util.open_url('hf://user/repo/net.pkl')


def test_the_hub_has_what_is_asked_of_it():
    hub = pytest.importorskip('huggingface_hub')
    assert {'repo_id', 'filename', 'revision'} <= set(inspect.signature(hub.hf_hub_download).parameters)
    assert issubclass(hub.errors.HfHubHTTPError, Exception)


def test_an_error_without_a_message_is_named():
    assert [dnnlib.util.one_line(message) for message in (MemoryError(), OSError('x\n y'), '')] == [
        'MemoryError',
        'x y',
        '',
    ]


# ----------------------------------------------------------------------------
# Streams of any encoding.

SCRIPTS = ['generate.py', 'train.py', 'fid.py', 'dataset_tool.py', 'example.py', 'compare.py']


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_prints_to_streams_of_any_encoding(script, encoding):
    environment = {**os.environ, 'PYTHONIOENCODING': encoding, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, str(ROOT / script), '--help'], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b'')
    assert b'--' in done.stdout


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8'])
def test_any_text_is_printed(monkeypatch, encoding):
    stdout, stderr = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(stdout, encoding))
    monkeypatch.setattr(sys, 'stderr', io.TextIOWrapper(stderr, encoding))
    util.print_any_text()
    for stream in (sys.stdout, sys.stderr):
        print('σ → 日', file=stream, flush=True)
    expected = 'σ → 日' if encoding == 'utf-8' else r'\u03c3 \u2192 \u65e5'
    assert stdout.getvalue().decode(encoding).rstrip() == expected
    assert stderr.getvalue() == stdout.getvalue()
