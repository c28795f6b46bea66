"""Every command in README.md and docs/ runs: each is matched by exactly one rule, and a new one without a rule fails.

A rule says how to make a command small (options put at its end: of two values of an option the last counts), and what
has to be there afterwards. Commands run in a copy of the folder that docs_workplace.py makes, one by one. `torchrun`
runs its script in one process here; the tests at the end start real ones.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import click
import docs_commands
import docs_workplace
import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from docs_commands import ROOT
from torch.distributed.run import get_args_parser

import dnnlib
import example
import train
from dnnlib import published
from images.files import image_path
from metrics import detectors
from torch_utils import network_io
from training.dataset import ImageFolderDataset
from training.training_loop import training_loop

pytestmark = pytest.mark.usefixtures('one_thread')

NVIDIA = 'https://nvlabs-fi-cdn.nvidia.com'
SMALL_TRAINING = '--cbase=4 --cres=1,1,1 --num-blocks=1 --batch=16 --tick=1 --samples=0 --workers=0'
SMALL_TRAINING += ' --plot=0 --fp16=0 --bf16=0 --seed=0 --device=cpu'
TINY = 'ckpts/edm-mnist-32x32-cond-vp.pkl'
SMALL_COMPARISON = f'--network={TINY} --num=4 --sets=1 --pictures=1 --rho=7 --metrics=fid --device=cpu'
SMALL_COMPARISON += ' --ref=out/digits.npz --detector=inception-2015-12-05'


# ----------------------------------------------------------------------------
# What a command has to leave behind. `options` are those of the command, as the script sees them.


def images_of_all_seeds(options, output):
    pictures = [options[name] for name in ('grid', 'trajectory') if options[name]]
    for path in pictures:
        with PIL.Image.open(path) as image:
            assert image.width >= 32
    if options['metrics']:
        assert re.search(r'^fid [\d.]+$', output, re.MULTILINE)
    if options['outdir'] is None:
        assert pictures or options['metrics']
        return
    if options['format'] == 'zip':
        assert len(ImageFolderDataset(f'{options["outdir"]}/images.zip')) == len(options['seeds'])
        return
    net = network_io.load_network(options['network_pkl'])
    for seed in options['seeds']:
        with PIL.Image.open(image_path(options['outdir'], seed, options['subdirs'])) as image:
            assert image.size == (net.img_resolution, net.img_resolution)
            assert image.mode == {1: 'L', 3: 'RGB'}[net.img_channels]


def a_grid(options, output):
    name = example.EXAMPLES[options['dataset']][1]
    with PIL.Image.open(name) as image:
        assert image.width == 8 * int(re.search(r'(\d+)x', name)[1])


def a_dataset(options, output):
    if options['dry_run'] or options['validate_path']:
        assert 'result' in output
        return
    dataset = ImageFolderDataset(options['dest'], use_labels=True)
    assert f'{len(dataset)} images' in output
    assert options['resolution'] in (None, (dataset.resolution, dataset.resolution))


def numbers_on_stdout(options, output):
    names = options['metrics'].split(',')
    if options['as_json']:
        assert set(names) <= set(json.loads(output))
        return
    values = [float(line.split()[-1]) for line in output.splitlines()]
    assert len(values) >= len(names)
    assert all(math.isfinite(value) for value in values)


def statistics(options, output):
    with np.load(options['dest']) as archive:
        assert archive['sigma'].shape == 2 * archive['mu'].shape


def a_network(options, output):
    if options['dry_run']:
        assert 'Dry run; exiting.' in output
        return
    [path] = Path(options['outdir']).glob(f'**/network-snapshot-000000.{options["format"]}')
    assert network_io.load_network(str(path)).img_resolution >= 8


def a_report(options, output):
    assert output.startswith('|')
    assert '</html>' in Path(options['outdir'], 'report.html').read_text()


def a_plot(options, output):
    assert '| power, rho = 7 |' in output
    if options['plot_path']:
        with PIL.Image.open(options['plot_path']) as image:
            assert image.width > 300


def some_output(options, output):
    assert output


# ----------------------------------------------------------------------------
# The rules.


class Rule(NamedTuple):
    pattern: str  # of the whole command, without `torchrun …` or `python` before the script
    check: Callable = some_output
    smaller: str = ''
    slow: bool = False
    needs: str = ''  # a package that the tests do not ask for


RULES = [
    Rule(r'generate\.py --help'),
    Rule(
        r'generate\.py (?!--help).*', images_of_all_seeds, '--seeds=0-2 --steps=2 --batch=2 --dtype=fp32 --device=cpu'
    ),
    Rule(r'example\.py.*', a_grid, '--device=cpu'),
    Rule(r'dataset_tool\.py (?!--validate).*', a_dataset, '--max-images=40 --workers=1'),
    Rule(r'dataset_tool\.py --validate.*', a_dataset),
    Rule(r'fid\.py calc .*--ranges.*', numbers_on_stdout, '--num=4 --workers=0 --device=cpu'),
    Rule(r'fid\.py calc (?!.*--ranges).*', numbers_on_stdout, '--num=12 --workers=0 --device=cpu'),
    Rule(r'fid\.py ref .*', statistics, '--workers=0 --device=cpu'),
    Rule(r'train\.py .*', a_network, SMALL_TRAINING),
    Rule(r'-m torch_utils\.network_io (inspect|convert) .*'),
    Rule(r'-m torch_utils\.doctor'),
    Rule(r'compare\.py .*k-diffusion.*', a_report, f'{SMALL_COMPARISON} --evaluations=8', needs='k_diffusion'),
    Rule(
        r'compare\.py (?!.*k-diffusion).*--evaluations.*',
        a_report,
        f'{SMALL_COMPARISON} --evaluations=8',
        needs='matplotlib',
    ),
    Rule(r'compare\.py .*--steps.*', a_report, f'{SMALL_COMPARISON} --steps=3 --eta=0,1', needs='matplotlib'),
    Rule(r'benchmarks/gaussian_fd\.py .*', a_plot, '--spectrum=power --rho=7', slow=True, needs='matplotlib'),
    Rule(r'benchmarks/cost\.py.*', smaller='--batch=1 --rounds=1 --sets=1 --device=cpu', slow=True),
    Rule(r'benchmarks/guidance\.py.*', smaller='--paths=4', slow=True),
    Rule(r'benchmarks/killed_run\.py.*', smaller='--num=48 --kills=1 --batch=8', slow=True),
    Rule(r'benchmarks/write_images\.py.*', smaller='--num=2 --repeats=1 --ms=20', slow=True),
    Rule(r'benchmarks/mixture\.py .*', smaller='--paths=4', slow=True, needs='matplotlib'),
    Rule(r'tune\.py .*', smaller='--device=cpu'),
    Rule(r'benchmarks/few_steps\.py.*', smaller='--num=100', slow=True, needs='sklearn'),
    Rule(r'benchmarks/kernel_density\.py.*', smaller='--num=100 --sets=2 --evaluations=12', slow=True),
    Rule(r'benchmarks/same_picture\.py.*', smaller=f'--network={TINY} --seeds=0 --sheet=sheet.png', slow=True),
    Rule(
        r'benchmarks/solver_error\.py.*',
        smaller=f'--network={TINY} --seeds=0,1 --evaluations=4,8',
        slow=True,
        needs='matplotlib',
    ),
    Rule(r'benchmarks/orders\.py.*', smaller='--paths=4', slow=True),
    Rule(r'benchmarks/frechet\.py.*', smaller='--dim=64'),
    Rule(r'benchmarks/fd_floor\.py .*', smaller='--splits=2'),
    Rule(r'benchmarks/train\.py .*', smaller='--steps=1 --warm-up=1 --workers=0 --device=cpu', slow=True),
    Rule(r'benchmarks/dataset\.py.*', smaller='--small=100 --large=20 --repeats=1', slow=True),
    Rule(r'benchmarks/reproducibility\.py.*', smaller=f'--network={TINY} --seeds=0-3', slow=True),
    Rule(r'-m training\.reporter .*', needs='matplotlib'),
]

# What is not run, and why. Where it says so, something else is.
NOT_RUN = {
    r'make .*': 'sets up an environment; .ci/run does it',
    r'python3 -m venv \.venv|\.venv/bin/.*': 'the same by hand',
    r'pip install (-c constraints.txt )?-e .*': 'needs a package index; a test below compares the extras',
    r'pip install (--no-deps )?[\w-]+': 'needs a package index',
    r'conda .*': 'needs conda; tests/test_packaging.py compares environment.yml with pyproject.toml',
    r'python (-m pytest .*|tests/test_docs\.py)': 'runs tests',
    r'python benchmarks/digits\.py .*': 'fits a classifier; tests/test_digits.py runs it without',
    r'python benchmarks/broken_strokes\.py': '4 minutes; tests/test_broken_strokes.py runs its part',
    r'git show .*': 'reads the history, which a shallow clone lacks',
    r'python tests/attacks\.py': 'tests/test_dnnlib_safe_pickle.py and tests/test_network_io.py assert what it prints',
    r'python tests/fuzz/fuzz_network_io\.py .*': 'needs atheris, a compiled package that the tests do not ask for',
}

COMMANDS = docs_commands.commands()


def script_of(text):
    """'python X', 'torchrun … X' → X; None for other programs. torchrun's own parser says where the script begins."""
    program, *words = shlex.split(re.sub(r'^(\w+=\S+ )*', '', text))
    if program == 'torchrun':
        options = get_args_parser().parse_args(words)
        words = [options.training_script, *options.training_script_args]
    return shlex.join(words) if program in ('python', 'torchrun') else None


def rules_for(text):
    reasons = [pattern for pattern in NOT_RUN if re.fullmatch(pattern, text)]
    script = script_of(text)
    return reasons + [rule for rule in RULES if script is not None and re.fullmatch(rule.pattern, script)]


def cases():
    for page, text in COMMANDS:
        rule = rules_for(text)[0] if rules_for(text) else None
        if isinstance(rule, Rule):
            yield pytest.param(text, rule, marks=[pytest.mark.slow] * rule.slow, id=f'{page}: {text}')


@pytest.mark.parametrize(('page', 'text'), COMMANDS)
def test_each_command_has_one_rule(page, text):
    assert len(rules_for(text)) == 1, f'`{text}` in {page} needs exactly one rule in {Path(__file__).name}'


def test_each_rule_has_a_command():
    used = {str(rule) for _, text in COMMANDS for rule in rules_for(text)}
    assert used == {str(rule) for rule in [*RULES, *NOT_RUN]}


def test_extras_that_the_documentation_installs_exist():
    wanted = {extra for _, text in COMMANDS for extra in re.findall(r'\.\[(.*?)\]', text)}
    metadata = (ROOT / 'pyproject.toml').read_text()
    assert {name for each in wanted for name in each.split(',')} <= set(
        re.findall(r'^(\w+) = \["', metadata, re.MULTILINE)
    ) | {'test'}


# ----------------------------------------------------------------------------
# Running.


@pytest.fixture(scope='session')
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp('docs')
    docs_workplace.build(root)
    return root


@pytest.fixture(scope='session')
def server(original):
    """The address of a web server in the place of NVIDIA's and GitHub's."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=original / 'served')) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()
        thread.join()


@pytest.fixture
def workplace(original, server, tmp_path, monkeypatch):
    """The current folder has all that commands name, and downloads come from the local server, whose address it is."""
    shutil.copytree(original, tmp_path / 'here', symlinks=True)
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setattr(dnnlib.downloads, '_cache_root', None)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    for name, file in published.PUBLISHED.items():
        monkeypatch.setitem(published.PUBLISHED, name, published.PublishedFile(file.url.replace(NVIDIA, server)))
    for name, (network, grid, sampler, settings) in example.EXAMPLES.items():
        shorter = (network.replace(NVIDIA, server), grid, sampler, {**settings, 'num_steps': 1})
        monkeypatch.setitem(example.EXAMPLES, name, shorter)
    weights = original / 'served' / 'inception.pth'
    tiny = {'build': docs_workplace.TinyInception, 'sha256': hashlib.sha256(weights.read_bytes()).hexdigest()}
    for name, more in [('inception-2015-12-05', {}), ('efficientnet-lite0', {'file': lambda: str(weights)})]:
        network = dataclasses.replace(detectors.NETWORKS[name], **tiny, **more)
        monkeypatch.setitem(detectors.NETWORKS, name, network)
    monkeypatch.setattr(detectors, 'INCEPTION_URL', f'{server}/inception.pth')
    monkeypatch.setattr(train, 'training_loop', lambda **kwargs: training_loop(**{**kwargs, 'total_kimg': 0.032}))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return server


def run_here(script, smaller=''):
    """Run 'generate.py --outdir=…' in this process; returns the options as the script saw them, and its output."""
    name, *arguments = shlex.split(f'{script} {smaller}')
    if name == '-m':
        name = arguments.pop(0)
    command = importlib.import_module(name.removesuffix('.py').replace('/', '.')).main
    if isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    options = {} if '--help' in arguments else command.make_context(name, list(arguments)).params
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output + ''.join(traceback.format_exception(result.exception))
    return options, result.stdout


@pytest.mark.parametrize(('text', 'rule'), list(cases()))
def test_the_command_does_what_it_says(workplace, text, rule):
    if rule.needs:
        pytest.importorskip(rule.needs)
    for folder in re.findall(r'--outdir=(\S+)', text):
        shutil.rmtree(folder, ignore_errors=True)  # another command's images of the same name
    script = (
        script_of(text)
        .replace(NVIDIA, workplace)
        .replace('https://example.org', workplace)
        .replace('/shared/', 'shared/')
    )
    options, output = run_here(script, rule.smaller)
    rule.check(options, output)


OPTIONS_OF_EDM = re.findall(
    r'^\| (\w+) .*`(--cond=.*)` \|$', (ROOT / 'docs' / 'edm-commands.md').read_text(), re.MULTILINE
)


@pytest.mark.parametrize(('data', 'options'), OPTIONS_OF_EDM)
def test_options_of_edms_networks_are_accepted(workplace, data, options):
    [path] = Path('datasets').glob(f'{data}-*.zip')
    _, output = run_here(f'train.py --outdir=runs --data={path} {options} --dry-run --device=cpu')
    config = json.loads(output[output.index('{') : output.rindex('}') + 1])
    words = dict(word.removeprefix('--').split('=') for word in options.split())
    assert config['optimizer_kwargs']['lr'] == float(words.get('lr', 1e-3))
    assert config['batch_size'] == int(words.get('batch', 512))
    assert config['network_kwargs']['dropout'] == float(words.get('dropout', 0.13))
    assert config['total_kimg'] == 1000 * int(words.get('duration', 200))


# ----------------------------------------------------------------------------
# torchrun itself.

IN_PROCESSES = {
    'generate.py': '--seeds=0-3 --steps=2 --batch=2 --device=cpu',
    'fid.py': '--num=12 --ref=datasets/my-dataset.zip --detector=efficientnet-lite0 --workers=0 --device=cpu',
    'train.py': f'{SMALL_TRAINING} --duration=0.001',
}
TORCHRUN = [text for _, text in COMMANDS if 'torchrun ' in text]


def start(text, nodes, endpoint=None):
    """`text` with two processes in all, on the machines that `nodes` makes of this one."""
    script = next(name for name in IN_PROCESSES if name in text)
    text = re.sub(r'--nproc_per_node=\d+', f'--nproc_per_node={2 // nodes}', text)
    text = re.sub(r'--rdzv_endpoint=\S+', f'--rdzv_endpoint={endpoint}', text)
    text = re.sub(rf' (-- )?{script} ', f' -- {ROOT / script} ', text)  # torchrun would take --num for its own
    text = f'{text} {IN_PROCESSES[script]}'.replace('/shared/', 'shared/')
    words = shlex.split(text[text.index('torchrun ') :])[1:]
    command = [sys.executable, '-m', 'torch.distributed.run', *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'}
    )


@pytest.mark.slow
@pytest.mark.parametrize('text', TORCHRUN, ids=TORCHRUN)
def test_torchrun_starts_two_processes(workplace, text):
    """On one machine, or on two that are both this one."""
    for folder in re.findall(r'--outdir=(\S+)', text):
        shutil.rmtree(folder, ignore_errors=True)
    nodes = 2 if '--nnodes=2' in text else 1
    with socket.create_server(('127.0.0.1', 0)) as free:
        endpoint = f'127.0.0.1:{free.getsockname()[1]}'
    processes = [start(text.replace(NVIDIA, workplace), nodes, endpoint) for _ in range(nodes)]
    outputs = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [0] * nodes, outputs
    printed = ''.join(out for out, _ in outputs)
    if ' generate.py ' in text:
        [outdir] = re.findall(r'--outdir=(\S+)', text)
        assert sorted(path.stem for path in Path(outdir).rglob('*.png')) == [f'{seed:06d}' for seed in range(4)]
    elif ' fid.py ' in text:
        assert float(printed) > 0
    else:
        assert '2 x cpu' in printed
        assert list(Path().glob('**/*gpus2*/network-snapshot-000001.pkl'))
