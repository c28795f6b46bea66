"""dnnlib/settings.py: what a record gives back, and how it differs from today's settings."""

import math

import pytest

from dnnlib import settings


def test_what_was_saved_differs_in_nothing(tmp_path):
    of = {'steps': 18, 'S_max': math.inf, 'sides': (1, 2), 'gnet': None}
    settings.save(tmp_path / 'record.json', settings.as_stored(of))
    before = settings.read(tmp_path / 'record.json')
    assert before == {'steps': 18, 'S_max': 'inf', 'sides': [1, 2], 'gnet': None}
    assert settings.differences(before, of) == []


def test_differences_are_told_in_their_order():
    found = settings.differences({'rho': 7, 'steps': 18, 'old': 1}, {'steps': 40, 'rho': 7, 'eta': 0.5})
    assert list(map(str, found)) == ['steps: 18 → 40', 'old: 1 → none', 'eta: none → 0.5']
    assert found[0] == ('steps', 18, 40)


@pytest.mark.parametrize('text', ['', '[1]', '7', '{"a": ', '[' * 100_000, '\x1b'])
def test_other_files_are_refused_in_one_line(tmp_path, text):
    (tmp_path / 'record.json').write_text(text)
    with pytest.raises(ValueError, match='is not a record') as info:
        settings.read(tmp_path / 'record.json')
    assert str(info.value).isprintable()


def test_no_file_is_no_record(tmp_path):
    with pytest.raises(FileNotFoundError):
        settings.read(tmp_path / 'record.json')


def test_json_has_no_word_for_nan():
    found = {'fid': math.nan, 'n': 4, 'ranges': [{'fid': math.inf}, {'fid': 0.5}], 'title': 'FD'}
    assert settings.without_nan(found) == {'fid': None, 'n': 4, 'ranges': [{'fid': None}, {'fid': 0.5}], 'title': 'FD'}
