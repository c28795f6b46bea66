"""Archives, arrays, JSON and databases that try to hurt are refused in one line; a lack of memory is no damage."""

import contextlib
import io
import json
import os
import zipfile

import attack_files
import attacks
import click.testing
import image_files
import numpy as np
import pytest

import dataset_tool
import fid
import train
from dnnlib import npz, plain_json
from images import convert, lmdb_records, sources, tree
from images.image_files import ImageFiles
from metrics import measure
from torch_utils import misc
from training import run_state

VECTORS = attack_files.vectors()
NAMES = [(kind, name) for kind, vectors in VECTORS.items() for name in vectors]


@pytest.mark.parametrize(('kind', 'name'), NAMES, ids=[f'{kind}: {name}' for kind, name in NAMES])
def test_files_that_attack(tmp_path, kind, name):
    files = VECTORS[kind][name]
    path = attack_files.write(tmp_path, files)
    read = attack_files.READERS[kind][1]
    with pytest.raises(attack_files.REFUSALS) as info:
        read(path)
    assert str(info.value).isprintable()
    assert len(str(info.value)) < 1000 + len(path)
    assert str(tmp_path) in str(info.value) or kind in ('stats.jsonl', 'dataset.json')
    result, seconds, memory = attacks.outcome(path, read, attack_files.REFUSALS, contextlib.nullcontext)
    assert (result, seconds < 3) == ('refused', True)
    assert memory <= attack_files.most_memory(files)


# ----------------------------------------------------------------------------
# What is sound is read.


@pytest.mark.parametrize('version', [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(
    'value',
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype='>f4').reshape(2, 3)),
        np.float16(2),
        np.zeros((0, 3)),
        np.array('σ 日'),
        np.array([True, False]),
        np.arange(3, dtype=np.uint8),
        np.zeros((1,) * 32),
    ],
    ids=str,
)
def test_arrays_as_numpy_writes_them(value, version):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(value), version)
    found = npz.array(stream.getvalue())
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_archives_as_numpy_writes_them(save):
    stream = io.BytesIO()
    save(stream, a=np.zeros(1000), b=np.array('x'), c=np.array([len]))
    found = npz.read(stream.getvalue(), ['b', 'a', 'absent'])
    assert list(found) == ['b', 'a']
    assert (str(found['b']), found['a'].sum()) == ('x', 0)


def test_arrays_of_python_2():
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (2L, 1L), }          \n"
    assert npz.array(attack_files.npy(header, bytes(16))).shape == (2, 1)


@pytest.mark.parametrize(
    'value',
    [{'labels': [[f'{i}.png', i] for i in range(5000)]}, {'a': [1.5, -2, None, True, 'é']}, 2**64 - 1, [[0] * 9] * 9],
)
def test_json(value):
    assert plain_json.parse(json.dumps(value)) == value
    assert (
        plain_json.parse(b'\xef\xbb\xbf' + json.dumps(value, separators=(',', ':'), ensure_ascii=False).encode())
        == value
    )


@pytest.mark.parametrize(
    'unit', [b'0.5,', b'"ab",', b'["0.png",0],', b'{"abcdefghijklmnopqrstuvwxyz":1},', '"é",'.encode()]
)
def test_json_takes_a_multiple_of_its_size(unit):
    text = b'[' + unit * (20_000_000 // len(unit)) + b'0]'
    result, _, memory = attacks.outcome(text, plain_json.parse)
    assert result == 'read'
    assert memory < 20 * len(text)


# ----------------------------------------------------------------------------
# What a file names is not opened.


@pytest.mark.parametrize(
    'detector', ['/dev/zero', 'http://127.0.0.1:9/x', 'antigravity:fly', 'no-such-file', '~/x', '\x1b']
)
def test_a_reference_cannot_choose_a_file_to_open(tmp_path, monkeypatch, detector):
    monkeypatch.setattr(measure, 'load_detector', lambda *_: pytest.fail('opened'))
    path = tmp_path / 'ref.npz'
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), note=np.array(json.dumps({'detector': detector})))
    with pytest.raises(ValueError, match='repeat that option here') as info:
        measure.open_statistics(str(path), None, None)
    assert str(info.value).isprintable()


# ----------------------------------------------------------------------------
# Databases.


def test_a_reader_that_a_signal_ends_is_an_error(tmp_path, monkeypatch):
    """Nothing is left to chance: the process that reads ends itself as a damaged database may end it."""
    script = tmp_path / 'reader.py'
    monkeypatch.setattr(lmdb_records, '__file__', str(script))
    for written, read in [
        ('', 'count'),
        ('', 'records'),
        ('sys.stdout.buffer.write(bytes([9] + [0] * 10));', 'records'),
    ]:
        script.write_text(f'import os, signal, sys; {written} sys.stdout.flush(); os.kill(os.getpid(), signal.SIGBUS)')
        with pytest.raises(lmdb_records.LmdbError, match='^signal 7 ended its reader$' if os.name == 'posix' else ''):
            list(lmdb_records.records(str(tmp_path))) if read == 'records' else lmdb_records.count(str(tmp_path))


def test_a_reader_is_ended_with_those_who_want_its_records(tmp_path):
    lmdb = pytest.importorskip('lmdb')
    folder = tmp_path / 'a_lmdb'
    folder.mkdir()
    with lmdb.open(str(folder), map_size=1 << 26) as database, database.begin(write=True) as transaction:
        for i in range(100):
            transaction.put(b'%03d' % i, bytes(100_000))
    found = lmdb_records.records(str(folder))
    assert next(found)[0] == b'000'
    found.close()
    count, samples, _ = sources.open_source(str(folder), 3)
    assert (count, [sample.name for sample in samples]) == (3, ['000', '001', '002'])


# ----------------------------------------------------------------------------
# A lack of memory.


def fail(*args, **kwargs):
    raise MemoryError


@pytest.fixture
def pictures(tmp_path):
    path = tmp_path / 'data.zip'
    path.write_bytes(attack_files.zipped(**{'0.png': image_files.png(np.zeros((8, 8), np.uint8))}))
    return str(path)


def test_a_lack_of_memory_is_no_damage(pictures, monkeypatch):
    monkeypatch.setattr(tree.PIL.Image, 'open', fail)
    with pytest.raises(MemoryError):
        ImageFiles([pictures])
    with pytest.raises(MemoryError):
        convert.convert(zipfile.ZipFile(pictures).read('0.png'), convert.resize, None)
    done = click.testing.CliRunner().invoke(dataset_tool.main, ['--validate', pictures, '--workers=1'])
    assert (done.exit_code, done.output.splitlines()[-1]) == (
        1,
        'Error: out of memory; with fewer --workers, less is needed',
    )
    done = click.testing.CliRunner().invoke(
        fid.main, ['calc', '--images', pictures, '--ref', pictures, '--detector=pixels']
    )
    assert (done.exit_code, done.output) == (1, 'Error: out of memory: MemoryError; lower --batch\n')


def test_a_lack_of_memory_is_no_damage_of_a_state(tmp_path, monkeypatch):
    (tmp_path / 'state.pt').write_bytes(attack_files.zipped(x=b''))
    monkeypatch.setattr(run_state.torch, 'load', fail)
    for trust in (False, True):
        with pytest.raises(MemoryError) as info:
            run_state.read_state(str(tmp_path / 'state.pt'), trust)
        assert misc.is_out_of_memory(info.value)


def test_pillow_may_fail_in_any_way(monkeypatch):
    monkeypatch.setattr(tree.PIL.Image, 'open', lambda *args, **kwargs: int('1', base='x'))
    with pytest.raises(ValueError, match=r'it is damaged \(TypeError\)'):
        tree.open_image(b'')


# ----------------------------------------------------------------------------
# Names.


@pytest.mark.parametrize('name', ['a\x1b]0;x\x07.png', 'a\nError: all is well.png'])
def test_names_in_archives_are_escaped(tmp_path, name):
    path = tmp_path / 'data.zip'
    path.write_bytes(attack_files.zipped(**{name: b'broken'}))
    runs = {
        fid: ['calc', '--images', path, '--ref', path, '--detector=pixels', '--workers=0', '--num=2'],
        dataset_tool: ['--validate', path, '--workers=1'],
        train: ['--data', path, '--outdir', tmp_path / 'runs', '--dry-run'],
    }
    for script, arguments in runs.items():
        done = click.testing.CliRunner().invoke(script.main, list(map(str, arguments)))
        assert done.exit_code == 1
        assert not {'\x1b', '\x07'} & set(done.output)
        assert not any(line.startswith('Error: all') for line in done.output.splitlines())
