"""Work–precision diagrams: error over work on logarithmic axes, a line for each sampler, its rate in the legend."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.solvers import RIVALS
from comparison.report import need_packages


class Panel(NamedTuple):
    title: str
    xlabel: str
    lines: dict[str, tuple[Sequence[float], Sequence[float]]]  # sampler → (work, errors)


def fitted_rate(work: Sequence[float], errors: Sequence[float]) -> float:
    """p of error ∝ work^−p, by least squares in the logarithms; nan for fewer than two points.

    Errors that are not numbers, where the work paid for no result, do not count.
    """
    points = np.array([(math.log(n), math.log(e)) for n, e in zip(work, errors, strict=True) if math.isfinite(e)])
    if len(points) < 2:
        return math.nan
    return -float(np.polyfit(*points.T, deg=1)[0])


def option(shows: str) -> Callable[..., Any]:
    """--plot, as `plot_path`. That matplotlib is missing is said before the work."""

    def check(_context: click.Context, _param: click.Parameter, path: str | None) -> str | None:
        if path is not None:
            need_packages('--plot', 'plot', 'matplotlib')
        return path

    return click.option('--plot', 'plot_path', help=f'Also draw {shows}', metavar='FILE.png', callback=check)


def draw(path: str, panels: Sequence[Panel], ylabel: str, rows: int = 1, ylim: tuple[float, float] | None = None):
    """Ours thick, peers thin. The panels fill column after column."""
    import matplotlib.pyplot as plt

    columns = len(panels) // rows
    size = (5 * columns, 5.8 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout='constrained')
    for ax, panel in zip(axes.T.flat, panels, strict=True):
        peer_styles = itertools.cycle(itertools.product(['-', '--', ':'], ('C1', 'C2', 'C4', 'C5', 'C6', 'C8')))
        for name, (work, errors) in panel.lines.items():
            if name not in RIVALS:
                style = {'linewidth': 3, 'color': 'C3' if 'rk' in name else 'C0', 'zorder': 3}
            else:
                linestyle, color = next(peer_styles)
                style = {'linewidth': 1.2, 'linestyle': linestyle, 'color': color, 'marker': '.'}
            ax.loglog(work, errors, label=f'{name}: {fitted_rate(work, errors):.1f}', **style)
        ax.set(title=panel.title, xlabel=panel.xlabel, ylim=ylim)
        ticks = sorted({n for work, _ in panel.lines.values() for n in work})
        if all(isinstance(n, int) for n in ticks):  # evaluations, not seconds
            ax.set_xticks(ticks, labels=map(str, ticks))
            ax.minorticks_off()
        ax.grid(alpha=0.3)
        below = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.13), 'ncols': 2}
        ax.legend(title='sampler: fitted rate', fontsize=8, title_fontsize=8, frameon=False, **below)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    fig.savefig(path, dpi=90)
    plt.close(fig)
