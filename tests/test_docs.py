"""What README and docs/ show is what the code does."""

import pathlib
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

import dataset_tool
import example
import fid
import generate
import train

ROOT = pathlib.Path(generate.__file__).parent
COMMANDS = {'generate': generate, 'example': example, 'fid': fid, 'dataset_tool': dataset_tool, 'train': train}


def help_text(name: str) -> str:
    pages = []
    for command in [[], *([command] for command in getattr(COMMANDS[name].main, 'commands', []))]:
        run = CliRunner().invoke(COMMANDS[name].main, [*command, '--help'], prog_name=f'{name}.py', terminal_width=120)
        assert run.exit_code == 0
        pages.append(run.output)
    return '\n'.join(pages)


@pytest.mark.parametrize('name', COMMANDS)
def test_saved_help_is_the_help_of_the_script(name):
    """Regenerate with `python tests/test_docs.py`."""
    assert (ROOT / 'docs' / f'{name}-help.txt').read_text() == help_text(name)


@pytest.mark.parametrize('page', ['README.md', *(f'docs/{p.name}' for p in (ROOT / 'docs').glob('*.md'))])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r'\]\(([^)#]+)\)', text) if '://' not in link]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_python_in_the_readme_runs(tmp_path):
    [code] = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    run = subprocess.run(
        [sys.executable, '-c', f'import torch\ntorch.manual_seed(0)\n{code}'], cwd=ROOT, text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    std, calls, jvp_calls = re.fullmatch(r'tensor\(([\d.]+), dtype=torch.float64\) (\d+) (\d+)\n', run.stdout).groups()
    assert float(std) == pytest.approx(1, abs=0.05)
    assert (calls, jvp_calls) == ('40', '39')


def test_one_line_commands_of_the_readme_are_accepted():
    """Each option exists; `--help` keeps the command from running."""
    text = (ROOT / 'README.md').read_text()
    commands = re.findall(r'`(?:python|torchrun --standalone --nproc_per_node=2) ((\w+)\.py[^`]*)`', text)
    assert {name for _, name in commands} >= {'generate', 'example', 'fid', 'dataset_tool', 'train'}
    for command, name in commands:
        if name in COMMANDS:
            run = CliRunner().invoke(COMMANDS[name].main, [*command.split()[1:], '--help'])
            assert run.exit_code == 0, run.output


if __name__ == '__main__':
    for name in COMMANDS:
        (ROOT / 'docs' / f'{name}-help.txt').write_text(help_text(name))
