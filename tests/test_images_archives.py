"""images/archives.py: an images.npz holds numbers, whatever its header says, and is read right or refused."""

import contextlib
import io
import struct
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from images.archives import NpzArchive, ZipArchive

IMAGES = np.random.RandomState(0).randint(0, 256, [3, 4, 5, 1], dtype=np.uint8)
SEEDS = np.array([4, 7, 2])


@pytest.fixture
def archive(tmp_path):
    """images.npz as generate.py writes it."""
    made = NpzArchive(str(tmp_path / 'images.npz'))
    for seed, image in zip(SEEDS.tolist(), IMAGES, strict=True):
        made.write(seed, image)
    made.assemble(SEEDS.tolist(), [0, 1, 2])
    return made


def header(descr="'|u1'", shape='(3, 4, 5, 1)', order='False', version=b'\1\0'):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
    return b'\x93NUMPY' + version + struct.pack('<H', len(text)) + text.encode()


def write(path, arr_0, seeds=None, compression=zipfile.ZIP_STORED):
    saved = io.BytesIO()
    np.save(saved, SEEDS)
    with zipfile.ZipFile(path, 'w', compression) as file:
        file.writestr('arr_0.npy', arr_0)
        file.writestr('seeds.npy', saved.getvalue() if seeds is None else seeds)
    return NpzArchive(str(path))


def test_images_come_back_mapped_from_the_file(archive, tmp_path):
    again = NpzArchive(archive.path)
    assert again.seeds == SEEDS.tolist()
    assert isinstance(again._array, np.memmap)
    for seed, image in zip(again.seeds, IMAGES, strict=True):
        assert np.array_equal(again.read(seed), image)
    with np.load(archive.path) as other:
        assert np.array_equal(other['arr_0'], IMAGES)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_what_numpy_wrote_anew_is_read_right(tmp_path, save):
    save(tmp_path / 'images.npz', arr_0=IMAGES, seeds=SEEDS)
    again = NpzArchive(str(tmp_path / 'images.npz'))
    assert np.array_equal([again.read(seed) for seed in SEEDS], IMAGES)


@pytest.mark.parametrize(
    'head',
    [
        header("'|O'", '(1,)'),
        header("'|O'"),
        header("[('a', '|O')]"),
        header("'<f8'"),
        header("'|u1', 'descr': '|O'"),
        header(shape='(3, 4, 5)'),
        header(shape='(3, 4, 5, 2)'),
        header(shape='(99999999999, 99999999999, 1, 1)'),
        header(shape='(-3, -4, 5, 1)'),
        header(shape='(300, 4, 5, 1)'),
        header(shape='(2, 4, 5, 1)'),
        header(order='True'),
        header(version=b'\2\0'),
        b'\x93NUMPY\1\0\xff\xff',
        b'',
    ],
)
def test_other_arrays_are_refused_in_one_line(tmp_path, head):
    made = write(tmp_path / 'images.npz', head + IMAGES.tobytes())
    with pytest.raises(OSError, match=r'images\.npz is damaged') as info:
        made.read(4)
    assert str(info.value).isprintable()


@pytest.mark.parametrize('seeds', [np.array(['a', 'b', 'c']), SEEDS.astype(float), SEEDS[:2], -SEEDS, SEEDS[:, None]])
def test_seeds_that_are_none_are_refused(tmp_path, seeds):
    saved = io.BytesIO()
    np.save(saved, seeds)
    made = write(tmp_path / 'images.npz', header() + IMAGES.tobytes(), saved.getvalue())
    with pytest.raises(OSError, match=r'images\.npz is damaged'):
        _ = made.seeds


@hypothesis.settings(
    max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_a_changed_byte_changes_pixels_at_most(archive, tmp_path, data):
    content = bytearray(Path(archive.path).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / 'changed.npz'
    path.write_bytes(content)
    changed, images = NpzArchive(str(path)), []
    with contextlib.suppress(OSError):
        images = [changed.read(seed) for seed in changed.seeds]
    assert all(image.dtype == np.uint8 and image.shape == (4, 5, 1) for image in images)


@pytest.mark.parametrize('kind', [NpzArchive, ZipArchive])
def test_growing_reads_the_directory_once_whatever_there_is(tmp_path, monkeypatch, kind):
    """Not once for each image, which took 82 s for 64 more than 4,000."""
    made, opened = kind(str(tmp_path / f'images.{"npz" if kind is NpzArchive else "zip"}')), []
    for seed in range(40):
        made.write(seed, IMAGES[seed % 3])
    made.assemble(range(40), None)
    again = kind(made.path)
    again.write(40, IMAGES[0])
    original = zipfile.ZipFile.__init__

    def count(*args, **kwargs):
        opened.append(args)
        original(*args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, '__init__', count)
    again.assemble(range(41), None)
    assert len(opened) <= 4
    assert again.seeds == list(range(41))
    assert all(np.array_equal(again.read(seed), IMAGES[seed % 3]) for seed in range(40))
    assert np.array_equal(again.read(40), IMAGES[0])


@pytest.mark.parametrize('seeds', ['"text"', '[1.5]', '[-1]', '[true]', 'null', '[[1]]'])
def test_seeds_of_a_zip_that_are_none_are_refused(tmp_path, seeds):
    with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as file:
        file.writestr('dataset.json', f'{{"labels": null, "seeds": {seeds}}}')
    with pytest.raises(OSError, match=r'images\.zip is damaged'):
        _ = ZipArchive(str(tmp_path / 'images.zip')).seeds
