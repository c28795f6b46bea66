"""pyproject.toml, constraints.txt, environment.yml, Makefile and .ci/run agree with each other and with the tree."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ['3.10', '3.11', '3.12', '3.13']
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
PROJECT = PYPROJECT['project']
EXTRAS = PROJECT['optional-dependencies']

# A CUDA build of PyTorch pins these itself; a CPU build has none of them.
CUDA_PACKAGES = ('nvidia-', 'cuda-', 'triton')


def pins(python):
    """The constraints that hold on this Python, {name: version}."""
    lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    pinned = {}
    for requirement in [Requirement(line) for line in lines if line and not line.startswith('#')]:
        (specifier,) = requirement.specifier
        assert specifier.operator == '==', requirement
        if requirement.marker is None or requirement.marker.evaluate({'python_version': python}):
            name = canonicalize_name(requirement.name)
            assert name not in pinned, f'{name} is pinned twice for Python {python}'
            pinned[name] = specifier.version
    return pinned


def declared(*extras):
    """What pyproject.toml asks for by name, with these extras and the extras of ours that they name."""
    lines = list(PROJECT['dependencies'])
    queue = list(extras)
    while queue:
        for line in EXTRAS[queue.pop()]:
            requirement = Requirement(line)
            if requirement.name == PROJECT['name']:
                queue += requirement.extras
            else:
                lines.append(line)
    return [Requirement(line) for line in lines]


# ---- pyproject.toml


def test_every_script_and_package_is_installed():
    scripts = {path.stem for path in ROOT.glob('*.py')}
    tops = {path.parent.name for path in ROOT.glob('*/*.py')} - {'tests', 'benchmarks', 'examples', 'docs', 'build'}
    packages = {'.'.join(file.parent.relative_to(ROOT).parts) for top in tops for file in (ROOT / top).rglob('*.py')}
    assert set(PYPROJECT['tool']['setuptools']['py-modules']) == scripts
    assert set(PYPROJECT['tool']['setuptools']['packages']) == packages
    for package in packages:
        assert (ROOT / package.replace('.', '/') / '__init__.py').is_file(), package


def test_type_checker_sees_every_script_and_package():
    tops = {name for name in PYPROJECT['tool']['setuptools']['packages'] if '.' not in name}
    scripts = {f'{name}.py' for name in PYPROJECT['tool']['setuptools']['py-modules']}
    assert set(PYPROJECT['tool']['mypy']['files']) == scripts | tops


def test_extras_and_python_versions():
    assert {'test', 'plot', 'compare', 'tensorboard', 'hub', 'data', 'offline', 'bench'} <= set(EXTRAS)
    allowed = Requirement(f'python{PROJECT["requires-python"]}').specifier
    assert all(version in allowed for version in PYTHONS)
    assert '3.9' not in allowed
    prefix = 'Programming Language :: Python :: '
    assert [line.removeprefix(prefix) for line in PROJECT['classifiers'] if line.startswith(prefix)] == PYTHONS


def test_files_that_the_build_reads_exist():
    assert (ROOT / PROJECT['readme']).is_file()
    assert PROJECT['license-files'] == ['LICENSE']
    assert 'Apache License\n                           Version 2.0' in (ROOT / 'LICENSE').read_text(encoding='utf-8')


# ---- constraints.txt


@pytest.mark.parametrize('python', PYTHONS)
def test_pins_lie_in_the_declared_ranges(python):
    pinned = pins(python)
    assert pinned['torch'] == '2.13.0'
    for requirement in declared('test'):
        if requirement.marker is None or requirement.marker.evaluate({'python_version': python}):
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_everything_that_gets_installed_is_pinned():
    """Walks the dependencies of what is installed here, so a release that starts to need one more package shows up."""
    pinned = pins('.'.join(map(str, sys.version_info[:2])))
    seen = set()
    queue = declared('test')
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or name.startswith(CUDA_PACKAGES):
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({'extra': ''}):
            continue
        seen.add(name)
        try:
            queue += [Requirement(line) for line in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
    assert seen <= set(pinned)
    assert not [name for name in pinned if name.startswith(CUDA_PACKAGES)]


# ---- environment.yml


def test_conda_environment_has_the_same_ranges():
    conda = yaml.safe_load((ROOT / 'environment.yml').read_text(encoding='utf-8'))
    assert conda['name'] == '2nd_DMSDE'
    assert conda['channels'] == ['conda-forge']
    *packages, from_pip = conda['dependencies']
    assert from_pip == {'pip': ['-e .']}

    python, *packages = packages
    name, _, version = python.partition('=')
    assert name == 'python'
    assert version in PYTHONS

    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, packages)}
    ranges['torch'] = ranges.pop('pytorch')
    assert 'pip' in ranges
    del ranges['pip']
    assert ranges == {requirement.name: requirement.specifier for requirement in declared()}


# ---- Makefile and .ci/run


def make(*args):
    if shutil.which('make') is None:
        pytest.skip('needs make')
    # Under `make test` the outer make's flags and variables must not reach this one.
    env = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'VENV', 'PYTHON')}
    return subprocess.run(['make', *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ('target', 'command'),
    [
        ('demo', 'bin/python example.py'),
        ('test', 'bin/python -m pytest -n auto --maxprocesses=8 --dist=worksteal'),
        ('test-slow', 'bin/python -m pytest -m slow'),
        ('lint', 'bin/mypy'),
    ],
)
def test_make_sets_up_then_runs(target, command, tmp_path):
    done = make('-n', target, f'VENV={tmp_path}/venv', 'PYTHON=python3')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (install,) = [i for i, line in enumerate(lines) if 'pip install' in line]
    assert '-c constraints.txt -e ' in lines[install]
    assert lines[-1] == f'{tmp_path}/venv/{command}'
    assert install < len(lines) - 1


def test_make_help_names_every_target():
    listed = [line.split()[1] for line in make('help').stdout.splitlines()]
    assert listed == ['help', 'demo', 'test', 'test-slow', 'lint', 'clean']


def test_make_says_so_when_there_is_no_python(tmp_path):
    done = make('demo', f'VENV={tmp_path}/venv', 'PYTHON=')
    assert done.returncode != 0
    assert done.stderr.startswith('Found no Python 3.10 or newer')


def test_failed_set_up_is_not_taken_for_a_finished_one(tmp_path):
    assert make('demo', f'VENV={tmp_path}', 'PYTHON=false').returncode != 0
    assert not list(tmp_path.iterdir())


def test_ci_runs_the_readme_commands():
    script = ROOT / '.ci' / 'run'
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding='utf-8')
    assert text.index('make lint') < text.index('make test')
