"""The emoji source on small packages made here: what is a picture, which are held out, and what is refused."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import dataset_tool
from images import emoji
from training.dataset import ImageFolderDataset

GOOGLE, TWITTER, FLUENT = emoji.PACKAGES


def picture(seed, size=(4, 4), file_format='PNG'):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format=file_format, lossless=True)
    return file.getvalue()


def entry(code, group, tones=()):
    return {
        'unified': code,
        'category': group,
        'skin_variations': {tone: {'unified': f'{code}-{tone}'} for tone in tones},
    }


def write_picture(folder, package, code, content):
    path = folder / package / emoji.PACKAGES[package].format(code.lower())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_table(folder, entries):
    (folder / GOOGLE / 'emoji.json').write_text(json.dumps(entries))


def write_packages(folder, count, content):
    """`count` emoji of the groups in turns, and a swatch that is in none; a file holds `content(artist, i, format)`."""
    entries = [entry(f'{0x1F000 + i:X}', emoji.GROUPS[i % 9]) for i in range(count)]
    entries.append(entry('1F3FB', 'Component'))
    for artist, package in enumerate(emoji.PACKAGES):
        for i, each in enumerate(entries):
            file_format = 'WEBP' if package == FLUENT else 'PNG'
            write_picture(folder, package, each['unified'], content(artist, i, file_format))
    write_table(folder, entries)


def picture_packages(folder):
    """Real pictures of 32 emoji, two of which are held out."""
    write_packages(folder, 32, lambda artist, i, file_format: picture(100 * artist + i, file_format=file_format))


@pytest.fixture
def folder(tmp_path):
    """Three artists' files of 180 emoji, all different."""
    write_packages(tmp_path, 180, lambda artist, i, file_format: b'%d %d' % (artist, i))
    return tmp_path


def codes(pictures):
    return [each.name.split('/')[-1].split('.')[0].upper() for each in pictures]


HELD_OUT = [
    f'1F0{code}'
    for code in ['0F', '1F', '22', '29', '4C', '53', '55', '5C', '5D', '67', '6A', '6C', '7B', '92', '96', 'AF']
]


def test_all_versions_of_an_emoji_are_on_the_same_side(folder):
    """Another tenth would let networks trained before see what is held out."""
    train, held_out = (emoji.pictures(str(folder), side) for side in [False, True])
    assert codes(held_out) == HELD_OUT * 3
    assert sorted(codes(train) + codes(held_out)) == sorted(f'{0x1F000 + i:X}' for i in range(180) for _ in range(3))


def test_label_is_the_group(folder):
    for each, code in zip(found := emoji.pictures(str(folder), False), codes(found), strict=True):
        assert each.label == (int(code, 16) - 0x1F000) % 9


def test_pictures_lie_on_white(folder):
    write_picture(folder, GOOGLE, '1F000', picture(7, size=(4, 6)))
    first = emoji.pictures(str(folder), False)[0]
    assert first.name == f'{GOOGLE}/img/google/64/1f000.png'
    rgba = np.random.default_rng(7).integers(0, 256, (6, 4, 4), dtype=np.uint8).astype(float)
    alpha = rgba[:, :, 3:] / 255
    expected = np.full((6, 6, 3), 255.0)
    expected[:, 1:5] = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    assert first.read().dtype == np.uint8
    np.testing.assert_allclose(first.read(), expected, atol=1)


def test_of_equal_files_the_first_stays_on_its_side(folder):
    """1F00F, equal to 1F000, leaves the held-out side, and 1F010, equal to the held-out 1F01F, does not come to it."""
    write_picture(folder, TWITTER, '1F00F', b'1 0')
    write_picture(folder, TWITTER, '1F030', b'1 31')
    train, held_out = (emoji.pictures(str(folder), side) for side in [False, True])
    assert codes(held_out) == HELD_OUT + HELD_OUT[1:] + HELD_OUT
    assert len(train) == 3 * 164 - 1
    assert codes(train).count('1F030') == 2


def test_each_artist_gives_one_skin_tone(folder):
    """All six are chosen about as often, and no artist like another."""
    write_table(folder, [entry(f'{0x1F000 + i:X}', emoji.GROUPS[1], emoji.TONES) for i in range(180)])
    for artist, package in enumerate(emoji.PACKAGES):
        for i in range(180):
            for k, tone in enumerate(emoji.TONES):
                write_picture(folder, package, f'{0x1F000 + i:X}-{tone}', b'%d %d %d' % (artist, i, k))
    found = codes(emoji.pictures(str(folder), False))
    assert len(found) == 3 * 164
    tones = [code[6:] for code in found]
    assert all(54 <= tones.count(tone) <= 110 for tone in ['', *emoji.TONES])  # 82 ± 8 by chance
    equal = sum(one == other for one, other in zip(found[:164], found[164:328], strict=True))
    assert 10 <= equal <= 46  # 27 ± 5 by chance


def test_what_an_artist_left_out_is_passed_over(folder):
    (folder / FLUENT / 'assets' / '1f000.webp').unlink()
    assert codes(emoji.pictures(str(folder), False)).count('1F000') == 2


@pytest.mark.parametrize(
    ('table', 'message'),
    [
        ('[', 'damaged'),
        ('[{"unified": "1F600"}]', "damaged: KeyError\\('category'\\)"),
        ('[{"category": "Flags", "unified": "../1F600"}]', 'are no code points'),
        ('[{"category": "Flags", "unified": 7}]', 'damaged'),
        ('[7]', 'damaged'),
    ],
)
def test_damaged_table_is_refused(folder, table, message):
    (folder / GOOGLE / 'emoji.json').write_text(table)
    with pytest.raises(OSError, match=message) as caught:
        emoji.pictures(str(folder), False)
    assert '\n' not in str(caught.value)


def test_command_makes_both_sides(tmp_path):
    picture_packages(tmp_path)
    for kind, count in [('emoji', 3 * 30), ('emoji-held-out', 3 * 2)]:
        dest = tmp_path / f'{kind}.zip'
        options = [f'--source={kind}:{tmp_path}', f'--dest={dest}', '--resolution=2x2', '--workers=1']
        run = CliRunner().invoke(dataset_tool.main, options)
        assert run.exit_code == 0, run.output
        dataset = ImageFolderDataset(str(dest), use_labels=True)
        assert len(dataset) == count
        assert dataset.image_shape == [3, 2, 2]
    assert ImageFolderDataset(str(tmp_path / 'emoji.zip'), use_labels=True).label_dim == 9


def test_missing_package_is_named_with_the_command_that_brings_it(tmp_path):
    run = CliRunner().invoke(dataset_tool.main, [f'--source=emoji:{tmp_path}', f'--dest={tmp_path}/x.zip'])
    assert run.exit_code == 1
    assert run.output.startswith(f'Error: --source=emoji:{tmp_path}: {tmp_path} has no {GOOGLE}; npm install {GOOGLE} ')
    assert run.output.count('\n') == 1
