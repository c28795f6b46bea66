import io
import json
import multiprocessing
import pickle
import struct
import types
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import png, write

import training.dataset
from training.dataset import Dataset, ImageFolderDataset

GOLDEN = json.loads((Path(__file__).parent / 'data' / 'edm_dataset.json').read_text())


class Numbers(Dataset):
    """Image k is constant k, of size 1×1."""

    def __init__(self, n, labels=None, **base):
        super().__init__('numbers', [n, 1, 1, 1], **base)
        self.labels = labels

    def _read_image(self, raw_idx):
        return np.full([1, 1, 1], raw_idx, dtype=np.uint8)

    def _read_labels(self):
        return self.labels


def noise(n, *shape):
    return np.random.default_rng(0).integers(0, 256, [n, *shape], dtype=np.uint8)


def dataset_json(labels):
    return json.dumps({'labels': labels}).encode()


def images_of(dataset):
    return np.stack([image for image, _ in dataset])


def labels_of(dataset):
    return np.stack([label for _, label in dataset])


@pytest.fixture(params=['photos', 'photos.zip'])
def path(request, tmp_path):
    return tmp_path / request.param


# ----------------------------------------------------------------------------------------------------------------------
# Subsets and mirrored copies


@pytest.mark.parametrize('case', GOLDEN)
def test_subset_is_the_one_edm_takes(case):
    dataset = Numbers(case['n'], max_size=case['max_size'], random_seed=case['random_seed'], xflip=case['xflip'])
    details = [dataset.get_details(idx) for idx in range(len(dataset))]
    assert [d.raw_idx for d in details] == case['raw_idx']
    assert [d.xflip for d in details] == case['mirrored']
    assert images_of(dataset).ravel().tolist() == case['raw_idx']


@given(n=st.integers(1, 200), max_size=st.integers(1, 250), seed=st.integers(0, 2**40), xflip=st.booleans())
def test_subset_is_ascending_and_mirrored_as_a_whole(n, max_size, seed, xflip):
    dataset = Numbers(n, max_size=max_size, random_seed=seed, xflip=xflip)
    raw = [dataset.get_details(idx).raw_idx for idx in range(len(dataset))]
    kept = raw[: min(n, max_size)]
    assert kept == sorted(set(kept))
    assert raw == kept * (1 + xflip)


def test_seeds_wrap_at_two_to_the_31():
    assert np.array_equal(
        images_of(Numbers(100, max_size=9, random_seed=5)), images_of(Numbers(100, max_size=9, random_seed=5 + 2**31))
    )


def test_mirrored_copies_are_flipped_left_to_right(path):
    raw = noise(3, 4, 4, 3)
    dataset = ImageFolderDataset(write(path, {f'{i}.png': png(x) for i, x in enumerate(raw)}), xflip=True)
    images = images_of(dataset)
    assert np.array_equal(images[:3], raw.transpose(0, 3, 1, 2))
    assert np.array_equal(images[3:], images[:3, :, :, ::-1])


# ----------------------------------------------------------------------------------------------------------------------
# Labels


def test_class_labels_become_one_hot():
    dataset = Numbers(3, np.array([1, 0, 3]), use_labels=True)
    assert dataset.label_shape == [4]
    assert (dataset.label_dim, dataset.has_labels, dataset.has_onehot_labels) == (4, True, True)
    assert labels_of(dataset).dtype == np.float32
    assert labels_of(dataset).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert dataset.get_details(2).raw_label == 3


def test_vector_labels_stay_as_they_are():
    vectors = np.array([[0.5, -1], [2, 3]], dtype=np.float32)
    dataset = Numbers(2, vectors, use_labels=True)
    assert (dataset.label_dim, dataset.has_labels, dataset.has_onehot_labels) == (2, True, False)
    assert np.array_equal(labels_of(dataset), vectors)


@pytest.mark.parametrize(('labels', 'use_labels'), [(None, True), (np.array([0, 1]), False)])
def test_without_labels_they_have_length_zero(labels, use_labels):
    dataset = Numbers(2, labels, use_labels=use_labels)
    assert (dataset.label_shape, dataset.has_labels, dataset.has_onehot_labels) == ([0], False, False)
    assert labels_of(dataset).shape == (2, 0)
    assert labels_of(dataset).dtype == np.float32


def test_a_subset_keeps_the_label_shape_of_the_whole():
    assert Numbers(10, np.arange(10), use_labels=True, max_size=1).label_dim == 10


def test_the_caller_may_change_what_it_gets():
    vectors = np.ones([2, 1], dtype=np.float32)
    dataset = Numbers(2, vectors, use_labels=True, cache=True)
    for value in (*dataset[1], dataset.get_details(1).raw_label):
        value[:] = 77
    assert dataset[1][0].item() == 1
    assert dataset[1][1].item() == 1


# ----------------------------------------------------------------------------------------------------------------------
# Folders and archives

file_names = st.from_regex(r'([a-c]{1,2}/){0,2}[a-zA-Z0-9_]{1,8}\.(png|PNG|bmp)', fullmatch=True)
class_labels = st.integers(0, 9)
vector_labels = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from([None, class_labels, vector_labels]), is_zip=st.booleans())
def test_any_tree_is_read_in_the_order_of_its_names(tmp_path_factory, data, kind, is_zip):
    # Unique without case, for file systems that ignore it.
    names = data.draw(st.lists(file_names, min_size=1, max_size=6, unique_by=str.lower))
    pixels = {name: data.draw(st.integers(0, 255)) for name in names}
    labels = {name: data.draw(kind) for name in names} if kind is not None else None
    files = {name: png(np.full([2, 2], value, dtype=np.uint8)) for name, value in pixels.items()}
    files['notes.txt'] = b'not an image'
    files['dataset.json'] = dataset_json(labels and list(labels.items()))
    path = write(tmp_path_factory.mktemp('tree') / ('x.zip' if is_zip else 'x'), files)

    dataset = ImageFolderDataset(path, use_labels=True)
    assert (len(dataset), dataset.name, dataset.image_shape) == (len(names), 'x', [1, 2, 2])
    assert images_of(dataset)[:, 0, 0, 0].tolist() == [pixels[name] for name in sorted(names)]
    if labels is None:
        assert not dataset.has_labels
    else:
        raw = [dataset.get_details(idx).raw_label.tolist() for idx in range(len(names))]
        assert raw == [labels[name] for name in sorted(names)]


def test_shapes_and_name(path):
    dataset = ImageFolderDataset(write(path, {f'{i}.png': png(x) for i, x in enumerate(noise(2, 8, 8, 3))}), 8)
    assert (dataset.name, dataset.image_shape) == ('photos', [3, 8, 8])
    assert (dataset.num_channels, dataset.resolution) == (3, 8)
    assert dataset[0][0].dtype == np.uint8


def test_name_of_a_folder_with_a_slash_at_the_end(tmp_path):
    write(tmp_path / 'photos', {'0.png': png(noise(1, 2, 2)[0])})
    assert ImageFolderDataset(f'{tmp_path}/photos/').name == 'photos'


def test_resolution_is_for_square_images_only(path):
    dataset = ImageFolderDataset(write(path, {'0.png': png(noise(1, 2, 4)[0])}))
    assert dataset.image_shape == [1, 2, 4]
    with pytest.raises(AssertionError, match='4x2, not square'):
        _ = dataset.resolution


def test_palettes_become_colours(path):
    image = PIL.Image.fromarray(noise(1, 4, 4, 3)[0]).quantize(4)
    dataset = ImageFolderDataset(write(path, {'0.png': png(image)}))
    assert np.array_equal(dataset[0][0].transpose(1, 2, 0), np.array(image.convert('RGB')))


def test_pyspng_decodes_png_files_where_it_is_installed(monkeypatch, path):
    decoded = []

    def load(data):
        decoded.append(data)
        return np.array(PIL.Image.open(io.BytesIO(data)))

    monkeypatch.setattr(training.dataset, 'pyspng', types.SimpleNamespace(load=load))
    bmp = io.BytesIO()
    PIL.Image.fromarray(noise(1, 2, 2)[0]).save(bmp, format='bmp')
    write(path, {'0.PNG': png(noise(1, 2, 2)[0]), '1.bmp': bmp.getvalue()})
    assert np.array_equal(*images_of(ImageFolderDataset(path)))
    assert len(decoded) == 2  # 0.PNG, for the shape and as an item
    images_of(ImageFolderDataset(path, use_pyspng=False))
    assert len(decoded) == 2


def test_cache_reads_each_image_once(monkeypatch, path):
    dataset = ImageFolderDataset(write(path, {'0.png': png(noise(1, 2, 2)[0])}), xflip=True, cache=True)
    first = images_of(dataset)
    monkeypatch.setattr(dataset, '_read_image', None)
    assert np.array_equal(images_of(dataset), first)


# ----------------------------------------------------------------------------------------------------------------------
# Other processes


def test_pickle_leaves_handles_and_caches_behind(path):
    files = {f'{i}.png': png(x) for i, x in enumerate(noise(20, 32, 32))}
    files['dataset.json'] = dataset_json([[f'{i}.png', i] for i in range(20)])
    dataset = ImageFolderDataset(write(path, files), use_labels=True, cache=True)
    before = images_of(dataset), labels_of(dataset)
    data = pickle.dumps(dataset)
    assert len(data) < 3000 < before[0].nbytes
    copy = pickle.loads(data)
    assert np.array_equal(images_of(copy), before[0])
    assert np.array_equal(labels_of(copy), before[1])


def test_data_loader_with_a_spawned_worker(path):
    files = {f'{i}.png': png(x) for i, x in enumerate(noise(5, 8, 8, 3))}
    files['dataset.json'] = dataset_json([[f'{i}.png', i % 2] for i in range(5)])
    dataset = ImageFolderDataset(write(path, files), use_labels=True)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context='spawn')
    images, labels = zip(*loader, strict=True)
    assert np.array_equal(torch.cat(images).numpy(), images_of(dataset))
    assert np.array_equal(torch.cat(labels).numpy(), labels_of(dataset))


def read_all_and_exit(dataset, expected):
    for _ in range(20):
        assert np.array_equal(images_of(dataset), expected)


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='needs fork')
@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_forked_processes_do_not_disturb_each_other(path):
    dataset = ImageFolderDataset(write(path, {f'{i}.png': png(x) for i, x in enumerate(noise(20, 8, 8))}))
    expected = images_of(dataset)
    context = multiprocessing.get_context('fork')
    workers = [context.Process(target=read_all_and_exit, args=(dataset, expected)) for _ in range(2)]
    for worker in workers:
        worker.start()
    read_all_and_exit(dataset, expected)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Errors: IOError, one line, with the path


def assert_refused(path, match, **kwargs):
    with pytest.raises(IOError, match=match) as caught:
        labels_of(ImageFolderDataset(path, **kwargs))
    assert str(path) in str(caught.value)
    assert '\n' not in str(caught.value)


def test_missing_path(path):
    assert_refused(path, 'no such folder or .zip file')


def test_file_of_another_kind(tmp_path):
    (tmp_path / 'x.tar').write_bytes(b'')
    assert_refused(tmp_path / 'x.tar', 'no such folder or .zip file')


def test_archive_that_is_none(tmp_path):
    (tmp_path / 'x.zip').write_bytes(b'PK, but no archive')
    assert_refused(tmp_path / 'x.zip', 'not a zip archive')


def test_no_images(path):
    assert_refused(write(path, {'notes.txt': b''}), 'no images found')


def test_wrong_resolution(path):
    assert_refused(write(path, {'0.png': png(noise(1, 4, 4)[0])}), 'images are 4x4, not 8x8', resolution=8)


def test_image_unlike_the_first(path):
    write(path, {'0.png': png(noise(1, 4, 4)[0]), 'b/1.png': png(noise(1, 4, 4, 3)[0])})
    assert_refused(path, r'b/1.png has shape \[3, 4, 4\], the first image \[1, 4, 4\]')


def test_truncated_image(path):
    data = png(noise(1, 32, 32)[0])
    assert_refused(write(path, {'0.png': data, '1.png': data[: len(data) // 2]}), 'cannot read 1.png')


def test_wrong_checksum_in_archive(tmp_path):
    data = png(noise(1, 32, 32)[0])
    path = write(tmp_path / 'x.zip', {'0.png': data})
    path.write_bytes(path.read_bytes().replace(data, data[:-20] + b'x' + data[-19:]))
    assert_refused(path, 'cannot read 0.png: Bad CRC-32')


@pytest.mark.parametrize('method', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archives(tmp_path, method):
    images = noise(3, 16, 16, 3)
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w', method) as archive:
        for i, image in enumerate(images):
            archive.writestr(f'{i}.png', png(image))
    assert np.array_equal(images_of(ImageFolderDataset(tmp_path / 'x.zip')), images.transpose(0, 3, 1, 2))


def test_archives_behind_other_bytes_and_with_extra_fields(tmp_path):
    entry = zipfile.ZipInfo('0.png')
    entry.extra = struct.pack('<HH4s', 0x7777, 4, b'more')
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
        archive.writestr(entry, png(noise(1, 4, 4)[0]))
    (tmp_path / 'x.zip').write_bytes(b'#!/bin/sh\n' + (tmp_path / 'x.zip').read_bytes())
    assert np.array_equal(ImageFolderDataset(tmp_path / 'x.zip')[0][0], noise(1, 4, 4))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_archives_are_refused_or_read_right(tmp_path_factory, data):
    """Whatever byte is changed: the pixels of before, or an IOError of one line."""
    image = noise(1, 4, 4)
    path = write(tmp_path_factory.mktemp('damaged') / 'x.zip', {'0.png': png(image[0])})
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found, error = ImageFolderDataset(path)[0][0], ''
    except OSError as err:
        found, error = image, str(err)
    assert np.array_equal(found, image)
    assert '\n' not in error


def test_sixteen_bits(path):
    image = noise(1, 4, 4)[0].astype(np.uint16) * 257
    assert_refused(write(path, {'0.png': png(image)}), r'0.png: pixels are I(;16)?, not 8-bit', use_pyspng=False)


@pytest.mark.parametrize('channels', [2, 4])
def test_transparency(path, channels):
    write(path, {'0.png': png(np.zeros([4, 4, channels], np.uint8))})
    assert_refused(path, '0.png: it has transparent pixels', use_pyspng=False)


@pytest.mark.parametrize(
    'json_text',
    [
        '',
        '[]',
        '{}',
        '{"labels": 3}',
        '{"labels": [1, 2]}',
        '{"labels": [["0.png", "cat"], ["1.png", "dog"]]}',
        '{"labels": [["0.png", 0], ["1.png", null]]}',
        '{"labels": [["0.png", 0.5], ["1.png", 1]]}',
        '{"labels": [["0.png", -1], ["1.png", 1]]}',
        '{"labels": [["0.png", 1e300], ["1.png", 1]]}',
        '{"labels": [["0.png", NaN], ["1.png", 1]]}',
        '{"labels": [["0.png", [1]], ["1.png", [1, 2]]]}',
        '{"labels": [["0.png", [1]], ["1.png", 1]]}',
        '{"labels": [["0.png", [1]], ["1.png", [Infinity]]]}',
        '{"labels": [["0.png", [[1]]], ["1.png", [[1]]]]}',
    ],
)
def test_bad_labels(path, json_text):
    write(path, {'0.png': png(noise(1, 2, 2)[0]), '1.png': png(noise(1, 2, 2)[0]), 'dataset.json': json_text.encode()})
    assert_refused(path, 'bad labels in dataset.json', use_labels=True)
    assert len(ImageFolderDataset(path)) == 2  # nobody asked for labels


def test_label_missing_for_one_image(path):
    files = {f'{i}.png': png(noise(1, 2, 2)[0]) for i in range(2)}
    write(path, {**files, 'dataset.json': dataset_json([['0.png', 1]])})
    assert_refused(path, 'no label for 1.png', use_labels=True)
