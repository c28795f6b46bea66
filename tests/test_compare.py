"""compare.py: what it measures, how it goes on after a kill, and what it says of wrong options."""

import functools
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from report_page import check_self_contained
from tiny_network import save_network

import compare
import generate
import sampler_2nd
from comparison import run as comparison_run
from comparison.record import ResultsFile
from metrics import detectors, judge, measure, statistics
from sampling import draw, edm, networks

ROOT = Path(generate.__file__).parent


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp('network') / 'tiny.pkl', seed=0)


@pytest.fixture(scope='module')
def ref(tmp_path_factory):
    """Statistics and features of 40 images of noise, their pixels."""
    features = measure.FeatureSet(detectors.load_detector('pixels', 'cpu'), torch.device('cpu'), keep=True)
    pixels = np.random.default_rng(0).integers(0, 256, [40, 3, 8, 8], dtype=np.uint8)
    features.add(range(40), torch.from_numpy(pixels))
    features.finish()
    path = tmp_path_factory.mktemp('ref') / 'noise.npz'
    statistics.write_reference(features.reference(), str(path))
    return str(path)


@pytest.fixture
def small(network, ref, tmp_path):
    """Options of a small comparison."""
    return [
        f'--network={network}', f'--ref={ref}', f'--outdir={tmp_path / "out"}',
        '--num=4', '--sets=2', '--pictures=2', '--device=cpu',
    ]  # fmt: skip


@pytest.fixture
def run(small):
    """run('--steps=2', …) → the result of the command."""
    pytest.importorskip('matplotlib')
    pytest.importorskip('jinja2')
    return lambda *args: CliRunner().invoke(compare.main, [*small, *args])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_and_pictures_are_those_of_generate(run, network, ref, tmp_path):
    """Set k is seeds k·num … (k + 1)·num − 1 of generate.py, with its work, in every cell."""
    result = run('--samplers=heun,rk', '--steps=3', '--rho=5')
    assert result.exit_code == 0, result.output
    found = {(of['sampler'], of['first_seed']): measured for of, measured in lines(tmp_path / 'out' / 'results.jsonl')}
    assert list(found) == list(itertools.product(['heun', 'rk'], [0])) + list(itertools.product(['heun', 'rk'], [4]))
    options = {name: [f'--sampler={name}'] for name in ('heun', 'rk')}
    for (sampler, first), measured in found.items():
        command = [f'--network={network}', f'--seeds={first}-{first + 3}', '--steps=3', '--rho=5', *options[sampler]]
        told = CliRunner().invoke(generate.main, [*command, '--metrics=fid', f'--ref={ref}', '--device=cpu'])
        assert told.exit_code == 0, told.output
        assert f'fid {measured["numbers"]["fid"]:g}\n' in told.output
        assert (measured['calls'], measured['jvp_calls']) == {'heun': (5, 0), 'rk': (3, 0)}[sampler]
        assert measured['seconds'] > 0
    net = networks.open_network(network, torch.device('cpu'))
    samplers = {
        'heun': functools.partial(edm.edm_sampler, num_steps=3, rho=5),
        'rk': functools.partial(sampler_2nd.ito_taylor_sampler, num_steps=3, rho=5, scheme='rk'),
    }
    for name, sampler in samplers.items():
        [strip] = (tmp_path / 'out' / 'pictures').glob(f'{name}-*.png')
        made = draw.generate_images(net, [[0, 1]], sampler, torch.device('cpu'))
        assert np.array_equal(np.asarray(PIL.Image.open(strip)), next(made)[1].reshape(16, 8))


def test_the_table_on_stdout_has_mean_and_sd(run, tmp_path):
    result = run('--samplers=rk', '--evaluations=4', '--metrics=fid,swd')
    numbers = [measured['numbers'] for _, measured in lines(tmp_path / 'out' / 'results.jsonl')]
    cells = [
        f'**{np.mean(values):.4g}'.split('.')[0] for values in zip(*(each.values() for each in numbers), strict=True)
    ]
    row = result.stdout.splitlines()[2].split(' | ')
    assert row[:4] == ['| rk', '4', '4', '0']
    assert [text.split('.')[0] for text in row[4:6]] == cells
    assert result.stdout.splitlines()[0].split(' | ')[4:6] == ['FD (pixels)', 'Sliced Wasserstein']


def test_killed_and_run_again_gives_the_numbers_of_one_run(run, small, tmp_path):
    args = ['--samplers=heun,rk', '--steps=2,4', '--metrics=fid,swd']
    assert run(*args, f'--outdir={tmp_path / "whole"}').exit_code == 0
    args.append(f'--outdir={tmp_path / "killed"}')
    results = tmp_path / 'killed' / 'results.jsonl'
    command = [sys.executable, 'compare.py', *small, *args]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (results.exists() and results.read_bytes().count(b'\n') >= 2):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = results.read_bytes()
    assert 2 <= before.count(b'\n') < 8
    results.write_bytes(before + b'[{"network": "half a li')
    assert run(*args).exit_code == 0
    assert results.read_bytes().startswith(before)

    def numbers(folder):
        return [(of, measured['numbers']) for of, measured in lines(tmp_path / folder / 'results.jsonl')]

    assert len(numbers('killed')) == 8
    assert numbers('killed') == numbers('whole')


def test_what_is_known_is_not_computed_again(run, network, tmp_path, monkeypatch):
    first = run('--samplers=rk', '--steps=2')
    monkeypatch.setattr(comparison_run, 'sample_and_judge', None)
    monkeypatch.setattr(judge, 'open_reference', None)
    again = run('--samplers=rk', '--steps=2')
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    other = save_network(tmp_path / 'tiny.pkl', seed=1)  # other weights under the same name
    assert isinstance(run('--samplers=rk', '--steps=2', f'--network={other}').exception, TypeError)


def test_results_of_the_previous_version_are_read(run, tmp_path, monkeypatch):
    """They say 'db' where 'heun' stands now."""
    first = run('--samplers=heun', '--steps=2')
    results = tmp_path / 'out' / 'results.jsonl'
    results.write_text(results.read_text().replace('"sampler": "heun"', '"sampler": "db"'))
    monkeypatch.setattr(comparison_run, 'sample_and_judge', None)
    again = run('--samplers=heun', '--steps=2')
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout


def test_the_old_name_runs_the_same_command(small):
    command = [sys.executable, 'benchmarks/compare.py', *small, '--dry-run']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith('evaluations')
    assert done.stderr.splitlines() == [
        'benchmarks/compare.py is compare.py at the root now; this name goes with version 0.3'
    ]


def test_record_drops_a_line_without_an_end_and_names_a_bad_one(tmp_path):
    path = tmp_path / 'results.jsonl'
    kept = ResultsFile(path)
    assert kept.get({'a': 1, 'b': 2}, lambda: {'x': 3}) == {'x': 3}
    whole = path.read_bytes()
    path.write_bytes(whole + b'[{"a": 2}, {"x"')
    again = ResultsFile(path)
    assert path.read_bytes() == whole
    assert again.get({'b': 2, 'a': 1}, None) == {'x': 3}
    path.write_bytes(b'[1, 2\n' + whole)
    with pytest.raises(ValueError, match=r'results\.jsonl, line 1 is no result'):
        ResultsFile(path)


@pytest.mark.parametrize(('channels', 'label_dim'), [(3, 0), (3, 2), (1, 0)])
def test_networks_with_colours_and_without_classes(run, tmp_path, channels, label_dim):
    network = save_network(tmp_path / 'other.safetensors', seed=0, channels=channels, label_dim=label_dim)
    result = run(f'--network={network}', '--evaluations=4', '--sets=1')
    assert result.exit_code == 0, result.output
    page = (tmp_path / 'out' / 'report.html').read_text()
    assert f'8×8, {channels} channel' in page
    assert (f'{label_dim} classes' if label_dim else 'no classes') in page


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--samplers=heun,dpm'], "'dpm' is none of heun, rk, taylor, euler"),
        (['--samplers=db,rk'], "'db' is the forks' word for 'heun'; use that"),
        (['--steps=0'], '0 is not in the range'),
        (['--steps=a'], "'a' is not a valid integer"),
        (['--steps=4', '--evaluations=8'], '--steps=N fixes the steps and --evaluations=N what they cost'),
        (['--evaluations=2'], '--evaluations=2: two steps of heun cost 3'),
        (['--samplers=heun', '--eta=0,1'], '--eta is for rk, taylor, euler; --samplers=heun has none'),
        (['--samplers=rk', '--eta=2'], "scheme='rk' needs an eta from 0 to below 1.732"),
        (['--samplers=rk', '--steps=4', '--eta=2'], "scheme='rk' needs an eta from 0 to below 1.732"),
        (['--samplers=rk', '--S_churn=5'], '--S_churn is for heun; --samplers=rk has none'),
        (['--samplers=heun', '--S_min=1'], '--S_min needs noise: a sampler of ours with --eta or --S_churn above 0'),
        (['--samplers=rk', '--eta=0', '--S_max=1'], '--S_max needs noise'),
        (['--samplers=rk', '--S_min=2', '--S_max=1'], '--S_min=2 is above --S_max=1'),
        (['--S_churn=5', '--S_min=2', '--S_max=1'], '--S_min=2 is above --S_max=1'),
        (['--metrics=fud'], "'fud' is none of fid, kid, prdc, swd"),
        (['--detector=efficientnet-lite0'], 'was made with detector'),
        (['--network=absent.pkl'], 'absent.pkl'),
        (['--ref=absent.npz'], 'Error: --ref=absent.npz: No such file or directory'),
        (['--ref=absent.npz', '--dry-run'], 'Error: --ref=absent.npz: No such file or directory'),
        (['--ref=absent.zip', '--dry-run'], 'Error: --ref: absent.zip: no such folder or .zip file'),
        ([f'--ref={ROOT}/benchmarks', '--dry-run'], 'benchmarks: no images found'),
        ([f'--ref={ROOT}/README.md', '--dry-run'], 'README.md holds no reference statistics'),
        (['--metrics=fud', '--dry-run'], "'fud' is none of fid, kid, prdc, swd"),
        (['--device=abacus'], 'abacus'),
        (['--rho=0'], '0 is not in the range'),
        (['--rho=nan'], 'rho'),
    ],
)
def test_wrong_options_are_one_line(run, tmp_path, args, message):
    result = run(*args)
    assert result.exit_code in (1, 2), result.output
    assert message in result.output.splitlines()[-1]
    assert not (tmp_path / 'out').exists()


def test_dry_run_prints_cells_and_cost_only(run, tmp_path):
    result = run('--dry-run', '--samplers=heun,taylor', '--steps=3', '--eta=0.5,1')
    assert result.stdout.splitlines()[2:] == [
        '| heun | rho 7, S_churn 0 | 3 | 5 | 0 |',
        '| taylor | rho 7, eta 0.5 | 3 | 3 | 2 |',
        '| taylor | rho 7, eta 1 | 3 | 3 | 2 |',
        '',
        '3 cells of 8 images: 120 evaluations',  # (5 + 3 + 2 + 3 + 2) · 8
    ]
    assert not (tmp_path / 'out').exists()


def test_no_memory_left_is_one_line(run, monkeypatch):
    monkeypatch.setattr(draw, 'to_uint8', lambda images: torch.empty(2**60))
    result = run('--samplers=rk', '--steps=2')
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith('Error: out of memory: ')
    assert result.output.endswith('; lower --batch\n')


@pytest.mark.parametrize(
    ('metrics', 'advice'),
    [('fid', ['use more images, or --metrics=kid, which is unbiased']), ('kid,fid', ['use more images']), ('kid', [])],
)
def test_the_warning_of_few_images_advises_what_is_not_done_yet(run, tmp_path, metrics, advice):
    assert run('--samplers=rk', '--steps=2', f'--metrics={metrics}').exit_code == 0
    [warned, _] = [measured['warnings'] for _, measured in lines(tmp_path / 'out' / 'results.jsonl')]
    assert [text.split('; ')[1] for text in warned] == advice


def test_the_page_needs_nothing_else(run, tmp_path):
    result = run('--samplers=heun,taylor', '--steps=2,3', '--eta=0,1', '--metrics=fid,swd')
    assert result.exit_code == 0, result.output
    page = check_self_contained((tmp_path / 'out' / 'report.html').read_text())
    assert len(page.named('img')) == 6  # heun, and taylor with two noises; two numbers of steps
    assert len(page.named('svg')) == 2 * 2  # two metrics, over evaluations and over seconds
    assert '#00ff0' not in (tmp_path / 'out' / 'report.html').read_text()
    text = ' '.join(page.text)
    assert '--steps=2,3 --eta=0,1' in text
    assert torch.__version__ in text
    assert 'taylor, eta 0, 2 steps' in text
