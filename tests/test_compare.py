"""benchmarks/compare.py: what it measures, how it goes on after a kill, and the page that it writes."""

import functools
import html.parser
import itertools
import json
import math
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

import dnnlib
import generate
import sampler_2nd
from benchmarks import compare, cost, record, report
from metrics import detectors, measure, statistics
from sampling import draw, edm
from torch_utils import network_io
from training import networks

ROOT = Path(generate.__file__).parent
NEEDS_K_DIFFUSION = pytest.mark.skipif('k-diffusion-heun' not in compare.SAMPLERS, reason='needs k-diffusion')


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """Random weights, 8×8 gray images, three classes."""
    return save_network(tmp_path_factory.mktemp('network') / 'tiny.pkl', seed=0)


def save_network(path, seed, channels=1, label_dim=3):
    torch.manual_seed(seed)
    kwargs = {'model_type': 'SongUNet', 'model_channels': 8, 'channel_mult': [1], 'num_blocks': 1}
    net = networks.EDMPrecond(8, channels, label_dim=label_dim, **kwargs)
    cost.randomize_zeros(net)
    network_io.save_network(net, path)
    return str(path)


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
    return lambda *args: CliRunner().invoke(compare.main, [*small, *args])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------
# Statistics.


def row(label='rk', calls=8, jvp_calls=0, **numbers):
    sets = len(next(iter(numbers.values()), []))
    return report.Row(label, 8, calls, calls, jvp_calls, numbers, [0.5] * sets, b'')


def make_report(rows, **fields):
    plain = {'title': 't', 'group_name': 'evaluations', 'budgets': [8], 'num': 4, 'sets': 2, 'shown': 1}
    plain |= {'command': 'python compare.py', 'facts': {}, 'seconds_title': 'seconds'}
    return report.Report(**(plain | {'rows': rows} | fields))


def test_spread_by_hand():
    assert report.spread([1, 2, 6]) == (3, pytest.approx(math.sqrt(7)))  # ((−2)² + (−1)² + 3²)/2
    assert report.spread([2.5])[0] == 2.5
    assert math.isnan(report.spread([2.5])[1])


@pytest.mark.parametrize(
    ('mean', 'sd', 'text'),
    [
        (12.3456, 0.0567, '12.346 ± 0.057'),
        (206.4, 10.3, '206 ± 10'),
        (0.00215, 0.00004, '0.002150 ± 0.000040'),
        (3.14159, math.nan, '3.142'),
        (3.14159, 0, '3.142 ± 0'),
        (1234.5, 250.0, '1234 ± 250'),
    ],
)
def test_a_spread_is_shown_to_two_digits_of_its_sd(mean, sd, text):
    assert str(report.Spread(mean, sd)) == text


def test_overlapping_error_bars_are_not_told_apart():
    a, b, c = row(fid=[1, 2, 3]), row(fid=[3.4, 4.4, 5.4]), row(fid=[3, 4, 5])  # 2 ± 1, 4.4 ± 1, 4 ± 1
    assert report.best([b, a], 'fid') == [a]  # 4.4 − 2 > 1 + 1
    assert report.best([c, b, a], 'fid') == [a, c]  # 4 − 2 = 1 + 1: they touch
    assert report.best([row(fid=[9.0]), row(fid=[1.0])], 'fid') == [row(fid=[1.0]), row(fid=[9.0])]


def test_of_precision_and_the_like_the_larger_is_better():
    low, high = row(recall=[0.1, 0.2]), row(recall=[0.8, 0.9])
    assert report.best([low, high], 'recall') == [high]
    assert report.best([low, row()], 'recall') == [low]


def test_a_budget_pays_for_all_that_costs_no_more():
    cheap, jvp, dear = row('rk', 8, fid=[5, 5.1]), row('taylor', 8, 7, fid=[3, 3.1]), row('db', 31, fid=[4, 4.1])
    page = make_report([cheap, jvp, dear], budgets=[8, 16, 32])
    assert [report.best(page.affordable(budget), 'fid') for budget in page.budgets] == [[cheap], [jvp], [jvp]]
    assert [report.is_best(page, each, 'fid') for each in page.rows] == [True, True, False]


def test_budgets_with_the_same_answer_are_one_line_and_equals_are_cut():
    pytest.importorskip('matplotlib')
    rows = [row(f's{i}', 8, fid=[1 + i / 100, 1.5 + i / 100]) for i in range(7)] + [row('late', 30, fid=[0.1, 0.2])]
    page = Page(report.page(make_report(rows, budgets=[8, 16, 32])))
    first = page.text.index('8 to 16')
    told = [text for text in page.text[first : page.text.index('32', first)] if text.strip()]
    assert told[1::2] == ['s0, 8 steps', 's1, 8 steps', 's2, 8 steps', 's3, 8 steps', 'and 3 more']
    assert page.text[page.text.index('32', first) + 1] == 'late, 30 steps'


# ----------------------------------------------------------------------------
# Cells.


@pytest.mark.parametrize(
    ('sampler', 'settings', 'steps', 'work'),
    [
        ('db', {'rho': 7}, 8, (15, 0)),
        ('db', {'rho': 3, 'S_churn': 40, 'S_min': 0.05}, 8, (15, 0)),
        ('euler', {'rho': 7, 'eta': 1}, 16, (16, 0)),
        ('taylor', {'rho': 7, 'eta': 1}, 8, (8, 7)),
        ('taylor', {'rho': 7, 'eta': 0.5}, 8, (8, 7)),
        ('rk', {'rho': 7}, 16, (16, 0)),
        pytest.param('k-diffusion-dpmpp_2m_sde', {'rho': 7}, 16, (16, 0), marks=NEEDS_K_DIFFUSION),
        pytest.param('k-diffusion-dpmpp_sde', {'rho': 7}, 8, (15, 0), marks=NEEDS_K_DIFFUSION),
    ],
)
def test_steps_that_sixteen_evaluations_pay_for(sampler, settings, steps, work):
    cell = compare.Cell(sampler, tuple(settings.items()), steps, 16)
    assert compare.affordable_steps(sampler, cell.settings, 16) == steps
    assert compare.count_work(cell) == work


def test_each_sampler_has_its_own_dials():
    opts = dnnlib.EasyDict(samplers=['db', 'taylor', 'rk'], rho=[3.0, 7.0], eta=[0.0, 1.0], S_churn=[0.0, 40.0])
    opts |= {'S_min': 0.05, 'S_max': [math.inf], 'S_noise': None}
    cells = compare.make_cells(opts, [5], by_evaluations=False)
    assert [cell.label({'rho'}) for cell in cells] == [
        'db, rho 3', 'db, rho 3, S_churn 40, S_min 0.05', 'db, rho 7', 'db, rho 7, S_churn 40, S_min 0.05',
        'taylor, rho 3, eta 0', 'taylor, rho 3, S_min 0.05', 'taylor, rho 7, eta 0', 'taylor, rho 7, S_min 0.05',
        'rk, rho 3, eta 0', 'rk, rho 3, S_min 0.05', 'rk, rho 7, eta 0', 'rk, rho 7, S_min 0.05',
    ]  # fmt: skip


def test_noise_is_limited_where_there_is_some():
    opts = dnnlib.EasyDict(samplers=['db', 'rk', 'k-diffusion-heun'], rho=[7.0], eta=[0.0, 1.0], S_churn=[0.0])
    opts |= {'S_min': None, 'S_max': [5.0, math.inf], 'S_noise': 1.01}
    cells = compare.make_cells(opts, [5], by_evaluations=False)
    assert [cell.settings[1:] for cell in cells] == [
        (('S_churn', 0),),
        (('eta', 0),), (('eta', 1), ('S_max', 5), ('S_noise', 1.01)), (('eta', 1), ('S_noise', 1.01)),
        (),
    ]  # fmt: skip


@NEEDS_K_DIFFUSION
def test_a_peer_draws_by_seed_whatever_the_batch(network):
    net = networks.open_network(network, torch.device('cpu')).double()
    sampler = compare.Cell('k-diffusion-dpmpp_sde', (('rho', 7),), 3, 3).make()

    def images(*batches):
        return np.concatenate([each for _, each in draw.generate_images(net, batches, sampler, torch.device('cpu'))])

    assert np.array_equal(images([5, 9, 2]), images([5], [9], [2]))


@NEEDS_K_DIFFUSION
def test_heun_is_the_same_through_the_adapter(network):
    net = networks.open_network(network, torch.device('cpu'))
    one, other = (
        next(draw.generate_images(net, [[0, 1]], compare.Cell(name, (('rho', 5),), 6, 6).make(), torch.device('cpu')))
        for name in ('db', 'k-diffusion-heun')
    )
    assert np.abs(one[1].astype(int) - other[1]).max() <= 1


def test_noise_of_a_peer_is_brownian_motion():
    """Increments over parts add up to that over the whole, which has the variance of its length."""
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    noise = compare.SeededNoise(x, lambda like: torch.randn_like(like))
    torch.manual_seed(0)
    late, whole = noise(3.0, 1.0), noise(4.0, 0.0)
    ends = noise(4.0, 3.0) + noise(1.0, 0.0)
    assert torch.allclose(2 * whole, ends + math.sqrt(2) * late)
    assert float(whole.var()) == pytest.approx(1, abs=0.04)  # four standard deviations
    assert float((late * whole).mean()) == pytest.approx(math.sqrt(2 / 4), abs=0.035)


def test_divergence_is_an_error(monkeypatch):
    monkeypatch.setitem(compare.SAMPLERS, 'rk', lambda num_steps: lambda *args, **kwargs: torch.tensor([1, math.nan]))
    with pytest.raises(ValueError, match='rk with 4 steps diverged'):
        compare.Cell('rk', (), 4, 4).make()()


# ----------------------------------------------------------------------------
# A whole comparison.


def test_numbers_and_pictures_are_those_of_generate(run, network, ref, tmp_path):
    """Set k is seeds k·num … (k + 1)·num − 1 of generate.py, with its work, in every cell."""
    result = run('--samplers=db,rk', '--steps=3', '--rho=5')
    assert result.exit_code == 0, result.output
    found = {(of['sampler'], of['first_seed']): measured for of, measured in lines(tmp_path / 'out' / 'results.jsonl')}
    assert list(found) == list(itertools.product(['db', 'rk'], [0])) + list(itertools.product(['db', 'rk'], [4]))
    options = {'db': ['--randn_like=db'], 'rk': ['--randn_like=ddb', '--scheme=rk']}
    for (sampler, first), measured in found.items():
        command = [f'--network={network}', f'--seeds={first}-{first + 3}', '--steps=3', '--rho=5', *options[sampler]]
        told = CliRunner().invoke(generate.main, [*command, '--metrics=fid', f'--ref={ref}', '--device=cpu'])
        assert told.exit_code == 0, told.output
        assert f'fid {measured["numbers"]["fid"]:g}\n' in told.output
        assert (measured['calls'], measured['jvp_calls']) == {'db': (5, 0), 'rk': (3, 0)}[sampler]
        assert measured['seconds'] > 0
    net = networks.open_network(network, torch.device('cpu'))
    samplers = {
        'db': functools.partial(edm.edm_sampler, num_steps=3, rho=5),
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
    args = ['--samplers=db,rk', '--steps=2,4', '--metrics=fid,swd']
    assert run(*args, f'--outdir={tmp_path / "whole"}').exit_code == 0
    args.append(f'--outdir={tmp_path / "killed"}')
    results = tmp_path / 'killed' / 'results.jsonl'
    command = [sys.executable, 'benchmarks/compare.py', *small, *args]
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
    monkeypatch.setattr(compare, 'measure_cell', None)
    monkeypatch.setattr(compare.fid, 'open_reference', None)
    again = run('--samplers=rk', '--steps=2')
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    other = save_network(tmp_path / 'tiny.pkl', seed=1)  # other weights under the same name
    assert isinstance(run('--samplers=rk', '--steps=2', f'--network={other}').exception, TypeError)


def test_record_drops_a_line_without_an_end_and_names_a_bad_one(tmp_path):
    path = tmp_path / 'results.jsonl'
    kept = record.Record(path)
    assert kept.get({'a': 1, 'b': 2}, lambda: {'x': 3}) == {'x': 3}
    whole = path.read_bytes()
    path.write_bytes(whole + b'[{"a": 2}, {"x"')
    again = record.Record(path)
    assert path.read_bytes() == whole
    assert again.get({'b': 2, 'a': 1}, None) == {'x': 3}
    path.write_bytes(b'[1, 2\n' + whole)
    with pytest.raises(ValueError, match=r'results\.jsonl, line 1 is no result'):
        record.Record(path)


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
        (['--samplers=db,heun'], "'heun' is none of db, euler, taylor, rk"),
        (['--steps=0'], '0 is not in the range'),
        (['--steps=a'], "'a' is not a valid integer"),
        (['--steps=4', '--evaluations=8'], '--steps=N fixes the steps and --evaluations=N what they cost'),
        (['--evaluations=2'], '--evaluations=2: two steps of db cost 3'),
        (['--samplers=db', '--eta=0,1'], '--eta is for euler, taylor, rk; --samplers=db has none'),
        (['--samplers=rk', '--eta=2'], "scheme='rk' needs an eta from 0 to below 1.732"),
        (['--samplers=rk', '--steps=4', '--eta=2'], "scheme='rk' needs an eta from 0 to below 1.732"),
        (['--samplers=rk', '--S_churn=5'], '--S_churn is for db; --samplers=rk has none'),
        (['--samplers=db', '--S_min=1'], '--S_min needs noise: a sampler of ours with --eta or --S_churn above 0'),
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
    result = run('--dry-run', '--samplers=db,taylor', '--steps=3', '--eta=0.5,1')
    assert result.stdout.splitlines()[2:] == [
        '| db | rho 7, S_churn 0 | 3 | 5 | 0 |',
        '| taylor | rho 7, eta 0.5 | 3 | 3 | 2 |',
        '| taylor | rho 7, eta 1 | 3 | 3 | 2 |',
        '',
        '3 cells of 8 images: 120 evaluations',  # (5 + 3 + 2 + 3 + 2) · 8
    ]
    assert not (tmp_path / 'out').exists()


def test_no_memory_left_is_one_line(run, monkeypatch):
    monkeypatch.setattr(generate, 'to_uint8', lambda images: torch.empty(2**60))
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


# ----------------------------------------------------------------------------
# The page.


class Page(html.parser.HTMLParser):
    """Tags with their attributes, all text, and a check that every element is closed in order."""

    VOID = frozenset({'meta', 'link', 'img'})

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def check_self_contained(text):
    page = Page(text)
    assert 'http://' not in text
    assert 'https://' not in text
    assert '//' not in ''.join(text.split('base64,')[0])
    for tag, attrs in page.tags:
        for name in ('src', 'href', 'xlink:href', 'srcset', 'action'):
            assert attrs.get(name, '#').startswith(('data:', '#')), (tag, attrs)
        assert not any(name.startswith('on') for name in attrs)
    assert not page.named('script')
    assert page.named('html') == [{'lang': 'en'}]
    assert len(page.named('title')) == len(page.named('h1')) == 1
    for image in page.named('img'):
        assert image['src'].startswith('data:image/png;base64,')
        assert image['alt']
    for plot in page.named('svg'):
        assert (plot['role'], bool(plot['aria-label'])) == ('img', True)
    return page


def test_the_page_needs_nothing_else(run, tmp_path):
    result = run('--samplers=db,taylor', '--steps=2,3', '--eta=0,1', '--metrics=fid,swd')
    assert result.exit_code == 0, result.output
    page = check_self_contained((tmp_path / 'out' / 'report.html').read_text())
    assert len(page.named('img')) == 6  # db, and taylor with two noises; two numbers of steps
    assert len(page.named('svg')) == 2 * 2  # two metrics, over evaluations and over seconds
    assert '#00ff0' not in (tmp_path / 'out' / 'report.html').read_text()
    text = ' '.join(page.text)
    assert '--steps=2,3 --eta=0,1' in text
    assert torch.__version__ in text
    assert 'taylor, eta 0, 2 steps' in text


def test_a_mark_is_one_box():
    assert 'display: inline-block' in report.STYLE.split('mark {')[1].split('}')[0]


HOSTILE = '<script>alert("1 & 2")</script>\'--><b>'


def test_what_users_write_is_text_on_the_page():
    pytest.importorskip('matplotlib')
    everywhere = {'title': HOSTILE, 'group_name': 'steps', 'fd_title': HOSTILE, 'command': HOSTILE}
    everywhere |= {'seconds_title': HOSTILE, 'warnings': [HOSTILE], 'facts': {HOSTILE: HOSTILE + 'x'}}
    rows = [row(HOSTILE, fid=[1.0, 2.0]), row(HOSTILE + '2', 4, fid=[1.0, 2.0])]
    page = check_self_contained(report.page(make_report(rows, **everywhere)))
    assert not page.named('script')
    assert not page.named('b')
    assert page.text.count(HOSTILE) >= 12
    assert {HOSTILE + 'x', f'{HOSTILE}2, 4 steps'} <= set(page.text)


def test_a_page_without_numbers_yet_says_so():
    page = check_self_contained(report.page(make_report([row()], sets=3)))
    assert any('In progress: 0 of 3' in text for text in page.text)
