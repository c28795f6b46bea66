"""What a comparison of samplers shows: best per budget, plots, pictures, all numbers, as Markdown and as one page.

The page is report.html.j2, filled in. It needs nothing besides itself: plots are inline SVG, pictures `data:` URIs,
and no script runs. Colours are variables of its style sheet, the plots' too, so it follows the reader's light or dark
scheme.
"""

import base64
import html
import importlib
import io
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click

import dnnlib

TEMPLATE = Path(__file__).with_name('report.html.j2')


def need_packages(purpose: str, extra: str, *packages: str) -> None:
    """Raise click.ClickException if one of them is missing; `extra` of pyproject.toml brings them."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            raise click.ClickException(f'{purpose} needs {name}: pip install -e ".[{extra}]"') from None


# ----------------------------------------------------------------------------
# What is reported.


@dataclass
class Row:
    """One cell: a sampler with its settings, and what was measured of it, a value for each set of seeds.

    group: the budget or number of steps that was asked for; strip: PNG of the images of the first seeds, top to bottom.
    """

    label: str
    group: int
    num_steps: int
    calls: int
    jvp_calls: int
    numbers: dict[str, list[float]]
    seconds: list[float]
    strip: bytes

    @property
    def cost(self) -> int:
        """Evaluations, where one with a JVP counts as two."""
        return self.calls + self.jvp_calls

    def picture(self) -> str:
        """The strip as a `data:` URI."""
        return f'data:image/png;base64,{base64.b64encode(self.strip).decode()}'


@dataclass
class Report:
    """group_name: what `Row.group` counts; budgets: costs, ascending; facts: name → text, for the last section."""

    title: str
    group_name: str
    budgets: list[int]
    num: int
    sets: int
    shown: int
    command: str
    facts: dict[str, str]
    seconds_title: str
    rows: list[Row] = field(default_factory=list)
    fd_title: str = ''
    warnings: list[str] = field(default_factory=list)

    def metrics(self) -> list[str]:
        """Names of the numbers; KID's own error estimate is none, nor what is of one class only."""
        names = unique(name for row in self.rows for name in row.numbers)
        return [name for name in names if not name.endswith('_error') and ', class ' not in name]

    def metric_title(self, name: str) -> str:
        return {'fid': self.fd_title, 'kid': 'KID', 'swd': 'Sliced Wasserstein'}.get(name, name)

    def larger_is_better(self, name: str) -> bool:
        return name in LARGER_IS_BETTER

    def column_titles(self) -> list[str]:
        """Of the table of all cells."""
        metrics = map(self.metric_title, self.metrics())
        return ['sampler', 'steps', 'evaluations', 'with a JVP', *metrics, self.seconds_title]

    def groups(self) -> list[tuple[int, list[Row]]]:
        """The rows of each budget or number of steps."""
        found = dict.fromkeys(row.group for row in self.rows)
        return [(group, [row for row in self.rows if row.group == group]) for group in found]

    def affordable(self, budget: int) -> list[Row]:
        return [row for row in self.rows if row.cost <= budget]

    def is_best(self, row: Row, metric: str) -> bool:
        """Whether nothing that its budget pays for is told apart from it as better."""
        budget = min((budget for budget in self.budgets if row.cost <= budget), default=self.budgets[-1])
        return row in best(self.affordable(budget), metric)

    def best_by_budget(self, metric: str) -> list[tuple[int, int, list[Row]]]:
        """(smallest, largest budget, the best and its equals); neighbouring budgets with the same answer are one."""
        found: list[tuple[int, int, list[Row]]] = []
        for budget in self.budgets:
            rows = best(self.affordable(budget), metric)
            if found and found[-1][2] == rows:
                found[-1] = (found[-1][0], budget, rows)
            elif rows:
                found.append((budget, budget, rows))
        return found

    def best_lines(self, metric: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """For each answer of `best_by_budget`: the budgets, and lines of a name and a value."""
        for first, last, rows in self.best_by_budget(metric):
            lines = [(f'{row.label}, {row.num_steps} steps', str(spread(row.numbers[metric]))) for row in rows]
            if len(lines) > SHOWN_EQUALS:
                lines[SHOWN_EQUALS - 1 :] = [(f'and {len(lines) - SHOWN_EQUALS + 1} more', '')]
            yield str(first) if first == last else f'{first} to {last}', lines

    def legend(self) -> list[tuple[str, int, str]]:
        """(label, number of its colour, marker) of each series."""
        looks = [(label, *look(index)) for index, label in enumerate(unique(row.label for row in self.rows))]
        return [(label, colour, MARKERS[marker]) for label, colour, marker, _ in looks]

    def done(self) -> tuple[int, int]:
        """(measured, planned) sets of all cells."""
        return sum(len(row.seconds) for row in self.rows), len(self.rows) * self.sets

    def notes(self) -> list[str]:
        """What a reader should know first."""
        measured, planned = self.done()
        state = [] if measured == planned else [f'In progress: {measured} of {planned} measurements are in.']
        return [*state, *self.warnings]


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


# ----------------------------------------------------------------------------
# Statistics.

LARGER_IS_BETTER = {'precision', 'recall', 'density', 'coverage', 'read as asked'}
SHOWN_EQUALS = 5  # of those not told apart from the best


class Spread(NamedTuple):
    mean: float
    sd: float  # nan for one value

    def __str__(self) -> str:
        """'12.34 ± 0.56': two digits of the standard deviation; where it has none, four of the mean."""
        if math.isnan(self.sd):
            return f'{self.mean:.4g}'
        if self.sd == 0:
            return f'{self.mean:.4g} ± 0'
        decimals = max(1 - math.floor(math.log10(self.sd)), 0)
        return f'{self.mean:.{decimals}f} ± {self.sd:.{decimals}f}'


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (n − 1)."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


def best(rows: Sequence[Row], metric: str) -> list[Row]:
    """The row with the best mean, and after it those not told apart from it, the better first.

    Two rows are told apart if their intervals mean ± sd do not overlap. One set has no sd, and tells nothing apart.
    """
    sign = -1 if metric in LARGER_IS_BETTER else 1
    known = [(spread(row.numbers[metric]), row) for row in rows if metric in row.numbers]
    known.sort(key=lambda pair: sign * pair[0].mean)
    if not known:
        return []
    first = known[0][0]
    # Written so that a comparison with nan, which is false, leaves the row in.
    return [row for each, row in known if not abs(each.mean - first.mean) > each.sd + first.sd]


# ----------------------------------------------------------------------------
# Markdown.


def markdown(report: Report) -> str:
    """The table of all cells; in bold what nothing affordable is better than."""
    titles = report.column_titles()
    lines = ['| ' + ' | '.join(titles) + ' |', '|---' * len(titles) + '|']
    for row in sorted(report.rows, key=lambda row: row.group):
        values = [
            f'**{spread(row.numbers[name])}**' if report.is_best(row, name) else str(spread(row.numbers[name]))
            for name in report.metrics()
            if name in row.numbers
        ]
        counts = [row.label, str(row.num_steps), str(row.calls), str(row.jvp_calls)]
        lines.append('| ' + ' | '.join([*counts, *values, str(spread(row.seconds))]) + ' |')
    return '\n'.join(lines)


# ----------------------------------------------------------------------------
# Plots.

MARKERS = {'o': '●', 's': '■', '^': '▲', 'D': '◆', 'v': '▼', 'P': '✚', 'X': '✖', '*': '★'}
INK, SERIES = '#00ff00', [f'#00ff0{i}' for i in range(1, 9)]  # stand-ins that `_inline` turns into variables


def look(index: int) -> tuple[int, str, str]:
    """(colour, marker, line) of a series; after eight, the colours come again, dashed and with other markers."""
    colour, again = index % 8, index // 8
    return colour, list(MARKERS)[(colour + 3 * again) % 8], ['-', '--', ':'][again % 3]


def work_precision(report: Report, metric: str, over: str) -> str:
    """Inline SVG: a metric over 'evaluations' or 'seconds', a line with error bars for each series."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {'svg.fonttype': 'none', 'svg.hashsalt': 'compare', 'font.size': 12, 'axes.edgecolor': INK}
    style |= {'text.color': INK, 'axes.labelcolor': INK, 'xtick.color': INK, 'ytick.color': INK, 'grid.color': INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.9), layout='constrained')
        axes = figure.add_subplot()
        for index, label in enumerate(unique(row.label for row in report.rows)):
            colour, marker, line = look(index)
            rows = [row for row in report.rows if row.label == label and metric in row.numbers]
            rows.sort(key=lambda row: row.cost)
            y = [spread(row.numbers[metric]) for row in rows]
            x = [spread(row.seconds) if over == 'seconds' else Spread(row.cost, math.nan) for row in rows]
            axes.errorbar(
                [each.mean for each in x], [each.mean for each in y],
                xerr=[_bar(each) for each in x], yerr=[_bar(each) for each in y],
                color=SERIES[colour], marker=marker, linestyle=line, markersize=6, linewidth=1.6, capsize=3,
            )  # fmt: skip
        costs = {'seconds': report.seconds_title, 'evaluations': 'network evaluations (with a JVP: 2)'}
        axes.set(xlabel=costs[over], ylabel=report.metric_title(metric), xscale='log')
        values = [spread(row.numbers[metric]).mean for row in report.rows if metric in row.numbers]
        if metric not in LARGER_IS_BETTER and all(value > 0 for value in values):
            axes.set_yscale('log')
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        if over == 'evaluations' and len(report.budgets) <= 8:
            axes.set_xticks(report.budgets)
        axes.grid(alpha=0.15)
        axes.spines[['top', 'right']].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format='svg', transparent=True)
    return _inline(file.getvalue(), f'{report.metric_title(metric)} over {costs[over]}; the numbers are in the table')


def _bar(each: Spread) -> float:
    return 0 if math.isnan(each.sd) else each.sd


def _plain_ticks(axis) -> None:
    """Numbers like 0.02 and 50 instead of powers of ten."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    if axis.get_scale() == 'log':
        wide = ticker.LogLocator(subs=(1, 2, 5), numticks=20)
        axis.set_major_locator(wide if high > 8 * low else ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:g}'))


def _inline(svg: str, description: str) -> str:
    """An SVG file as part of a page: without its head, its metadata and its ids of groups, colours by variables."""
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg') :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', '<g', svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    svg = svg[svg.index('>') + 1 :]
    for index, colour in enumerate(SERIES):
        svg = svg.replace(colour, f'var(--series-{index})')
    svg = svg.replace(INK, 'currentColor')
    return f'<svg {view_box[0]} role="img" aria-label="{html.escape(description)}">{svg}'


# ----------------------------------------------------------------------------
# The page.


def write(report: Report, path: str | os.PathLike) -> None:
    """Write the page; it appears whole or not at all."""
    with dnnlib.util.atomic_write(path) as file:
        file.write(page(report).encode())


def page(report: Report) -> str:
    """The template with what it asks for; whatever users write is text in it."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    measured, metrics = report.done()[0], report.metrics()
    plots = [work_precision(report, metric, over) for metric in metrics for over in ('evaluations', 'seconds')]
    return environment.from_string(TEMPLATE.read_text(encoding='utf-8')).render(
        report=report,
        measured=measured,
        metrics=metrics,
        heads=report.column_titles(),
        spread=spread,
        plots=[Markup(plot) for plot in plots],
    )
