"""The commands of docs/training.md, at a size that takes a minute."""

import pathlib
import re
import shlex
import subprocess
import sys

import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Appended to the commands: of two values of an option the last counts.
SMALLER = {
    'dataset_tool.py': '--max-images=64',
    'train.py': '--cbase=8 --batch=16 --duration=0.002 --tick=1 --samples=4 --workers=0 --device=cpu',
    'generate.py': '--network=training-runs/digits/network-snapshot-000002.pkl --seeds=0-7 --steps=4 --device=cpu',
    'fid.py': '--num=8 --device=cpu',
}


def walkthrough():
    text = (ROOT / 'docs' / 'training.md').read_text()
    [block] = re.findall(r'## Your own network, on a CPU.*?```\n(.*?)```', text, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.slow
def test_from_raw_images_to_a_grid_and_a_metric(tmp_path):
    pytest.importorskip('matplotlib')
    output = {}
    for python, script, *arguments in walkthrough():
        assert python == 'python'
        command = [sys.executable, str(ROOT / script), *arguments, *SMALLER[script].split()]
        run = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
        assert run.returncode == 0, run.stdout + run.stderr
        output[script] = run.stdout
    assert list(output) == list(SMALLER)
    run_dir = tmp_path / 'training-runs' / 'digits'
    for name, size in [('samples-000002.png', (2 * 32 + 4, 32)), ('loss.png', (600, 320))]:
        with PIL.Image.open(run_dir / name) as picture:
            assert picture.size == size
    numbers = dict(line.split() for line in output['fid.py'].splitlines())
    assert float(numbers['fid']) > 0
    assert 'kid' in ' '.join(numbers)
