"""benchmarks/plots.py: fitted rates, and what a diagram shows."""

import math
import sys

import click.testing
import PIL.Image
import pytest

from benchmarks import gaussian_fd, plots

WORK = [8, 16, 32]


def test_rate_of_a_power_law():
    assert plots.fitted_rate(WORK, [3 * n**-1.5 for n in WORK]) == pytest.approx(1.5)


def test_rate_is_the_least_squares_slope_of_the_logarithms():
    """Halved and then quartered: slopes 1 and 2 over equal distances."""
    assert plots.fitted_rate(WORK, [1, 1 / 2, 1 / 8]) == pytest.approx(1.5)


def test_results_that_are_no_numbers_do_not_count():
    assert plots.fitted_rate(WORK, [math.nan, 1 / 2, 1 / 8]) == pytest.approx(2)
    assert math.isnan(plots.fitted_rate(WORK, [math.nan, math.nan, 1 / 8]))


def test_a_diagram_has_a_panel_for_each_axis_and_rates_in_the_legend(tmp_path, monkeypatch):
    pyplot = pytest.importorskip('matplotlib.pyplot')
    figures = []
    monkeypatch.setattr(pyplot, 'close', figures.append)
    lines = {'rk': (WORK, [n**-2.0 for n in WORK]), 'heun': (WORK, [n**-1.0 for n in WORK])}
    seconds = {name: ([n / 7 for n in work], errors) for name, (work, errors) in lines.items()}
    panels = [plots.Panel('digits', 'network evaluations', lines), plots.Panel('digits', 'seconds per image', seconds)]
    plots.draw(str(tmp_path / 'plot.png'), panels, 'error')
    [figure] = figures
    assert [ax.get_xlabel() for ax in figure.axes] == ['network evaluations', 'seconds per image']
    ticks = [[label.get_text() for label in ax.get_xticklabels()] for ax in figure.axes]
    assert ticks[0] == ['8', '16', '32']
    assert not any('.' in tick for tick in ticks[1])
    for ax in figure.axes:
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ['rk: 2.0', 'heun: 1.0']
        ours, theirs = ax.get_lines()
        assert ours.get_linewidth() > theirs.get_linewidth()
    with PIL.Image.open(tmp_path / 'plot.png') as image:
        assert image.width > image.height


def test_without_matplotlib_it_says_so_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setattr(gaussian_fd, 'table', None)
    result = click.testing.CliRunner().invoke(gaussian_fd.main, ['--plot=plot.png'])
    assert result.exit_code == 1
    assert result.output == 'Error: --plot needs matplotlib: pip install -e ".[plot]"\n'
