"""images/files.py: names, writing in the background, what is ours."""

import threading

import numpy as np
import pytest
from image_files import png

from images import files

GREY = np.full([4, 4, 1], 128, np.uint8)


def test_names():
    assert files.image_path('out', 7, False) == 'out/000007.png'
    assert files.image_path('out', 1234567, True) == 'out/1234000/1234567.png'


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('subdirs', [False, True])
def test_a_folder_gives_back_what_it_was_given(tmp_path, channels, subdirs):
    folder = files.PngFolder(str(tmp_path), subdirs)
    image = np.random.RandomState(0).randint(0, 256, [5, 3, channels], dtype=np.uint8)
    folder.write(1001, image)
    assert np.array_equal(folder.read(1001), image)
    assert folder.finished([0, 1001, 1, 5000]) == {1001}


def test_two_batches_wait_at_most(tmp_path):
    """The third `add` returns only after the first batch is written, so memory is bounded."""
    gate, written, added = threading.Event(), [], []

    def write(seed, image):
        gate.wait(30)
        written.append(seed)

    writer = files.Background(write)

    def fill():
        for seed in range(3):
            writer.add([seed], [GREY])
            added.append(seed)

    thread = threading.Thread(target=fill)
    thread.start()
    thread.join(0.3)
    assert added == [0]
    gate.set()
    thread.join(30)
    writer.close()
    assert added == [0, 1, 2]
    assert sorted(written) == [0, 1, 2]


def test_an_error_in_the_background_comes_out(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    writer = files.Background(files.PngFolder(str(tmp_path / 'file'), False).write)
    writer.add([0], [GREY])
    with pytest.raises(OSError, match=r'cannot write .*000000\.png: .*the files written before are whole'):
        writer.add([1], [GREY])
    with pytest.raises(OSError, match='cannot write'):
        writer.close()


def test_only_files_with_our_names_are_ours(tmp_path):
    half = '.tmp_' + '0a' * 16 + '_'
    ours = ['000001.png', '1234567.png', '000000/000001.png', 'images.zip', 'images.npz.partial/000000/000002.png']
    ours += [f'{half}000003.png', f'{half}generate.json', f'images.zip.partial/001000/{half}001001.png']
    foreign = ['00001.png', 'a000001.png', '000001.png.bak', '000001.jpg', '000500/000501.png', 'sub/000001.png']
    foreign += ['generate.json', 'image.zip', f'{half}cat.png', '.tmp_000001.png', 'images.tar.partial/000001.png']
    for name in ours + foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / '000009.png').write_bytes(b'')
    (tmp_path / '009000').symlink_to(tmp_path / 'elsewhere')
    found = list(files.own_files(str(tmp_path)))
    assert sorted(found) == sorted(str(tmp_path / name) for name in ours)
    assert files.final_path(f'{tmp_path}/{half}000003.png') == f'{tmp_path}/000003.png'
    files.delete(found)
    assert not list(files.own_files(str(tmp_path)))
    assert not (tmp_path / 'images.npz.partial').exists()
    assert all((tmp_path / name).exists() for name in foreign)
    assert (tmp_path / 'elsewhere' / '000009.png').exists()


@pytest.mark.parametrize('data', [b'', b'no image', png(GREY[:, :, 0])[:40]])
def test_a_damaged_image_is_named(tmp_path, data):
    (tmp_path / '000001.png').write_bytes(data)
    with pytest.raises(OSError, match=r'000001\.png is damaged .* delete it'):
        files.PngFolder(str(tmp_path), False).read(1)
