"""Which sampler suits a network best, for the work that it costs?

Every combination of sampler, number of steps, rho and noise is a cell. All cells sample the same seeds from the same
network, exactly as generate.py does; a cell has its distances to the reference statistics, one for each set of seeds,
the network evaluations that were counted, and the seconds that were measured. OUTDIR gets

    results.jsonl   a line for each cell and set, once it is done; what is in it is not computed again
    pictures/       the images of the first seeds, a strip for each cell
    report.html     tables, plots and pictures in one file (report.py), written anew after each set
"""

import bisect
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import pooch
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import dnnlib
import fid
import generate
import sampler_2nd
from benchmarks import peers, plots, report
from benchmarks.clock import clock_for
from benchmarks.record import Record
from images import pictures
from images.image_files import ImageFiles, holds_images
from images.tree import FileTree
from metrics import measure
from sampling import draw, networks
from torch_utils import distributed as dist

# ----------------------------------------------------------------------------
# Samplers: name → function of (num_steps, rho and the sampler's noise option), which returns what
# generate.py's `choose_sampler` does: sampler(net, latents, class_labels, randn_like) → images.

PACKAGES = ('k-diffusion', 'diffusers', 'torchsde')
BUDGETS = [8, 16, 32]
NOISE_OPTION = {'db': 'S_churn', 'euler': 'eta', 'taylor': 'eta', 'rk': 'eta'}  # whose noise has a dial
DEFAULTS = {'rho': 7, 'eta': 1, 'S_churn': 0}


def our_sampler(randn_like: str, scheme: dict[str, str], **settings: Any) -> Callable[..., torch.Tensor]:
    return generate.choose_sampler(randn_like, {**scheme, **settings})


def peer_sampler(peer: peers.Sampler, num_steps: int, rho: float) -> Callable[..., torch.Tensor]:
    """A peer between the same noise levels as ours, with the random numbers of the seeds."""

    @torch.no_grad()
    def sampler(net, latents, class_labels=None, randn_like=torch.randn_like):
        sigmas = sampler_2nd.noise_levels(net, num_steps, sigma_min=0.002, sigma_max=80, rho=rho)
        network = sampler_2nd.Denoiser(net, class_labels)
        x = latents.to(sampler_2nd.state_dtype(latents.device)) * sigmas[0]

        def denoise(x, sigma):
            return network(x, torch.as_tensor(sigma).reshape(-1)[0])

        return peer.run(denoise, x, sigmas, SeededNoise(x, randn_like))

    return sampler


class SeededNoise(peers.Columns):
    """Fresh normals, and Brownian motion, made of the random numbers of the seeds."""

    def __init__(self, x: torch.Tensor, randn_like: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__(count=1, dim=1)
        self._eye = self._eye.to(x)  # Brownian motion starts at 0 times this
        self._x, self._randn_like = x, randn_like

    def fresh(self, *_: Any) -> torch.Tensor:
        return self._randn_like(self._x)


OURS = {'db': partial(our_sampler, 'db', {})}
OURS |= {name: partial(our_sampler, 'ddb', {'scheme': name}) for name in sampler_2nd.SCHEMES}
PEERS = {name.replace(' ', '-'): partial(peer_sampler, peer) for name, peer in peers.PEERS.items() if name[:3] != 'EDM'}
INSTALLED = {name.replace(' ', '-') for name in peers.available(peers.PEERS)}
SAMPLERS = OURS | {name: sampler for name, sampler in PEERS.items() if name in INSTALLED}


# ----------------------------------------------------------------------------
# Cells.


@dataclass(frozen=True)
class Cell:
    """A sampler with all of its settings. `group`: the budget or the number of steps that was asked for."""

    sampler: str
    settings: tuple[tuple[str, float], ...]
    num_steps: int
    group: int

    def make(self) -> Callable[..., torch.Tensor]:
        """The sampler; ValueError from it if it diverges, where to_uint8 would make arbitrary pixels of it."""
        sampler = SAMPLERS[self.sampler](num_steps=self.num_steps, **dict(self.settings))

        def checked(*args, **kwargs):
            images = sampler(*args, **kwargs)
            if not torch.isfinite(images).all():
                raise ValueError(f'{self.sampler} with {self.num_steps} steps diverged: its images are not finite')
            return images

        return checked

    def identity(self) -> dict[str, Any]:
        settings = {**dict(self.settings), 'num_steps': self.num_steps}
        return {'sampler': self.sampler, 'version of the samplers': draw.IMAGE_VERSION, **settings}

    def label(self, varied: set[str]) -> str:
        """The sampler's name, and those settings that are unusual or differ between cells."""
        told = [f'{name} {value:g}' for name, value in self.settings if name in varied or value != DEFAULTS.get(name)]
        return ', '.join([self.sampler, *told])


def make_cells(opts: dnnlib.EasyDict, groups: Sequence[int], by_evaluations: bool) -> list[Cell]:
    """One for each combination of the samplers, their dials (rho, eta or S_churn, S_max) and the groups.

    Raises:
        click.UsageError: evaluations that do not pay for two steps.
    """
    cells = []
    for name in opts.samplers:
        for rho, noise, group in itertools.product(opts.rho, noises(name, opts), groups):
            settings = tuple(({'rho': rho} | noise).items())
            num_steps = affordable_steps(name, settings, group) if by_evaluations else group
            cells.append(Cell(name, settings, num_steps, group))
    return cells


def noises(sampler: str, opts: dnnlib.EasyDict) -> list[dict[str, float]]:
    """The settings of the sampler's noise, as the options say: one for each amount and S_max."""
    if sampler not in NOISE_OPTION:
        return [{}]
    option, found = NOISE_OPTION[sampler], []
    for amount, S_max in itertools.product(opts[option], opts.S_max):
        given = {'S_min': opts.S_min, 'S_max': S_max if S_max < math.inf else None, 'S_noise': opts.S_noise}
        window = {name: value for name, value in given.items() if value is not None and amount > 0}
        found.append({option: amount} | window)
    return [noise for i, noise in enumerate(found) if noise not in found[:i]]


def affordable_steps(sampler: str, settings: tuple[tuple[str, float], ...], evaluations: int) -> int:
    """The most steps, two at least, that so many evaluations pay for; a JVP counts as one more."""

    def cost(num_steps: int) -> int:
        return sum(count_work(Cell(sampler, settings, num_steps, evaluations)))

    num_steps = 1 + bisect.bisect_right(range(2, evaluations + 1), evaluations, key=cost)
    if num_steps < 2:
        raise click.UsageError(f'--evaluations={evaluations}: two steps of {sampler} cost {cost(2)}')
    return num_steps


@cache
def count_work(cell: Cell) -> tuple[int, int]:
    """(evaluations, how many of them with a JVP) of the sampler, counted on images of one pixel."""
    net = sampler_2nd.CountCalls(OnePixel())
    cell.make()(net, torch.zeros([1, 1, 1, 1]), randn_like=torch.zeros_like)
    return net.calls, net.jvp_calls


class OnePixel:
    """The exact denoiser of a standard normal pixel."""

    def __call__(self, x, sigma, class_labels=None):
        return x / (1 + sigma**2)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


# ----------------------------------------------------------------------------
# Measuring a cell.


class Judge:
    """The distances to the reference. It is opened when it is first needed: all may be in the record already."""

    def __init__(self, metrics: Sequence[str], ref: str, detector: str | None, device: torch.device):
        self.metrics, self._ref, self._detector, self._device = metrics, ref, detector, device

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        keep = measure.needs_features(self.metrics)
        real = ImageFiles([self._ref]) if holds_images(self._ref) else None
        reference, detector = fid.open_reference(self._ref, self._detector, self._device, real, keep=keep)
        measure.check_comparable(detector, reference, self.metrics)
        return reference, detector

    def start(self) -> measure.FeatureSet:
        return measure.FeatureSet(self._opened[1], self._device, keep=measure.needs_features(self.metrics))

    def finish(self, images: measure.FeatureSet) -> dict[str, Any]:
        images.finish()
        reference, detector = self._opened
        return {
            'numbers': measure.measure(images, reference, self.metrics),
            'title': detector.title,
            'warnings': measure.warnings(images, reference, self.metrics),
        }


class Measured(NamedTuple):
    """What is kept of a cell and a set. seconds: per image; machine: what they were measured on."""

    numbers: dict[str, float]
    title: str
    warnings: list[str]
    calls: int
    jvp_calls: int
    seconds: float
    machine: str


def measure_cell(
    net: Any,
    cell: Cell,
    seeds: Sequence[int],
    batch: int,
    judge: Judge,
    device: torch.device,
    progress: Callable[[int], Any],
) -> Measured:
    """Sample the seeds and measure them. Only sampling is timed, after one image that warms up.

    On a CPU it is the processor time of all threads that counts: other programs disturb it less.
    """
    clock = clock_for(device)
    batches, sampler = draw.split_seeds(seeds, batch), cell.make()
    images = judge.start()
    list(draw.generate_images(net, [seeds[:1]], sampler, device))
    counted = sampler_2nd.CountCalls(net)
    seconds, start = 0.0, clock()
    for batch_seeds, pixels in draw.generate_images(counted, batches, sampler, device):
        seconds += clock() - start
        images.add(batch_seeds, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        progress(len(batch_seeds))
        start = clock()
    return Measured(
        **judge.finish(images),
        calls=counted.calls // len(batches),
        jvp_calls=counted.jvp_calls // len(batches),
        seconds=seconds / len(seeds),
        machine=machine(device, batch),
    )


def machine(device: torch.device, batch: int) -> str:
    """What decides the seconds."""
    if device.type == 'cuda':
        return f'{torch.cuda.get_device_name(device)}, batches of {batch}'
    threads = torch.get_num_threads()
    return f'{processor()} ({device}), {threads} thread{"s" * (threads > 1)} of {os.cpu_count()}, batches of {batch}'


def processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return (names or [platform.processor() or platform.machine()])[0]


# ----------------------------------------------------------------------------
# All cells, all sets.


@dataclass
class Comparison:
    """A grid of cells, of which each has `sets` sets of `num` seeds: set k has the seeds k·num … (k + 1)·num − 1.

    identity: what all results are of (network, reference, metrics, num); shown: how many seeds have their images shown.
    """

    net: Any
    judge: Judge
    cells: Sequence[Cell]
    outdir: Path
    identity: dict[str, Any]
    num: int
    sets: int
    batch: int
    shown: int
    device: torch.device

    def __post_init__(self):
        self._record = Record(self.outdir / 'results.jsonl')

    def draw_strips(self) -> None:
        """Save the first images of each cell, one above the other; every cell runs, so errors come at once."""
        missing = [cell for cell in self.cells if not self._strip(cell).exists()]
        for cell in tqdm(missing, desc='Pictures', unit='cell', disable=not missing):
            [(_, images)] = draw.generate_images(self.net, [range(self.shown)], cell.make(), self.device)
            self._strip(cell).parent.mkdir(parents=True, exist_ok=True)
            pictures.save_png(pictures.tile(images, columns=1), self._strip(cell))

    def todo(self) -> dict[int, list[Cell]]:
        """set → the cells that are not in the record."""
        missing = {k: [cell for cell in self.cells if self._of(cell, k) not in self._record] for k in range(self.sets)}
        return {k: cells for k, cells in missing.items() if cells}

    def measure(self) -> Iterator[int]:
        """Measure what is to do, set by set; yields after each set, so that a report can be written."""
        todo = self.todo()
        total = self.num * sum(sum(count_work(cell)) for cells in todo.values() for cell in cells)
        with tqdm(total=total, unit='evaluation', unit_scale=True, disable=not total) as bar:
            for k, cells in todo.items():
                for cell in cells:
                    bar.set_description(f'Set {k + 1} of {self.sets}: {cell.sampler}, {cell.num_steps} steps')
                    self._measure(cell, k, bar)
                yield k

    def _measure(self, cell: Cell, k: int, bar: tqdm) -> None:
        cost, seeds = sum(count_work(cell)), range(k * self.num, (k + 1) * self.num)

        def compute() -> dict[str, Any]:
            arguments = self.net, cell, seeds, self.batch, self.judge, self.device
            return measure_cell(*arguments, progress=lambda images: bar.update(images * cost))._asdict()

        self._record.get(self._of(cell, k), compute)

    def rows(self) -> list[report.Row]:
        """What is known by now, a row for each cell."""
        values: dict[str, set[float]] = {}
        for name, value in (setting for cell in self.cells for setting in cell.settings):
            values.setdefault(name, set()).add(value)
        varied = {name for name, each in values.items() if len(each) > 1}
        return [self._row(cell, varied) for cell in self.cells]

    def _row(self, cell: Cell, varied: set[str]) -> report.Row:
        known = [self._of(cell, k) for k in range(self.sets) if self._of(cell, k) in self._record]
        sets = [Measured(**self._record.get(of, dict)) for of in known]
        calls, jvp_calls = (sets[0].calls, sets[0].jvp_calls) if sets else count_work(cell)
        return report.Row(
            label=cell.label(varied),
            group=cell.group,
            num_steps=cell.num_steps,
            calls=calls,
            jvp_calls=jvp_calls,
            numbers={name: [each.numbers[name] for each in sets] for name in (sets[0].numbers if sets else ())},
            seconds=[each.seconds for each in sets],
            strip=self._strip(cell).read_bytes(),
        )

    def known(self) -> list[Measured]:
        """All that is measured by now."""
        ofs = [self._of(cell, k) for cell in self.cells for k in range(self.sets)]
        return [Measured(**self._record.get(of, dict)) for of in ofs if of in self._record]

    def _of(self, cell: Cell, k: int) -> dict[str, Any]:
        return {**self.identity, **cell.identity(), 'first_seed': k * self.num}

    def _strip(self, cell: Cell) -> Path:
        of = {'network': self.identity['network'], **cell.identity(), 'shown': self.shown}
        digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]
        return self.outdir / 'pictures' / f'{cell.sampler}-{cell.num_steps}-{digest}.png'


def identify(option: str, path: str) -> str:
    """The SHA-256 of a file (or downloaded URL), or of all images of a folder."""
    if not os.path.isdir(path):
        try:
            return pooch.file_hash(dnnlib.util.open_url(path, return_filename=True), 'sha256')
        except (OSError, ValueError) as err:
            raise click.ClickException(f'--{option}: {err}') from None
    tree, digest = FileTree(path), hashlib.sha256()
    for name in tree.image_names():
        digest.update(hashlib.sha256(tree.read(name)).digest())
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# Command line.


class ListOf(click.ParamType):
    """Values of another type with commas between them; the same value twice counts once."""

    name = 'list'

    def __init__(self, each: click.ParamType):
        self._each = each

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        return list(dict.fromkeys(self._each.convert(text.strip(), param, ctx) for text in value.split(',')))


class SamplerName(click.ParamType):
    name = 'name'

    def convert(self, value, param, ctx):
        if value in PEERS and value not in SAMPLERS:
            self.fail(f'{value} is not installed: {peers.INSTALL}', param, ctx)
        if value not in SAMPLERS:
            self.fail(f'{value!r} is none of {", ".join(SAMPLERS)}', param, ctx)
        return value


positive, non_negative = click.FloatRange(min=0, min_open=True), click.FloatRange(min=0)


# ruff: noqa: E501 – options stand in a table, one per line
# fmt: off
@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', help='Network file, as for generate.py', metavar='NAME|PATH|URL', default=str(networks.SHIPPED_NETWORK), show_default='the shipped MNIST network')
@click.option('--ref', help='Reference statistics or real images, as for fid.py', metavar='NPZ|URL|DIR|ZIP', required=True)
@click.option('--outdir', help='Where results, pictures and the report go', metavar='DIR', default='out/compare')
@click.option('--samplers', help=f'Some of {", ".join(OURS | PEERS)}', metavar='LIST', type=ListOf(SamplerName()), default='db,taylor,rk')
@click.option('--evaluations', help='Budgets: each sampler makes the steps that they pay for; a JVP costs one more', metavar='LIST', type=ListOf(click.IntRange(min=2)), show_default='8,16,32')
@click.option('--steps', help='The same steps for all instead, whatever they cost', metavar='LIST', type=ListOf(click.IntRange(min=1)))
@click.option('--rho', help='Time step exponents', metavar='LIST', type=ListOf(positive), default='7')
@click.option('--eta', help='euler, taylor, rk: amounts of noise', metavar='LIST', type=ListOf(non_negative), default='1')
@click.option('--S_churn', 'S_churn', help='db: amounts of noise', metavar='LIST', type=ListOf(non_negative), default='0')
@click.option('--S_min', 'S_min', help='Ours: lowest noise level with noise added', metavar='FLOAT', type=non_negative, show_default='0')
@click.option('--S_max', 'S_max', help='Ours: highest noise levels with noise added', metavar='LIST', type=ListOf(non_negative), default='inf')
@click.option('--S_noise', 'S_noise', help='Ours: factor on the noise', metavar='FLOAT', type=positive, show_default='1')
@click.option('--num', help='Images in a set', metavar='INT', type=click.IntRange(min=2), default=1000)
@click.option('--sets', help='Sets of seeds; error bars are their spread', metavar='INT', type=click.IntRange(min=1), default=3)
@click.option('--metrics', help=f'Some of {",".join(measure.METRICS)}', metavar='LIST', default='fid')
@click.option('--detector', help='Features, as for fid.py', metavar='NAME', show_default='that of --ref')
@click.option('--pictures', 'shown', help='Seeds whose images are shown', metavar='INT', type=click.IntRange(min=1), default=8)
@click.option('--batch', help='Maximum batch size', metavar='INT', type=click.IntRange(min=1), default=64)
@click.option('--device', help='cuda, mps or cpu', metavar='NAME', show_default='the first there is')
@click.option('--trust-pickle', help='Run the code inside the network file', is_flag=True)
@click.option('--dry-run', help='Print the cells and what they cost, then stop', is_flag=True)
@click.pass_context
def main(context, **kwargs):
    # fmt: on
    """Compare samplers on one network: distances with error bars, evaluations, seconds and pictures.

    The same command again goes on where it was stopped. Markdown tables go to stdout, OUTDIR/report.html has all.

    \b
    # The shipped network, four samplers, three budgets
    python benchmarks/compare.py --ref=datasets/mnist-32x32.zip --detector=efficientnet-lite0 --num=500 \\
        --samplers=db,taylor,rk,k-diffusion-dpmpp_2m_sde --evaluations=8,16,32

    \b
    # A network of your own: which rho, how much noise?
    python benchmarks/compare.py --network=my.pkl --ref=fid-refs/my-dataset.npz --num=5000 \\
        --samplers=taylor --steps=20,40 --rho=3,7 --eta=0,0.5,1
    """
    plots.require_matplotlib('the report')
    opts = dnnlib.EasyDict(kwargs)
    check_options(context, opts)
    by_evaluations = opts.steps is None
    groups = sorted(opts.steps or opts.evaluations or BUDGETS)
    with fid.one_line_errors():
        cells = make_cells(opts, groups, by_evaluations)
        metrics = measure.parse_metrics(opts.metrics)
        check_ref(opts.ref)
        if opts.dry_run:
            click.echo(cells_table(cells, opts.num * opts.sets))
            return
        device = dist.init(opts.device)
        judge = Judge(metrics, opts.ref, opts.detector, device)
        net = networks.open_network(opts.network, device, opts.trust_pickle)
        networks.check_network(net, None)
        identity = {option: identify(option, opts[option]) for option in ('network', 'ref')}
        identity |= {'detector': opts.detector, 'metrics': judge.metrics, 'num': opts.num}
        sizes = {name: opts[name] for name in ('num', 'sets', 'shown')}
        outdir = Path(opts.outdir)
        comparison = Comparison(net, judge, cells, outdir, identity, batch=opts.batch, device=device, **sizes)
        frame = report.Report(
            title=f'Samplers on {os.path.basename(opts.network)}',
            group_name='evaluations' if by_evaluations else 'steps',
            budgets=groups if by_evaluations else sorted({sum(count_work(cell)) for cell in cells}),
            seconds_title=f'{"CPU " * (device.type == "cpu")}seconds per image',
            command=command_line(context),
            facts=facts(net, identity, opts.samplers),
            **sizes,
        )
        if comparison.todo():
            judge.start()  # what is wrong with it is said before the work
        comparison.draw_strips()
        done = write_report(comparison, frame)
        for _ in comparison.measure():
            done = write_report(comparison, frame)
    click.echo(report.markdown(done))
    click.echo(f'Report in {(outdir / "report.html").absolute()}', err=True)


def check_options(context: click.Context, opts: dnnlib.EasyDict) -> None:
    """Raise click.UsageError for options that would be without effect, or do not go together."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise click.UsageError('compare.py is one process; run it without torchrun')
    if opts.steps is not None and opts.evaluations is not None:
        raise click.UsageError('--steps=N fixes the steps and --evaluations=N what they cost; give one of them')
    peer = next((name for name in opts.samplers if name not in OURS), None)
    if 1 in (opts.steps or []) and peer is not None:
        raise click.UsageError(f'--steps=1: {peer} needs two steps')
    given = [name for name in opts if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT]
    for option in ('eta', 'S_churn'):
        owners = [name for name, its in NOISE_OPTION.items() if its == option]
        if option in given and not set(owners) & set(opts.samplers):
            text = f'--{option} is for {", ".join(owners)}; --samplers={",".join(opts.samplers)} has none'
            raise click.UsageError(text)
    amounts = [amount for name in opts.samplers if name in NOISE_OPTION for amount in opts[NOISE_OPTION[name]]]
    for option in ('S_min', 'S_max', 'S_noise'):
        if option in given and not any(amounts):
            raise click.UsageError(f'--{option} needs noise: a sampler of ours with --eta or --S_churn above 0')


def check_ref(ref: str) -> None:
    """Raise ValueError where a file or folder cannot be a reference. What is on a server is not asked for yet."""
    try:
        if holds_images(ref):
            FileTree(ref).image_names()
        elif not dnnlib.util.is_remote(ref):
            measure.read_reference(ref)
    except FileNotFoundError as err:
        raise ValueError(f'--ref={ref}: {err.strerror}') from None
    except (OSError, ValueError) as err:
        raise ValueError(f'--ref: {err}') from None


def cells_table(cells: Sequence[Cell], images: int) -> str:
    """Markdown: what each cell would do, and what all cost."""
    lines = ['| sampler | settings | steps | evaluations | with a JVP |', '|---|---|---|---|---|']
    total = 0
    for cell in cells:
        calls, jvp_calls = count_work(cell)
        total += (calls + jvp_calls) * images
        settings = ', '.join(f'{name} {value:g}' for name, value in cell.settings)
        lines.append(f'| {cell.sampler} | {settings} | {cell.num_steps} | {calls} | {jvp_calls} |')
    return '\n'.join([*lines, '', f'{len(cells)} cells of {images} images: {total:,} evaluations'])


def command_line(context: click.Context) -> str:
    """The command that was given, for a shell."""
    words = ['python', 'benchmarks/compare.py']
    for param in context.command.params:
        value = context.params[param.name]
        if context.get_parameter_source(param.name) is click.core.ParameterSource.DEFAULT:
            continue
        text = ','.join(map(plain, value)) if isinstance(value, list) else plain(value)
        words.append(param.opts[0] if value is True else f'{param.opts[0]}={text}')
    return shlex.join(words)


def plain(value: object) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)


def facts(net: Any, identity: dict[str, Any], samplers: Sequence[str]) -> dict[str, str]:
    """What a reader needs besides the command."""
    parameters = sum(each.numel() for each in net.parameters())
    size = f'{net.img_resolution}×{net.img_resolution}, {net.img_channels} channel{"s" * (net.img_channels > 1)}'
    classes = f'{net.label_dim} classes' if net.label_dim else 'no classes'
    packages = ['torch', 'numpy', *(name for name in PACKAGES if any(each.startswith(name) for each in samplers))]
    return {
        'Network': f'{type(net).__name__}, {parameters / 1e6:.2f} M parameters, {size}, {classes}',
        'Its SHA-256': identity['network'],
        'Reference’s SHA-256': identity['ref'],
        'Versions': ', '.join(f'{name} {importlib.metadata.version(name)}' for name in packages),
        'Date': datetime.now().astimezone().isoformat(' ', 'minutes'),
    }


def write_report(comparison: Comparison, frame: report.Report) -> report.Report:
    """Fill the frame with what is known by now, and write OUTDIR/report.html."""
    known = comparison.known()
    machines = report.unique(each.machine for each in known)
    warnings = report.unique(text for each in known for text in each.warnings)
    if len(machines) > 1:
        warnings.append('The seconds are of different machines or batches (below): compare evaluations only.')
    titles = report.unique(each.title for each in known)
    done = replace(frame, rows=comparison.rows(), warnings=warnings, fd_title=', '.join(titles))
    done.facts = {**frame.facts, 'Seconds': '; '.join(machines)}
    report.write(done, comparison.outdir / 'report.html')
    return done


if __name__ == '__main__':
    main()
