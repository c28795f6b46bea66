"""The house: which room may import which, read from the source of every file. Imports inside functions count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem for path in ROOT.glob('*.py')} - {'sampler_2nd'}

# room → the rooms that it may import, apart from itself. sampling reads networks, which get training's rules of speed.
BELOW = {
    'dnnlib': set(),
    'sampler_2nd': set(),
    'ito_taylor': {'sampler_2nd'},
    'images': {'dnnlib'},
    'torch_utils': {'dnnlib'},
    'metrics': {'dnnlib', 'images', 'torch_utils'},
    'training': {'dnnlib', 'images', 'torch_utils', 'sampler_2nd'},
    'sampling': {'dnnlib', 'images', 'torch_utils', 'sampler_2nd', 'training'},
    'comparison': {'dnnlib', 'images', 'torch_utils', 'sampler_2nd', 'training', 'metrics', 'sampling'},
}
BELOW |= {script: set(BELOW) for script in SCRIPTS}  # and no script imports a script

# Stored inside pickles as source.
STORED = ('training/networks*.py', 'training/loss.py', 'training/augment.py')

# Files that get by with the standard library, rooms, and these packages.
PACKAGES = {
    'sampler_2nd.py': {'torch'},
    'images/*.py': {'numpy', 'PIL', 'lmdb'},
    **{pattern: {'torch', 'numpy'} for pattern in STORED},
}

# (file, module that it imports): arrows that are wrong, but still there. An entry without its arrow is an error.
NOT_YET: set[tuple[str, str]] = set()


def imports(source: str, package: str = '') -> set[str]:
    """The modules that a file imports, by their full names; `from a import b` is a.b where that is a file of ours."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
            module = '.'.join([*parents, *filter(None, [node.module])])
            found |= {full if is_ours(full := f'{module}.{alias.name}') else module for alias in node.names}
    return found


def is_ours(module: str) -> bool:
    path = ROOT.joinpath(*module.split('.'))
    return path.with_suffix('.py').is_file() or (path / '__init__.py').is_file()


def files_of_rooms() -> dict[str, set[str]]:
    """{file: modules that it imports} of all rooms and scripts; benchmarks, examples and tests may import anything."""
    paths = [*ROOT.glob('*.py'), *(path for room in BELOW for path in (ROOT / room).rglob('*.py'))]
    return {str(path.relative_to(ROOT)): imports_of(path) for path in paths}


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(encoding='utf-8'), '.'.join(path.relative_to(ROOT).parent.parts))


def room_of(file: str) -> str:
    return file.split('/')[0].removesuffix('.py')


def wrong_arrows(files: dict[str, set[str]]) -> set[tuple[str, str]]:
    """(file, module) where a file imports a module of ours from a room that is not below its own."""
    free = {'benchmarks', 'examples', 'tests'}
    return {
        (file, module)
        for file, modules in files.items()
        for module in modules
        if (room := module.split('.')[0]) in BELOW.keys() | free
        and room != room_of(file)
        and room not in BELOW[room_of(file)]
    }


def test_imports_run_one_way():
    assert wrong_arrows(files_of_rooms()) == NOT_YET


def test_every_room_has_its_place():
    packages = {path.parent.name for path in ROOT.glob('*/__init__.py')} - {'benchmarks', 'examples', 'tests'}
    assert packages <= set(BELOW)


@pytest.mark.parametrize('pattern', PACKAGES)
def test_some_files_need_few_packages(pattern):
    paths = list(ROOT.glob(pattern))
    assert paths
    tops = {module.split('.')[0] for path in paths for module in imports_of(path)}
    assert tops - sys.stdlib_module_names - set(BELOW) <= PACKAGES[pattern]


@pytest.mark.parametrize('pattern', STORED)
def test_what_pickles_hold_as_source_uses_persistence_alone(pattern):
    modules = {module for path in ROOT.glob(pattern) for module in imports_of(path)}
    assert {module for module in modules if module.split('.')[0] in BELOW} == {'torch_utils.persistence'}


def test_images_are_read_and_written_without_pytorch():
    modules = [f'images.{path.stem}' for path in (ROOT / 'images').glob('*.py') if path.stem != '__init__']
    heavy = '{"torch", "torch_utils", "training", "metrics", "sampling"}'
    code = f'import sys, {", ".join(modules)}; print(sorted({heavy} & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == '[]\n'


# ---- the tests above can fail


@pytest.mark.parametrize(
    ('source', 'found'),
    [
        ('import torch.nn as nn, os', {'torch.nn', 'os'}),
        ('def f():\n    from images import tree', {'images.tree'}),
        ('from images.tree import FileTree', {'images.tree'}),
        ('from dnnlib import EasyDict', {'dnnlib'}),
        ('from . import util', {'dnnlib.util'}),
        ('from .util import atomic_write', {'dnnlib.util'}),
    ],
)
def test_imports_are_found(source, found):
    assert imports(source, 'dnnlib') == found


@pytest.mark.parametrize(
    ('file', 'module', 'wrong'),
    [
        ('fid.py', 'generate', True),
        ('fid.py', 'metrics.measure', False),
        ('images/tree.py', 'torch_utils.misc', True),
        ('training/training_loop.py', 'sampling.edm', True),
        ('sampling/networks.py', 'training.networks', False),
        ('sampling/draw.py', 'metrics.measure', True),
        ('metrics/judge.py', 'benchmarks.orders', True),
        ('sampler_2nd.py', 'dnnlib', True),
        ('dnnlib/util.py', 'images.tree', True),
        ('images/write.py', 'images.convert', False),
    ],
)
def test_wrong_arrows_are_noticed(file, module, wrong):
    assert bool(wrong_arrows({file: {module}})) == wrong
