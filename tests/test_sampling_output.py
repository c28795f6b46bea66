"""sampling/output.py: two runs that write into one folder at once, and a folder that goes away meanwhile."""

import json
import shutil

import numpy as np
import pytest

from sampling.output import Output

IMAGES = np.zeros([2, 4, 4, 1], dtype=np.uint8)
SEEDS = [[0, 1], [2, 3]]
ALL = [0, 1, 2, 3]


def begun(folder, steps=4, image_format='png', seeds=ALL, **kwargs):
    """A run that has looked at what is there, and has not written yet."""
    output = Output(str(folder), {'steps': steps}, {}, image_format, **kwargs)
    output.check(seeds)
    return output


def test_of_two_runs_with_other_settings_the_second_is_refused(tmp_path):
    folder = tmp_path / 'new'
    with begun(folder, steps=4) as first, begun(folder, steps=5) as second:
        first.add(SEEDS[0], IMAGES)
        with pytest.raises(ValueError, match=r'another run has begun to write into .*new, with other .*--steps: 4 → 5'):
            second.add(SEEDS[1], IMAGES)
        first.close()
        second.close()
    assert {path.name for path in folder.iterdir()} == {'000000.png', '000001.png', 'generate.json'}
    assert json.loads((folder / 'generate.json').read_text())['settings'] == {'steps': 4}


def test_two_runs_with_the_same_settings_share_a_folder(tmp_path):
    """What the first is about to write, the second does not take for what a kill left."""
    with begun(tmp_path, seeds=SEEDS[0]) as first:
        first.start()
        (tmp_path / f'.tmp_{"0" * 32}_000002.png').touch()
        with begun(tmp_path, seeds=ALL) as second:
            second.add(SEEDS[1], IMAGES)
            second.close()
        assert (tmp_path / f'.tmp_{"0" * 32}_000002.png').exists()
        first.close()
    with begun(tmp_path) as third:
        third.add(SEEDS[0], IMAGES)
        third.close()
    assert {path.name for path in tmp_path.iterdir()} == {*(f'{seed:06d}.png' for seed in ALL), 'generate.json'}


@pytest.mark.parametrize('kwargs', [{'image_format': 'npz'}, {'image_format': 'zip'}, {'overwrite': True}])
def test_two_runs_that_would_delete_each_others_files(tmp_path, kwargs):
    with begun(tmp_path, **kwargs) as first:
        with begun(tmp_path, **kwargs) as second:
            first.add(SEEDS[0], IMAGES)
            with pytest.raises(ValueError, match=r'another run is writing into .*; wait for its end'):
                second.add(SEEDS[0], IMAGES)
            second.close()
        first.add(SEEDS[1], IMAGES)
        first.close()
        first.assemble(ALL, lambda: None)
    with begun(tmp_path, **kwargs) as again:
        assert again.finished == (set() if 'overwrite' in kwargs else set(ALL))
        again.start()
        again.close()


@pytest.mark.parametrize('image_format', ['png', 'zip'])
def test_a_folder_that_goes_away_ends_the_run(tmp_path, image_format):
    with begun(tmp_path / 'out', image_format=image_format) as output:
        output.add(SEEDS[0], IMAGES)
        output._background.close()
        output._background = type(output._background)(output._write)
        shutil.rmtree(tmp_path / 'out')
        output.add(SEEDS[1], IMAGES)
        with pytest.raises(OSError, match=r'out has lost generate\.json while this run was writing into it'):
            output.close()
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('image_format', ['png', 'npz'])
def test_images_that_go_away_are_missed_at_the_end(tmp_path, image_format):
    with begun(tmp_path, image_format=image_format) as output:
        for seeds in SEEDS:
            output.add(seeds, IMAGES)
        output.close()
        next(tmp_path.rglob('000001.png')).unlink()
        with pytest.raises(OSError, match='has lost 1 images'):
            output.assemble(ALL, lambda: None)
