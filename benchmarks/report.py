"""One HTML file that shows a comparison of samplers (compare.py): best per budget, plots, pictures, all numbers.

It needs nothing besides itself: plots are inline SVG, pictures `data:` URIs, and no script runs. Colours are variables
of the style sheet, the plots' too, so the page follows the reader's light or dark scheme.
"""

import base64
import html
import io
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import dnnlib

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
        """Names of the numbers; KID's own error estimate is none."""
        return unique(name for row in self.rows for name in row.numbers if not name.endswith('_error'))

    def metric_title(self, name: str) -> str:
        return {'fid': self.fd_title, 'kid': 'KID', 'swd': 'Sliced Wasserstein'}.get(name, name)

    def budget_of(self, row: Row) -> int:
        return min((budget for budget in self.budgets if row.cost <= budget), default=self.budgets[-1])

    def affordable(self, budget: int) -> list[Row]:
        return [row for row in self.rows if row.cost <= budget]

    def done(self) -> tuple[int, int]:
        """(measured, planned) sets of all cells."""
        return sum(len(row.seconds) for row in self.rows), len(self.rows) * self.sets


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


# ----------------------------------------------------------------------------
# Statistics.

LARGER_IS_BETTER = {'precision', 'recall', 'density', 'coverage'}
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
    metrics = report.metrics()
    titles = [report.metric_title(name) for name in metrics]
    lines = ['| ' + ' | '.join(['sampler', 'steps', 'evaluations', 'with a JVP', *titles, report.seconds_title]) + ' |']
    lines.append('|---' * (5 + len(metrics)) + '|')
    for row in sorted(report.rows, key=lambda row: row.group):
        values = [
            f'**{spread(row.numbers[name])}**' if is_best(report, row, name) else str(spread(row.numbers[name]))
            for name in row.numbers
            if name in metrics
        ]
        counts = [row.label, str(row.num_steps), str(row.calls), str(row.jvp_calls)]
        lines.append('| ' + ' | '.join([*counts, *values, str(spread(row.seconds))]) + ' |')
    return '\n'.join(lines)


def is_best(report: Report, row: Row, metric: str) -> bool:
    """Whether nothing that its budget pays for is told apart from it as better."""
    return row in best(report.affordable(report.budget_of(row)), metric)


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

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --text: #1c2024; --soft: #5c656e; --line: #d9dee3; --panel: #f5f7f9;
  --good: #dcf3e3; --good-text: #0c5a2a;
  --series-0: #1668b8; --series-1: #c4500f; --series-2: #15803d; --series-3: #8b3fb0;
  --series-4: #937000; --series-5: #c2255c; --series-6: #0b7f88; --series-7: #5f6872;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --text: #e4e8ec; --soft: #9aa5b0; --line: #343b42; --panel: #1d2226;
    --good: #123d22; --good-text: #8fe3ac;
    --series-0: #6cb2f5; --series-1: #ff9a5c; --series-2: #5fd08e; --series-3: #d09cf0;
    --series-4: #e0bd45; --series-5: #ff85ab; --series-6: #4fd0da; --series-7: #b4bdc6;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
.note { padding: .5rem .8rem; border-left: 4px solid var(--series-4); background: var(--panel); }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; padding: .3rem 0; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
.all td, .all thead th, .number { white-space: nowrap; }
thead th, .facts th, .group th { color: var(--soft); font-weight: 600; font-size: .9rem; }
tbody th { font-weight: 500; }
.group th { padding-top: 1rem; }
td.number, th.number { text-align: right; }
mark { padding: .05rem .4rem; border-radius: .3rem; background: var(--good); color: var(--good-text);
  font-weight: 600; display: inline-block; }
@media (max-width: 30rem) { table { font-size: .85rem; } th, td { padding-right: .4rem; } }
ul { list-style: none; margin: 0; padding: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: .5rem 0; font-size: .9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, max(20rem, 40%)), 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; }
.matrix th, .matrix td { border: 0; padding: 0 .25rem 0 0; }
.matrix th { font-size: .8rem; line-height: 1.2; vertical-align: bottom; padding-bottom: .3rem;
  overflow-wrap: anywhere; }
.matrix td { min-width: 3.2rem; width: 5rem; }
.beside { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.beside .scroll { max-width: 100%; }
.all tbody th { position: sticky; left: 0; min-width: 9rem; background: var(--page); }
.matrix img { display: block; width: 100%; image-rendering: pixelated; }
pre { padding: .8rem; overflow-x: auto; background: var(--panel); border-radius: .4rem; font-size: .85rem; }
.facts td { overflow-wrap: anywhere; }
"""


def write(report: Report, path: str | os.PathLike) -> None:
    """Write the page; it appears whole or not at all."""
    with dnnlib.util.atomic_write(path) as file:
        file.write(page(report).encode())


def page(report: Report) -> str:
    measured, planned = report.done()
    state = [] if measured == planned else [f'In progress: {measured} of {planned} measurements are in.']
    notes = ''.join(f'<p class="note">{html.escape(text)}</p>\n' for text in [*state, *report.warnings])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{html.escape(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{html.escape(report.title)}</h1>
<p class="soft">{html.escape(_summary(report))}</p>
{notes}</header>
{_section('Best for each budget', _best_tables(report)) if measured else ''}
{_section('Distance and work', _plots(report)) if measured else ''}
{_section('The same seeds', _pictures(report))}
{_section('All numbers', _all_numbers(report)) if measured else ''}
{_section('How this was made', _facts(report))}
</main>
</body>
</html>
"""


def _section(heading: str, content: str) -> str:
    return f'<section>\n<h2>{heading}</h2>\n{content}\n</section>'


def _summary(report: Report) -> str:
    images = f'{report.sets} × {report.num}' if report.sets > 1 else str(report.num)
    return (
        f'{len(report.rows)} combinations of sampler, settings and steps; {images} images of each, from the same seeds.'
    )


def _best_tables(report: Report) -> str:
    told = (
        f'± is the standard deviation over {report.sets} sets of seeds. Where intervals overlap, none is called best.'
    )
    if report.sets == 1:
        told = 'One set of seeds has no error bars, so nothing is called best; --sets=3 gives them.'
    if 'fid' in report.metrics():
        told += f' A Fréchet distance of {report.num} images is biased upward, nearly alike in all cells.'
    first, *others = [_best_table(report, metric) for metric in report.metrics()]
    more = f'<details><summary>The same by the other metrics</summary>{"".join(others)}</details>' if others else ''
    return f'<p class="soft">{told}</p>\n{first}{more}'


def _best_table(report: Report, metric: str) -> str:
    body = ''
    for first, last, rows in _best_by_budget(report, metric):
        lines = [(f'{row.label}, {row.num_steps} steps', str(spread(row.numbers[metric]))) for row in rows]
        if len(lines) > SHOWN_EQUALS:
            lines[SHOWN_EQUALS - 1 :] = [(f'and {len(lines) - SHOWN_EQUALS + 1} more', '')]
        for i, (name, value) in enumerate(lines):
            budget = str(first) if first == last else f'{first} to {last}'
            head = f'<th scope="rowgroup" rowspan="{len(lines)}">{budget}</th>' if i == 0 else ''
            name, value = (_marked(text, len(lines) == 1) for text in (name, value))
            body += f'<tr>{head}<td>{name}</td><td class="number">{value}</td></tr>'
    better = 'larger is better' if metric in LARGER_IS_BETTER else 'smaller is better'
    heads = '<th scope="col">evaluations</th><th scope="col">best</th><th scope="col" class="number">value</th>'
    return _table('budgets', f'{report.metric_title(metric)}; {better}', heads, body)


def _best_by_budget(report: Report, metric: str) -> list[tuple[int, int, list[Row]]]:
    """(smallest, largest budget, the best and its equals), where neighbouring budgets with the same answer are one."""
    found: list[tuple[int, int, list[Row]]] = []
    for budget in report.budgets:
        rows = best(report.affordable(budget), metric)
        if found and found[-1][2] == rows:
            found[-1] = (found[-1][0], budget, rows)
        elif rows:
            found.append((budget, budget, rows))
    return found


def _marked(text: str, mark: bool) -> str:
    return f'<mark>{html.escape(text)}</mark>' if mark else html.escape(text)


def _table(kind: str, caption: str, heads: str, body: str) -> str:
    """`heads`, `body`: HTML. The table scrolls on its own where the page is too narrow for it."""
    text = f'<caption>{html.escape(caption)}</caption>' if caption else ''
    body = body if body.startswith('<tbody>') else f'<tbody>{body}</tbody>'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption or kind)}">'
        f'<table class="{kind}">{text}<thead><tr>{heads}</tr></thead>{body}</table></div>\n'
    )


def _plots(report: Report) -> str:
    items = []
    for index, label in enumerate(unique(row.label for row in report.rows)):
        colour, marker, _ = look(index)
        glyph = f'<span style="color: var(--series-{colour})" aria-hidden="true">{MARKERS[marker]}</span>'
        items.append(f'<li>{glyph} {html.escape(label)}</li>')
    plots = [work_precision(report, metric, over) for metric in report.metrics() for over in ('evaluations', 'seconds')]
    return f'<ul class="legend">{"".join(items)}</ul>\n<div class="plots">{"".join(plots)}</div>'


def _pictures(report: Report) -> str:
    groups = dict.fromkeys(row.group for row in report.rows)
    tables = (_matrix(report, group, [row for row in report.rows if row.group == group]) for group in groups)
    return f'<div class="beside">{"".join(tables)}</div>'


def _matrix(report: Report, group: int, rows: Sequence[Row]) -> str:
    seeds = f'seeds 0 to {report.shown - 1}' if report.shown > 1 else 'seed 0'
    heads = ''.join(f'<th scope="col">{html.escape(row.label)}</th>' for row in rows)
    images = ''.join(
        f'<td><img alt="{html.escape(f"{row.label}, {row.num_steps} steps: {seeds}, top to bottom")}" '
        f'src="data:image/png;base64,{base64.b64encode(row.strip).decode()}"></td>'
        for row in rows
    )
    return _table('matrix', f'{group} {report.group_name}; {seeds}, top to bottom', heads, f'<tr>{images}</tr>')


def _all_numbers(report: Report) -> str:
    metrics = report.metrics()
    names = ['sampler', 'steps', 'evaluations', 'with a JVP', *map(report.metric_title, metrics), report.seconds_title]
    heads = ''.join(
        f'<th scope="col"{"" if name == "sampler" else " class=number"}>{html.escape(name)}</th>' for name in names
    )
    bodies = []
    for group in dict.fromkeys(row.group for row in report.rows):
        title = f'<tr class="group"><th scope="rowgroup" colspan="{len(names)}">{group} {report.group_name}</th></tr>'
        rows = [_numbers_row(report, row, metrics) for row in report.rows if row.group == group]
        bodies.append(f'<tbody>{title}{"".join(rows)}</tbody>')
    told = 'Marked: nothing within the same budget is better beyond the error bars. A JVP counts as an evaluation more.'
    return f'<p class="soft">{told}</p>' + _table('all', '', heads, ''.join(bodies))


def _numbers_row(report: Report, row: Row, metrics: Sequence[str]) -> str:
    cells = [str(row.num_steps), str(row.calls), str(row.jvp_calls)]
    for name in metrics:
        known = name in row.numbers
        cells.append(_marked(str(spread(row.numbers[name])), is_best(report, row, name)) if known else '–')
    cells.append(str(spread(row.seconds)) if row.seconds else '–')
    values = ''.join(f'<td class="number">{cell}</td>' for cell in cells)
    return f'<tr><th scope="row">{html.escape(row.label)}</th>{values}</tr>'


def _facts(report: Report) -> str:
    rows = ''.join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>'
        for name, text in report.facts.items()
    )
    return (
        f'<pre tabindex="0"><code>{html.escape(report.command)}</code></pre>\n'
        f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'
    )
