"""benchmarks/digits.py: its measures in closed form, and the command at a size that takes seconds."""

import json

import pytest
import torch
from click.testing import CliRunner

import dataset_tool
from benchmarks import digits
from benchmarks import digits_classifier as dc


@pytest.fixture
def judge():
    real = torch.randn(500, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return digits.Judge(real, classifier=None)


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


def test_the_command_keeps_what_it_has_measured(tmp_path, monkeypatch):
    data, results = tmp_path / 'digits.zip', tmp_path / 'digits.jsonl'
    made = CliRunner().invoke(dataset_tool.main, ['--source=mnist-5k', f'--dest={data}'])
    assert made.exit_code == 0, made.output
    monkeypatch.setattr(dc, 'fit_judge', lambda data: (dc.make_classifier(), None))  # untrained: it is quicker
    options = [f'--data={data}', f'--results={results}', '--num=50', '--sets=2', '--evaluations=2', '--sampler=ddb rk']
    first = CliRunner().invoke(digits.main, options)
    assert first.exit_code == 0, first.output
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [of['seed'] for of, _ in rows] == [0, 1]
    assert {of['evaluations'] for of, _ in rows} == {2}
    frechet = torch.tensor([result['frechet'] for _, result in rows])
    assert f'| ddb rk | {frechet.mean():.2f} ± {frechet.std():.2f} / ' in first.output
    monkeypatch.setattr(digits, 'sample', None)  # nothing is drawn again
    assert CliRunner().invoke(digits.main, options).output == first.output


def test_cell_gives_the_spread_over_sets():
    one, other = digits.Result(0.5, 0.01, 0.98, 0.2), digits.Result(0.7, 0.03, 0.99, 0.4)
    assert digits.cell([one]) == '0.50 / 0.0100 / 98.0% / 0.200 s'
    assert digits.cell([one, other]) == '0.60 ± 0.14 / 0.0200 ± 0.0141 / 98.5% ± 0.7% / 0.300 s'
