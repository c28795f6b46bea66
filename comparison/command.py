"""The command line of every comparison: options, the cells that they make, and what is printed."""

import itertools
import math
import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import click

import dnnlib
from comparison import peers, report
from comparison.cells import Cell, affordable_steps, count_work, ours
from comparison.run import Comparison
from dnnlib.options import ListOf, at_least_one, non_negative, positive, user_path
from sampling import levels, networks, run_record

BUDGETS = [8, 16, 32]
OLD_WORDS = {'db': 'heun', 'ddb': 'taylor'}


class SamplerName(click.ParamType):
    name = 'name'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in peers.PEERS and value not in peers.installed():
            self.fail(f'{value} is not installed: {peers.INSTALL}', param, ctx)
        if value in OLD_WORDS:
            self.fail(f"{value!r} is the forks' word for {OLD_WORDS[value]!r}; use that", param, ctx)
        names = [*ours(), *peers.installed()]
        if value not in names:
            self.fail(f'{value!r} is none of {", ".join(names)}', param, ctx)
        return value


class LevelsName(levels.Levels):
    """'own', 'edm', or a file of a curve → the word, or (the file's name, a `LossCurve`)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ('own', 'edm') or not isinstance(value, str):
            return value
        curve = super().convert(value, param, ctx)
        if not isinstance(curve, levels.LossCurve):
            self.fail(f'{value!r} is neither own nor edm nor a file of tune.py', param, ctx)
        return os.path.basename(value), curve


# ruff: noqa: E501 – options stand in a table, one per line
# fmt: off
OPTIONS = [
    click.option('--network', help='Network file, as for generate.py', metavar='NAME|PATH|URL', type=user_path, default=str(networks.SHIPPED_NETWORK), show_default='the shipped MNIST network'),
    click.option('--samplers', help=f'Some of {", ".join([*ours(), *peers.PEERS])}', metavar='LIST', type=ListOf(SamplerName()), default='heun,taylor,rk'),
    click.option('--evaluations', help='Budgets: each sampler makes the steps that they pay for; a JVP costs one more', metavar='LIST', type=ListOf(click.IntRange(min=2)), show_default=','.join(map(str, BUDGETS))),
    click.option('--steps', help='The same steps for all instead, whatever they cost', metavar='LIST', type=ListOf(at_least_one)),
    click.option('--levels', help='Noise levels: own (rk: as in generate.py; others: edm), edm, or files of tune.py', metavar='LIST', type=ListOf(LevelsName()), default='own'),
    click.option('--rho', help='Time step exponents, instead of --levels', metavar='LIST', type=ListOf(positive)),
    click.option('--sigma_min', help='With --rho: lowest noise levels', metavar='LIST', type=ListOf(positive), show_default='0.002'),
    click.option('--eta', help='rk, taylor, euler: amounts of noise', metavar='LIST', type=ListOf(non_negative), default='1'),
    click.option('--S_churn', 'S_churn', help='heun: amounts of noise', metavar='LIST', type=ListOf(non_negative), default='0'),
    click.option('--S_min', 'S_min', help='Ours: lowest noise level with noise added', metavar='FLOAT', type=non_negative, show_default='0'),
    click.option('--S_max', 'S_max', help='Ours: highest noise levels with noise added', metavar='LIST', type=ListOf(non_negative), default='inf'),
    click.option('--S_noise', 'S_noise', help='Ours: factor on the noise', metavar='FLOAT', type=positive, show_default='1'),
    click.option('--num', help='Images in a set', metavar='INT', type=click.IntRange(min=2), default=1000),
    click.option('--sets', help='Sets of seeds; error bars are their spread', metavar='INT', type=at_least_one, default=3),
    click.option('--pictures', 'shown', help='Seeds whose images are shown', metavar='INT', type=at_least_one, default=8),
    click.option('--batch', help='Maximum batch size', metavar='INT', type=at_least_one, default=64),
    click.option('--device', help='cuda, mps or cpu', metavar='NAME', show_default='the first there is'),
    click.option('--trust-pickle', help='Run the code inside the network file', is_flag=True),
    click.option('--dry-run', help='Print the cells and what they cost, then stop', is_flag=True),
]
# fmt: on


def comparison_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command the `OPTIONS`."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def check_options(context: click.Context, opts: dnnlib.EasyDict) -> None:
    """Raise click.UsageError for options that would be without effect, or do not go together."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise click.UsageError('a comparison is one process; run it without torchrun')
    if opts.rho is not None and opts.levels != ['own']:
        raise click.UsageError('--rho and --levels exclude each other')
    if opts.sigma_min is not None and opts.rho is None:
        raise click.UsageError('--sigma_min needs --rho')
    if opts.steps is not None and opts.evaluations is not None:
        raise click.UsageError('--steps=N fixes the steps and --evaluations=N what they cost; give one of them')
    peer = next((name for name in opts.samplers if name in peers.PEERS), None)
    if 1 in (opts.steps or []) and peer is not None:
        raise click.UsageError(f'--steps=1: {peer} needs two steps')
    given = [name for name in opts if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT]
    dials = {name: row.dials[0] for name, row in ours().items()}
    for option in ('eta', 'S_churn'):
        owners = [name for name, dial in dials.items() if dial == option]
        if option in given and not set(owners) & set(opts.samplers):
            text = f'--{option} is for {", ".join(owners)}; --samplers={",".join(opts.samplers)} has none'
            raise click.UsageError(text)
    amounts = [amount for name in opts.samplers if name in dials for amount in opts[dials[name]]]
    for option in ('S_min', 'S_max', 'S_noise'):
        if option in given and not any(amounts):
            raise click.UsageError(f'--{option} needs noise: a sampler of ours with --eta or --S_churn above 0')


def make_cells(opts: dnnlib.EasyDict) -> list[Cell]:
    """One for each combination of the samplers, their dials (rho, eta or S_churn, S_max) and the budgets or steps.

    Raises:
        click.UsageError: evaluations that do not pay for two steps.
    """
    cells = []
    for name in opts.samplers:
        for where, noise, group in itertools.product(levels_of(name, opts), noises(name, opts), groups(opts)):
            settings = tuple((where.settings | noise).items())
            num_steps = group if opts.steps is not None else affordable_steps(name, settings, group)
            sigmas = None if where.curve is None else tuple(where.curve.levels(num_steps))
            cells.append(Cell(name, settings, num_steps, group, sigmas, where.title))
    return cells


class Where(NamedTuple):
    """Which noise levels: those of the settings, or of a curve; and what they are called."""

    settings: dict[str, float]
    curve: levels.LossCurve | None = None
    title: str = ''


def levels_of(sampler: str, opts: dnnlib.EasyDict) -> list[Where]:
    """The noise levels that --levels or --rho ask for."""
    edm = Where({'rho': 7.0}, title='EDM levels')
    if opts.rho is not None:
        pairs = itertools.product(opts.rho, opts.sigma_min or [None])
        return [Where({'rho': rho} | ({'sigma_min': low} if low else {})) for rho, low in pairs]
    found = []
    for each in opts.levels:
        if isinstance(each, tuple):
            found.append(Where({}, each[1], f'levels of {each[0]}'))
        elif each == 'own' and sampler == 'rk':
            path = levels.beside(opts.network)
            found.append(Where({}, levels.read_curve(path) if os.path.isfile(path) else None, 'own levels'))
        else:
            found.append(edm)
    return list({each.title: each for each in found}.values())


def groups(opts: dnnlib.EasyDict) -> list[int]:
    """The steps or else the budgets that were asked for, ascending."""
    return sorted(opts.steps or opts.evaluations or BUDGETS)


def noises(sampler: str, opts: dnnlib.EasyDict) -> list[dict[str, float]]:
    """The settings of the sampler's noise, as the options say: one for each amount and S_max."""
    if sampler not in ours():
        return [{}]
    [option], found = ours()[sampler].dials, []
    for amount, S_max in itertools.product(opts[option], opts.S_max):
        given = {'S_min': opts.S_min, 'S_max': S_max if S_max < math.inf else None, 'S_noise': opts.S_noise}
        window = {name: value for name, value in given.items() if value is not None and amount > 0}
        found.append({option: amount} | window)
    return [noise for i, noise in enumerate(found) if noise not in found[:i]]


def cells_table(cells: Sequence[Cell], images: int) -> str:
    """Markdown: what each cell would do, and what all cost."""
    lines = ['| sampler | settings | steps | evaluations | with a JVP |', '|---|---|---|---|---|']
    total = 0
    for cell in cells:
        calls, jvp_calls = count_work(cell)
        total += (calls + jvp_calls) * images
        told = [f'{name} {value:g}' for name, value in cell.settings]
        settings = ', '.join(told if 'rho' in dict(cell.settings) else [*told, cell.levels])
        lines.append(f'| {cell.sampler} | {settings} | {cell.num_steps} | {calls} | {jvp_calls} |')
    return '\n'.join([*lines, '', f'{len(cells)} cells of {images} images: {total:,} evaluations'])


def carry_out(comparison: Comparison, opts: dnnlib.EasyDict, command: str) -> None:
    """Run it; the table goes to stdout, and where the report is to stderr.

    Raises:
        ValueError: the levels of `rk` belong to another network.
    """
    own = next((cell for cell in comparison.cells if cell.sampler == 'rk' and cell.levels == 'own levels'), None)
    if own is not None and own.sigmas is not None:
        path = levels.beside(opts.network)
        if levels.read_curve(path).network != run_record.fingerprint(comparison.net):
            raise ValueError(f'{path} belongs to another network; tune.py makes one for this, or use --levels=edm')
        click.echo(f'rk: noise levels from {path}', err=True)
    by_evaluations, cells = opts.steps is None, comparison.cells
    frame = report.Report(
        title=f'Samplers on {os.path.basename(opts.network)}',
        group_name='evaluations' if by_evaluations else 'steps',
        budgets=groups(opts) if by_evaluations else sorted({sum(count_work(cell)) for cell in cells}),
        seconds_title=f'{"CPU " * (comparison.device.type == "cpu")}seconds per image',
        command=command,
        facts=comparison.facts(),
        num=comparison.num,
        sets=comparison.sets,
        shown=comparison.shown,
    )
    click.echo(report.markdown(comparison.run(frame)))
    click.echo(f'Report in {(comparison.outdir / "report.html").absolute()}', err=True)


def command_line(context: click.Context, script: str) -> str:
    """The command that was given, for a shell."""
    words = ['python', script]
    for param in context.command.params:
        value = context.params[param.name or '']
        if context.get_parameter_source(param.name or '') is click.core.ParameterSource.DEFAULT:
            continue
        text = ','.join(map(_plain, value)) if isinstance(value, list) else _plain(value)
        words.append(param.opts[0] if value is True else f'{param.opts[0]}={text}')
    return shlex.join(words)


def _plain(value: object) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)
