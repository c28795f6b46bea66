"""dnnlib/options.py: what the types of options take, and what they say otherwise."""

import json
import re
from pathlib import Path

import click
import pytest

import compare
import dataset_tool
import fid
import generate
import train
from dnnlib import options

GOLDEN = json.loads((Path(__file__).parent / 'data' / 'edm_samplers.json').read_text())


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        *GOLDEN['parse_int_list'].items(),
        ('7', [7]),
        ('3,1,2', [3, 1, 2]),
        ('2,2', [2, 2]),
        ('4-4', [4]),
        (' 1, 3-5 ', [1, 3, 4, 5]),
        ('007', [7]),
        ([4, 2], [4, 2]),
    ],
)
def test_parse_int_list(text, expected):
    assert options.parse_int_list(text) == expected


@pytest.mark.parametrize(
    'text', ['a', '5-3', '', '1,,2', '-1', '1-', '1.5', '0x10', '1-2-3', '²', '٣', '1 2', ',', '1,']
)
def test_parse_int_list_refuses(text):
    with pytest.raises(ValueError, match=r'neither a number nor a range|runs backwards'):
        options.parse_int_list(text)


def test_files_to_be_written_have_a_folder_and_a_known_ending(tmp_path):
    path = options.NewFile('.png', '.gif')
    assert path.convert(f'{tmp_path}/new/deep/grid.PNG', None, None) == f'{tmp_path}/new/deep/grid.PNG'
    assert (tmp_path / 'new' / 'deep').is_dir()
    with pytest.raises(click.BadParameter, match=r'grid\.jpg: the name ends in \.png or \.gif'):
        path.convert('grid.jpg', None, None)
    (tmp_path / 'file').touch()
    with pytest.raises(click.BadParameter, match=r'cannot make the folder .*/file: File exists|Not a directory'):
        path.convert(f'{tmp_path}/file/grid.png', None, None)


def test_lists_of_another_type_count_a_value_once():
    numbers = options.ListOf(click.IntRange(min=1))
    assert numbers.convert('8, 16,8', None, None) == [8, 16]
    with pytest.raises(click.BadParameter):
        numbers.convert('8,0', None, None)


@pytest.mark.parametrize(('text', 'size'), [('64x48', (64, 48)), ('64,48', (64, 48)), ('64', (64, 64))])
def test_resolutions(text, size):
    assert options.Resolution().convert(text, None, None) == size


@pytest.mark.parametrize('text', ['0x4', '-1', '64x', 'x64', '64x64x64', '1.5', '٣'])
def test_resolutions_refused(text):
    with pytest.raises(click.BadParameter, match='is not like 64x64'):
        options.Resolution().convert(text, None, None)


@pytest.mark.parametrize('text', ['inf', 'nan', '-1'])
def test_numbers_to_compute_with(text):
    with pytest.raises(click.BadParameter):
        options.FiniteRange(min=0).convert(text, None, None)


def test_a_range_that_no_memory_holds_is_refused():
    with pytest.raises(ValueError, match=r"'0-9999999999' has 10,000,000,000 numbers, more than 100,000,000"):
        options.parse_int_list('0-9999999999')


def test_a_path_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    for text, path in [
        ('~/a/b.png', f'{tmp_path}/a/b.png'),
        ('~', str(tmp_path)),
        ('a/~/b', 'a/~/b'),
        ('https://host/~me/net.pkl', 'https://host/~me/net.pkl'),
        ('edm-cifar10-32x32-cond-vp', 'edm-cifar10-32x32-cond-vp'),
        ('', ''),
    ]:
        assert options.user_path.convert(text, None, None) == path
    assert options.NewFile('.png').convert('~/a.png', None, None) == f'{tmp_path}/a.png'


def test_a_device_is_no_path():
    with pytest.raises(click.BadParameter, match='/dev/null is a pipe or a device, neither a file nor a folder'):
        options.user_path.convert('/dev/null', None, None)


COMMANDS = {
    **{'generate': generate.main, 'train': train.main, 'dataset_tool': dataset_tool.main, 'compare': compare.main},
    **{f'fid {name}': command for name, command in fid.main.commands.items()},
}


@pytest.mark.parametrize('command', COMMANDS.values(), ids=COMMANDS)
def test_every_option_that_names_a_file_takes_a_path_of_the_user(command):
    naming = [each for each in command.params if re.search('PATH|DIR|ZIP|NPZ|PNG|URL|PT', each.metavar or '')]
    assert naming
    assert [each.name for each in naming if not isinstance(each.type, options.UserPath)] == []
