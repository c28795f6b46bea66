"""benchmarks/digits.py: its measures in closed form, and the command at a size that takes seconds."""

import json
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import dataset_tool
import generate
from benchmarks import digits
from benchmarks import digits_classifier as dc
from comparison import cells, report, run
from metrics.judge import Verdict
from sampling import networks

pytest.importorskip('scipy')
pytest.importorskip('jinja2')


@pytest.fixture
def judge():
    real = torch.randn(500, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return digits.DigitsJudge(real, classifier=None)


def test_distances_of_a_set_to_itself_are_zero(judge):
    assert judge.frechet_distance(judge.real) == pytest.approx(0, abs=1e-9)
    assert judge.sliced_wasserstein(judge.real) == 0


def test_frechet_distance_of_a_shift_is_its_square(judge):
    shift = 0.3 * judge.axes[:, 2] + 0.4 * judge.axes[:, 7]
    assert judge.frechet_distance(judge.real + shift) == pytest.approx(0.25, rel=1e-6)


def test_frechet_distance_of_a_larger_spread(judge):
    """Twice the standard deviation in each of the components: tr C."""
    wide = judge.mean + 2 * (judge.real - judge.mean)
    variance = ((judge.real - judge.mean) @ judge.axes).var(0).sum()
    assert judge.frechet_distance(wide) == pytest.approx(float(variance), rel=1e-6)


def test_sliced_wasserstein_distance_of_a_shift(judge):
    shift = torch.linspace(-1, 1, 64, dtype=torch.float64)
    expected = (shift @ judge.directions).square().mean().sqrt()
    assert judge.sliced_wasserstein(judge.real + shift) == pytest.approx(float(expected), rel=1e-9)


def test_distances_between_halves_are_those_of_chance():
    """Of standard normal points in d ≤ 40 dimensions, k in each half: 2d/k for means, (d² + d)/(2k) for covariances.

    A sliced Wasserstein distance has √(2/k) from the mean alone.
    """
    k, d = 2000, 20
    real = torch.randn(2 * k, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frechet, sliced = digits.distances_between_halves(real)
    assert frechet.mean() == pytest.approx((2 * d + (d**2 + d) / 2) / k, rel=0.15)
    assert (2 / k) ** 0.5 < sliced.mean() < 2 * (2 / k) ** 0.5


class ByGreyLevel(torch.nn.Module):
    """Reads the class k in a digit whose first pixel has the grey level 20 k."""

    def forward(self, x):
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] * 255 / 20).round().long(), 10).float()


def test_shares_of_digits_read_as_asked_and_broken():
    pixels = np.zeros([20, 32, 32, 1], np.uint8)
    pixels[:, 0, 0, 0] = 20 * (np.arange(20) % 10)
    pixels[13, 0, 0] = 0  # of class 3
    pixels[:, 4:8, 4:8] = 255
    pixels[5, 20:24, 20:24] = 255
    judge = digits.DigitsJudge(torch.randn(50, 1024, dtype=torch.float64), ByGreyLevel())
    images = judge.start()
    images.add_pixels(range(100, 112), pixels[:12])
    images.add_pixels(range(112, 120), pixels[12:])
    numbers = judge.finish(images).numbers
    assert numbers['read as asked'] == pytest.approx(19 / 20)
    assert numbers['broken'] == pytest.approx(1 / 20)
    assert [numbers[digits.class_title(k)] for k in range(10)] == [1, 1, 1, 0.5, *[1] * 6]


def test_the_command_keeps_what_it_has_measured(tmp_path, monkeypatch):
    data, outdir = tmp_path / 'digits.zip', tmp_path / 'out'
    made = CliRunner().invoke(dataset_tool.main, ['--source=mnist-5k', f'--dest={data}'])
    assert made.exit_code == 0, made.output
    untrained = dc.make_classifier().eval(), torch.ones(10, 50, dtype=torch.bool)  # it is quicker
    monkeypatch.setattr(dc, 'fit_judge', lambda data: untrained)
    options = [f'--data={data}', f'--outdir={outdir}', '--num=50', '--sets=2', '--evaluations=2', '--samplers=rk']
    options += ['--device=cpu', '--pictures=1', '--by-class']
    first = CliRunner().invoke(digits.main, options)
    assert first.exit_code == 0, first.output
    rows = [json.loads(line) for line in (outdir / 'results.jsonl').read_text().splitlines()]
    assert [(of['sampler'], of['first_seed'], of['num_steps']) for of, _ in rows] == [('rk', 0, 2), ('rk', 50, 2)]
    frechet = [result['numbers']['Fréchet distance'] for _, result in rows]
    assert f'| rk | 2 | 2 | 0 | **{report.spread(frechet)}** | ' in first.stdout
    assert '| held-out | 100% | 100%' in first.stdout
    assert '| rk, 2 steps | ' in first.stdout
    monkeypatch.setattr(run, 'sample_and_judge', None)  # nothing is drawn again
    assert CliRunner().invoke(digits.main, options).stdout == first.stdout


def test_the_digits_are_those_of_generate(tmp_path, monkeypatch):
    """Seed k has the class k mod 10, as with `generate.py --class=0-9`."""
    net = networks.open_network(str(networks.SHIPPED_NETWORK), torch.device('cpu'))
    seen = []
    monkeypatch.setattr(digits.SampledDigits, 'add_pixels', lambda self, seeds, pixels: seen.append(pixels))
    judge = SimpleNamespace(start=digits.SampledDigits, finish=lambda images: Verdict({}, '', []))
    cells.sample_and_judge(
        net,
        cells.Cell('rk', (('rho', 7),), 2, 2),
        range(20, 24),
        4,
        judge,
        torch.device('cpu'),
        int,
        class_idx=range(10),
    )
    command = [
        f'--outdir={tmp_path}',
        '--seeds=20-23',
        '--class=0-9',
        '--sampler=rk',
        '--steps=2',
        '--rho=7',
        '--device=cpu',
    ]
    made = CliRunner().invoke(generate.main, command)
    assert made.exit_code == 0, made.output
    for seed, pixels in zip(range(20, 24), seen[0], strict=True):
        with PIL.Image.open(tmp_path / f'{seed:06d}.png') as image:
            assert np.array_equal(np.asarray(image), pixels[..., 0])
