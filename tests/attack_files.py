"""Data files that try to hurt whoever reads them: archives, arrays, JSON, databases. `attacks.py` has the pickles.

`vectors()` gives {kind: {name: {path: bytes}}}, and `READERS` what reads each kind, from the first path.
"""

import gzip
import io
import json
import pathlib
import struct
import tarfile
import tempfile
import zipfile

import click
import image_files
import numpy as np

import fid
from comparison.record import ResultsFile
from dnnlib import settings
from images import sources, tree
from images.image_files import ImageFiles
from metrics import statistics
from sampling import networks, run_record
from training import reporter

try:
    import lmdb
except ImportError:
    lmdb = None

REFUSALS = (OSError, ValueError, click.ClickException)
DEEP = b'[' * 100_000
HUGE = b'1' + b'0' * 4000
BRACKETS = b'[' + b'[],' * 5_000_000 + b'0]'


def zipped(method=zipfile.ZIP_STORED, **entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w', method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def npy(header, content=b''):
    return b'\x93NUMPY\1\0' + struct.pack('<H', len(header)) + header.encode() + content


def array(value):
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=True)
    return stream.getvalue()


F8 = "{'descr': '<f8', 'fortran_order': False, 'shape': %s, }"
HEADERS = {
    'brackets open': npy("{'descr': '<f8', 'shape': ((((((("),
    'deep header': npy('(' * 9000),
    'header of signs': npy('-' * 9000 + '1'),
    'header that calls': npy(
        "{'descr': __import__('os').system('x'), 'fortran_order': False, 'shape': (1,), }", bytes(8)
    ),
    'huge size': npy(F8 % '(99999999999999999999,)'),
    'size of many digits': npy(F8 % f'({"9" * 900},)'),
    'sizes that make zero': npy(F8 % f'(0, {"9" * 30})'),
    '33 dimensions': npy(F8 % f'({"1, " * 33})', bytes(8)),
    'too few numbers': npy(F8 % '(9,)', bytes(8)),
    'objects': array(np.array([len], dtype=object)),
    'fields': array(np.zeros(2, dtype=[('a', 'f8')])),
    'text beyond Unicode': npy("{'descr': '<U1', 'fortran_order': False, 'shape': (), }", b'\xff' * 4),
    'complex numbers': array(np.zeros(2, complex)),
    'version 9': b'\x93NUMPY\x09\0' + bytes(100),
    'nothing': b'',
}
NOTES = {
    'a list': '[]',
    'a number': '1',
    'deep': DEEP.decode(),
    'a huge number': f'{{"num_images": {HUGE.decode()}}}',
    'infinity': '{"num_images": Infinity}',
    'a number for a name': '{"detector": 1}',
    'a list for a name': '{"detector": ["pixels"]}',
    'a long name': json.dumps({'detector': 'x' * 100_000}),
    'a truth for a number': '{"num_images": true}',
}  # fmt: skip


def references():
    sigma, mu = array(np.eye(3)), array(np.zeros(3))

    def reference(method=zipfile.ZIP_STORED, **entries):
        return zipped(method, **{f'{name}.npy': each for name, each in ({'mu': mu, 'sigma': sigma} | entries).items()})

    sound = reference()
    bomb = npy(F8 % f'({1 << 25},)', bytes(1 << 28))
    found = {
        **{f'{name} as mu': reference(mu=each) for name, each in HEADERS.items()},
        **{f'{name} as note': reference(note=array(np.array(each))) for name, each in NOTES.items()},
        'bomb': reference(zipfile.ZIP_DEFLATED, mu=bomb),
        'packed by LZMA': reference(zipfile.ZIP_LZMA),
        'encrypted': sound.replace(b'PK\1\2\x14\3\x14\0\0\0', b'PK\1\2\x14\3\x14\0\1\0'),
        'another version of zip': sound.replace(b'PK\1\2\x14\3\x14', b'PK\1\2\x14\3\xff'),
        'another method': sound.replace(b'\x14\0\0\0\0\0', b'\x14\0\0\0\x63\0'),
        'other names inside': sound.replace(b'mu.npy', b'mx.npy', 1),
        'wrong checksum': sound.replace(mu, mu[:-1] + b'x'),
        'damaged deflate': reference(zipfile.ZIP_DEFLATED)[:40] + b'\xff' * 40 + reference(zipfile.ZIP_DEFLATED)[80:],
        'half': sound[: len(sound) // 2],
        'colours of a terminal': reference(mu=b'\x1b[2J'),
    }
    return {name: {'ref.npz': content} for name, content in found.items()}


def features():
    note = array(np.array('{}'))
    values = {
        'none': {},
        'no note': {'features': array(np.zeros((3, 2)))},
        'bytes': {'note': note, 'features': b'PK'},
        'one dimension': {'note': note, 'features': array(np.zeros(3))},
        'whole numbers': {'note': note, 'features': array(np.zeros((3, 2), int))},
        'not finite': {'note': note, 'features': array(np.full((3, 2), np.nan))},
        'a list for a note': {'note': array(np.array('[]')), 'features': array(np.zeros((3, 2)))},
        **{f'{name} as features': {'note': note, 'features': each} for name, each in HEADERS.items()},
    }
    return {
        name: {'f.npz': zipped(**{f'{key}.npy': content for key, content in each.items()})}
        for name, each in values.items()
    }


def labels():
    """Datasets with a bad dataset.json."""
    picture = image_files.png(np.zeros((8, 8), np.uint8))
    contents = {
        'deep': b'{"labels":' + DEEP,
        'deep and closed': b'{"labels":' + DEEP + b']' * 100_000 + b'}',
        'huge number': b'{"labels":[["0.png",%s]]}' % HUGE,
        'number of 400 digits': b'{"labels":[["0.png",1%s]]}' % (b'0' * 400),
        'number beyond float32': b'{"labels":[["0.png",[1e308,1.0]]]}',
        'number that is none': b'{"labels":[["0.png",NaN]]}',
        'negative class': b'{"labels":[["0.png",-1]]}',
        'brackets': b'{"labels":' + BRACKETS + b'}',
        'dicts': b'{"labels":[' + b'{"a":1},' * 1_000_000 + b'0]}',
        'label of a long list': b'{"labels":[["0.png",1],["0.png",[%s1]]]}' % (b'1,' * 1_000_000),
        'long name': b'{"labels":[["%s",1]]}' % (b'\x7f' * 5_000_000),
        'name that a terminal obeys': b'{"labels":[["\\u001b]0;x\\u0007\\nError: all is well",1]]}',
        'pairs of text': b'{"labels":["ab","cd"]}',
        'a dict of labels': b'{"labels":{"0.png":1}}',
        'numbers': b'{"labels":[1,2]}',
        'text': b'{"labels":"0.png"}',
        'a list': b'[]',
        'no UTF-8': b'{"labels":"\xff"}',
        'cut off': b'{"labels":[["0.png",1]',
        'empty': b'',
    }
    found = {name: zipped(**{'0.png': picture, 'dataset.json': content}) for name, content in contents.items()}
    spaces = b' ' * (1 << 28) + b'{}'
    many = b'{"labels":[' + b'["0.png",0],' * 2_000_000 + b'0]}'
    for name, content in {'bomb': spaces, 'one label often': many}.items():
        found[name] = zipped(zipfile.ZIP_DEFLATED, **{'0.png': picture, 'dataset.json': content})
    return {name: {'data.zip': content} for name, content in found.items()}


def archives():
    good = zipped(**{'0.png': b'x'})
    found = {
        'name that is no UTF-8': zipped(**{'é.png': b'x'}).replace('é'.encode(), b'\xff\xff'),
        'name that a terminal obeys': zipped(**{'a\x1b]0;x\x07.png': b'broken'}),
        'name of two lines': zipped(**{'a\nError: all is well.png': b'broken'}),
        'another version': good.replace(b'PK\1\2\x14\3\x14', b'PK\1\2\x14\3\xff'),
        'half': good[: len(good) // 2],
        'empty': b'',
        'directory elsewhere': good.replace(b'PK\5\6', b'PK\5\6\xff'),
    }
    return {name: {'data.zip': content} for name, content in found.items()}


def records():
    contents = {
        'deep': DEEP,
        'deep dicts': b'{"a":' * 100_000,
        'huge number': b'{"settings":{"steps":%s}}' % HUGE,
        'brackets': b'{"settings":' + BRACKETS + b'}',
        'no UTF-8': b'{"\xff":1}',
        'a list': b'[]',
        'nothing': b'',
        'more than a record has': b'{"settings":"%s"}' % (b'x' * (17 << 20)),
        'settings of a list': b'{"settings":[[1]]}',
        'settings of a number': b'{"settings":1}',
        'lines and colours': b'{"settings":"\\u001b[2J"}',
    }
    return {name: {'generate.json': content} for name, content in contents.items()}


def results():
    line = b'[{"a":1},{"b":2}]\n'
    contents = {
        'deep': DEEP,
        'huge number': b'[{"a":%s},{}]' % HUGE,
        'brackets': BRACKETS,
        'numbers': b'1',
        'text': b'"ab"',
        'one': b'[{}]',
        'no UTF-8': b'[{"\xff":1},{}]',
    }
    return {name: {'results.jsonl': line + content + b'\n' + line} for name, content in contents.items()}


def losses():
    return {name: {'stats.jsonl': files['results.jsonl']} for name, files in results().items()}


def vectors_of_labels():
    return {name: {'labels.npy': content} for name, content in HEADERS.items()}


def idx():
    image, label = 'train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'

    def pair(count, pixels, labels, sizes=(28, 28), num_labels=None):
        images = gzip.compress(struct.pack('>4B3I', 0, 0, 8, 3, count, *sizes) + pixels, 1)
        count = count if num_labels is None else num_labels
        return {image: images, label: gzip.compress(struct.pack('>4BI', 0, 0, 8, 1, count) + labels, 1)}

    good = pair(1, bytes(784), b'\1')
    return {
        'labels without images': pair(1 << 24, bytes(784), bytes(1 << 24)),
        'labels without end': pair(1, bytes(784), bytes(1 << 28)),
        'images without end': pair(1, bytes(1 << 28), b'\1'),
        'count without images': pair(2**32 - 1, b'', b''),
        'sizes beyond reason': pair(1, bytes(784), b'\1', sizes=(2**32 - 1, 2**32 - 1)),
        'cut off': good | {image: good[image][:-9]},
        'no gzip': good | {image: b'x' * 100},
        'labels cut off': good | {label: good[label][:-9]},
        'labels that are no gzip': good | {label: b'x' * 100},
        'no labels': {image: good[image]},
        'empty': {image: b'', label: b''},
        'wrong checksum': good | {image: good[image][:-8] + bytes(8)},
        'another type': good | {label: gzip.compress(struct.pack('>4BI', 0, 0, 13, 1, 1) + bytes(4))},
    }


def cifar():
    def tar(*entries):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode='w', format=tarfile.GNU_FORMAT) as archive:
            for entry, content in entries:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return gzip.compress(stream.getvalue(), 1)

    def entry(name, kind=tarfile.REGTYPE, link=''):
        info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
        info.type, info.linkname = kind, link
        return info

    def header(size, kind=tarfile.REGTYPE):
        info = entry('data_batch_1', kind)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)

    found = {
        'extended header of a terabyte': gzip.compress(header(1 << 40, b'x') + bytes(1 << 20), 1),
        'extended header of 400 MB': gzip.compress(header(400 << 20, b'x') + bytes(400 << 20), 1),
        'batch of 128 MB': gzip.compress(header(1 << 27) + bytes(1 << 27), 1),
        'negative size': gzip.compress(header(-512) + bytes(1024)),
        'size beyond reason': gzip.compress(header(1 << 60) + bytes(1024)),
        'link': tar((entry('data_batch_1', tarfile.SYMTYPE, '/etc/passwd'), b'')),
        'device': tar((entry('data_batch_1', tarfile.CHRTYPE), b'')),
        'sparse file': tar((entry('data_batch_1', tarfile.GNUTYPE_SPARSE), b'x')),
        'path that leads out': tar((tarfile.TarInfo('../data_batch_1'), b'x')),
        'pickle that calls': tar(*[(entry(f'data_batch_{i}'), b'cos\nsystem\n(S"x"\ntR.') for i in range(1, 6)]),
        'wrong checksum': gzip.compress(header(4).replace(b'batch', b'botch') + bytes(1024)),
        'cut off': gzip.compress(header(1 << 20) + bytes(1024)),
        'no tar': gzip.compress(b'x' * 5000),
        'no gzip': b'x' * 5000,
        'empty': b'',
        'nothing but zeros': gzip.compress(bytes(1 << 26), 1),
    }
    return {name: {'cifar-10-python.tar.gz': content} for name, content in found.items()}


def databases():
    if lmdb is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        with lmdb.open(folder, map_size=1 << 24) as database, database.begin(write=True) as transaction:
            for i in range(40):
                transaction.put(b'%06d' % i, bytes([i]) * (9000 if i % 2 else 3000))
        data = pathlib.Path(folder, 'data.mdb').read_bytes()
    size = struct.pack('<I', 9000)
    at = data.index(size, 8192)

    def changed(position, *values):
        return data[:position] + bytes(values) + data[position + len(values) :]

    found = {
        'half': data[: len(data) // 2],
        'first pages': data[:9000],
        'cut off by a byte': data[:-1],
        'zeros': bytes(len(data)),
        'value beyond the file': changed(at + 3, 0x40),
        'value of all bytes': changed(at, 0xFF, 0xFF, 0xFF, 0xFF),
        'page of another type': changed(8192 + 10, 0xFF),
        'offsets outside their page': changed(8192 + 16, *[0xFF] * 80),
        'empty': b'',
    }
    return {name: {'a_lmdb/data.mdb': content} for name, content in found.items()}


# ----------------------------------------------------------------------------


def read_labels(path):
    if tree.FileTree(path).labels() is None:
        raise ValueError('no labels')


def read_archive(path):
    _, image, problem = ImageFiles([path])[0]
    if image is None:
        raise ValueError(problem)


def read_record(path):
    for read in (settings.read, lambda path: run_record.read(str(pathlib.Path(path).parent))):
        read(path)


def read_losses(path):
    if not reporter.read_losses(path)[0]:
        raise ValueError('no losses')


def read_source(path):
    _, samples, _ = sources.open_source(str(path), None)
    for sample in samples:
        sample.read()


def read_lmdb(path):
    read_source(pathlib.Path(path).parent)


READERS = {
    'references': (references, statistics.read_reference),
    'kept features': (features, fid.read_features),
    'labels.npy': (vectors_of_labels, lambda path: networks.read_vectors(path, 3)),
    'dataset.json': (labels, read_labels),
    'zip': (archives, read_archive),
    'generate.json': (records, read_record),
    'results.jsonl': (results, ResultsFile),
    'stats.jsonl': (losses, read_losses),
    'idx': (idx, read_source),
    'CIFAR': (cifar, read_source),
    'lmdb': (databases, read_lmdb),
}


def vectors():
    return {kind: make() for kind, (make, _) in READERS.items()}


def most_memory(files):
    """Of a reader, in bytes: JSON takes 20 times its size, and 16 MiB of it may come out of a small archive."""
    return 20 * sum(map(len, files.values())) + (400 << 20)


def write(folder, files):
    """The path of the first file."""
    paths = [pathlib.Path(folder, name) for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(paths[0])
