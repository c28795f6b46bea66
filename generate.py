"""Generate images with a diffusion model: seeds → PNG files, or an archive of them.

The command line, and the run behind it: `run` draws the batches that are missing in the output folder, by all
processes, which is why the same command continues a run that was killed. Samplers are in sampling/choose.py and
sampler_2nd.py, seeds become images in sampling/draw.py, images become files in sampling/output.py.
"""

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TextIO

import click
import numpy as np
import torch

import dnnlib
import sampler_2nd
from dnnlib import options
from dnnlib.options import ClassList, IntList, NewFile, at_least_one, non_negative, positive, user_path
from images import pictures
from images.files import own_files
from metrics import measure
from metrics.judge import Judge, Verdict
from sampling import choose, draw, edm, levels, networks
from sampling.output import FORMATS, FirstImages, Output
from sampling.progress import progress_bar
from torch_utils import distributed as dist
from torch_utils.errors import out_of_memory_line
from torch_utils.interrupts import Interrupts

GRID_IMAGES, TRAJECTORY_IMAGES, TRAJECTORY_COLUMNS = 100, 8, 10


def __getattr__(name: str) -> Any:
    """What version 0.1 defined here, for those who import it; it goes with version 0.3."""
    name = {'load_network': 'open_network', 'Networks': 'LoadedNetworks'}.get(name, name)
    for room in (draw, edm, networks, options):
        if hasattr(room, name):
            return getattr(room, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


class Stopped(Exception):  # noqa: N818 (no error)
    """A signal has ended the run; the message is its name."""


def run(opts: dnnlib.EasyDict, loaded: networks.LoadedNetworks, sampler: partial, output: Output | None) -> None:
    """Draw the batches that are not there, and then make of all images what was asked for."""
    device = loaded.device
    for pair in draw.repeated_streams(opts.seeds):
        dist.print0(
            f'Warning: seeds are taken modulo 2^32, as in EDM: {pair[0]} and {pair[1]} have the same random numbers'
        )
    if output is not None:
        output.check(opts.seeds)
    judge = Judge(measure.parse_metrics(opts.metrics), opts.ref, opts.detector, device) if opts.metrics else None
    judged = judge.start() if judge else None
    first = FirstImages(opts.seeds, GRID_IMAGES if opts.grid is not None else 0)
    batches = draw.split_seeds(opts.seeds, opts.max_batch_size)
    todo = batches if output is None else [batch for batch in batches if not output.finished.issuperset(batch)]

    start = time.perf_counter()
    if output is not None:
        kept = [batch for batch in batches if output.finished.issuperset(batch)]
        wanted = set(opts.seeds) if judged is not None else set(first.seeds)
        for batch in dist.my_share(kept):
            if not wanted.isdisjoint(batch):
                give(batch, output.read(batch), judged, first)
    for seeds, images in draw_missing(opts, loaded.net, todo, sampler, device, output):
        give(seeds, images, judged, first)
    dist.barrier()
    report(opts, loaded, todo, time.perf_counter() - start, device)

    if output is not None:
        class_net = loaded.net if opts.vectors is None else None  # archives hold classes, and no vectors
        classes = partial(draw.classes_of, class_net, batches, device, opts.class_idx)
        dist.on_rank0(partial(output.assemble, opts.seeds, classes))
        dist.print0(f'Saved in {os.path.abspath(output.path)}')
    if judge is not None and judged is not None:
        print_verdict(judge.finish(judged), opts.numbers_to)
    save_pictures(opts, loaded.net, first, sampler, device)


def open_output(opts: dnnlib.EasyDict, loaded: networks.LoadedNetworks, sampler: partial) -> Output | None:
    """Where the images go, with all that they depend on: a run with other settings may not add to them."""
    if opts.outdir is None:
        return None
    settings = {
        **loaded.settings,
        'version of the samplers': draw.IMAGE_VERSION,
        'sampler': opts.sampler,
        **choose.options_in_effect(sampler, opts.guidance),
        'noise': opts.noise,
        'class': 'random' if opts.class_idx is None else opts.class_idx,
        'labels': None if opts.vectors is None else hashlib.sha256(opts.vectors.tobytes()).hexdigest()[:16],
        'batch': opts.max_batch_size,
        'format': opts.format,
        'subdirs': opts.subdirs,
    }
    note = {'network': opts.network_pkl, 'gnet': opts.gnet, 'torch': torch.__version__}
    return Output(opts.outdir, settings, note, opts.format, opts.subdirs, opts.overwrite)


def give(seeds: Sequence[int], images: np.ndarray, judged: measure.FeatureSet | None, first: FirstImages) -> None:
    first.add(seeds, images)
    if judged:
        judged.add_pixels(seeds, images)


def print_verdict(verdict: Verdict, numbers_to: TextIO) -> None:
    for text in verdict.warnings:
        dist.print0(f'Warning: {text}')
    for name, value in verdict.numbers.items():
        dist.print0(f'{name} {value:g}', file=numbers_to)


def draw_missing(
    opts: dnnlib.EasyDict,
    net: Any,
    todo: list[list[int]],
    sampler: partial,
    device: torch.device,
    output: Output | None,
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """`generate_images` for this rank's share of the batches, into `output`, with a progress bar.

    Raises:
        Stopped: SIGINT or SIGTERM came; what was drawn before is on disk.
    """
    mine = dist.my_share(todo)
    with (
        contextlib.nullcontext() if output is None else contextlib.closing(output),
        Interrupts() as interrupts,
        progress_bar(len(opts.seeds), sum(map(len, todo)), len(mine) * opts.num_steps) as step_done,
    ):

        def callback(*_: Any) -> None:
            step_done()
            if interrupts.received is not None:
                raise Stopped(interrupts.received)

        watched = partial(sampler, callback=callback)
        labels = opts.class_idx, opts.noise, opts.vectors
        for seeds, images in draw.generate_images(net, mine, watched, device, *labels):
            yield seeds, images if output is None else output.add(seeds, images)
        if output is not None:
            output.start()  # for a rank without a batch


def report(
    opts: dnnlib.EasyDict,
    loaded: networks.LoadedNetworks,
    todo: list[list[int]],
    seconds: float,
    device: torch.device,
) -> None:
    drawn = sum(map(len, todo))
    before = len(opts.seeds) - drawn
    if not drawn:
        dist.print0(f'All {before} images were there already')
        return
    rest = f'; {before} were there already' if before else ''
    dist.print0(f'{drawn} images in {seconds:.1f} s ({drawn / seconds:.2f} images/s) on {device}{rest}')
    if dist.my_share(todo):
        dist.print0(loaded.work_done(opts.num_steps, len(dist.my_share(todo))))


def save_pictures(opts: dnnlib.EasyDict, net: Any, first: FirstImages, sampler: partial, device: torch.device) -> None:
    """The files of --grid and --trajectory. For the latter, rank 0 draws the first images once more."""
    shown = first.finish() if opts.grid is not None else None
    if dist.get_rank() != 0:
        return
    if shown is not None:
        pictures.save_png(pictures.grid(shown), opts.grid)
        print(f'The first {len(shown)} images are in {opts.grid}')
    if opts.trajectory is not None:
        seeds = opts.seeds[:TRAJECTORY_IMAGES]
        labels = {'class_idx': opts.class_idx, 'vectors': opts.vectors}
        frames = draw.denoised_frames(net, seeds, sampler, device, noise=opts.noise, **labels)
        if opts.trajectory.lower().endswith('.gif'):
            pictures.save_gif(frames, opts.trajectory)
        else:
            pictures.save_png(pictures.strip(frames, TRAJECTORY_COLUMNS), opts.trajectory)
        print(f'The denoised images of {len(frames)} steps, for the first {len(seeds)} seeds, are in {opts.trajectory}')


def explain(err: Exception, opts: dnnlib.EasyDict) -> str | None:
    """One line on what ended a run; None for an error that only its traceback explains."""
    if opts.compile_net and isinstance(err, torch._dynamo.exc.BackendCompilerFailed):
        return f'--compile: {dnnlib.util.one_line(err.inner_exception)}'
    if isinstance(err, RuntimeError) and dist.lost_peer(err):
        return (
            f'rank {dist.get_rank()} lost contact with another process of this run, which has ended or is '
            'unreachable; see what that one says. The images drawn are safe: the same command continues'
        )
    return out_of_memory_line(err)


def stopped_line(opts: dnnlib.EasyDict, signal_name: str) -> str:
    """What to tell whoever sent the signal."""
    launched = dist.get_world_size() > 1
    if opts.outdir is None:
        return f'Stopped by {signal_name}; nothing is kept without --outdir'
    there = sum(1 for path in own_files(opts.outdir) if path.endswith('.png')) if os.path.isdir(opts.outdir) else 0
    sender = ', which launchers send when another process has ended,' if launched and signal_name == 'SIGTERM' else ''
    return f'Stopped by {signal_name}{sender} with {there} images in {opts.outdir}; the same command continues'


# ----------------------------------------------------------------------------
# Command line.

HELP = f"""Generate images, one per seed.

\b
Samplers:
{chr(10).join(f'  {name:<9} {row.help}' for name, row in choose.samplers().items())}

\b
# 64 digits from the shipped network, second-order SDE sampler
python generate.py --outdir=out --sampler=rk --steps=40

\b
# EDM's CIFAR-10 network with EDM's own sampler: 18 steps, 35 evaluations
python generate.py --outdir=out --steps=18 \\
    --network=https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl

\b
# 50,000 images on two GPUs
torchrun --standalone --nproc_per_node=2 generate.py --outdir=out --seeds=0-49999 --batch=500 --subdirs \\
    --network=ckpts/edm-cifar10-32x32-cond-vp.pkl --sampler=rk --steps=40

\b
# Ten digits of each class as a dataset zip, and a picture of them: a column for each class
python generate.py --outdir=out/digits --format=zip --seeds=0-99 --class=0-9 --grid=out/digits.png

\b
# FID of 50,000 images that are never written
python generate.py --seeds=0-49999 --metrics=fid --network=ckpts/edm-cifar10-32x32-cond-vp.pkl \\
    --ref=https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz
"""


# fmt: off
@click.command(help=HELP, context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', 'network_pkl',    help='Network file', metavar='NAME|PATH|URL', type=user_path, default=str(networks.SHIPPED_NETWORK), show_default='the shipped MNIST network')
@click.option('--outdir',                    help='Where to save the images; a run there is continued', metavar='DIR', type=user_path)
@click.option('--seeds',                     help='Random seeds, one per image', metavar='LIST', type=IntList('seeds look like 0-63 or 1,2,5-10'), default='0-63')
@click.option('--subdirs',                   help='One subfolder per 1000 seeds', is_flag=True)
@click.option('--format',                    help='PNG files, or OUTDIR/images.npz or .zip (a dataset)', type=click.Choice(FORMATS), default='png')
@click.option('--overwrite',                 help='Delete the images in --outdir, and start anew', is_flag=True)
@click.option('--class', 'class_idx',        help='Class label, or several that the seeds take in turns', metavar='LIST', type=ClassList('classes look like 3, 0-9 or 1,5,7-9'), show_default='random')
@click.option('--labels',                    help='Label vectors, of a network trained on such: rows that the seeds take in turns', metavar='NPY', type=user_path)
@click.option('--batch', 'max_batch_size',   help='Maximum batch size of a process', metavar='INT', type=at_least_one, default=64)
@click.option('--metrics',                   help=f'Measure the images: some of {",".join(measure.METRICS)}', metavar='LIST')
@click.option('--ref',                       help='Reference statistics for --metrics, as for fid.py', metavar='NPZ|URL', type=user_path)
@click.option('--detector',                  help='Features for --metrics, as for fid.py', metavar='NAME', type=user_path, show_default='that of --ref')
@click.option('--grid',                      help=f'Picture of the first {GRID_IMAGES} images', metavar='PNG', type=NewFile('.png'))
@click.option('--trajectory',                help=f'Denoised images along the way, of the first {TRAJECTORY_IMAGES} seeds: strip or animation', metavar='PNG|GIF', type=NewFile('.png', '.gif'))
@click.option('--device',                    help='cuda, mps or cpu', metavar='NAME', show_default='the first there is')
@click.option('--trust-pickle',              help='Run the code inside the network file', is_flag=True)
@click.option('--dtype',                     help='Precision inside the network; the state stays float64', type=click.Choice(['fp32', 'fp16', 'bf16']), show_default="fp32, or the file's own on CUDA")
@click.option('--compile', 'compile_net',    help='Compile the network first, for minutes; not with --sampler=taylor', is_flag=True)
@click.option('--gnet',                      help='Guiding network: a worse or unconditional one', metavar='NAME|PATH|URL', type=user_path)
@click.option('--guidance',                  help='Strength G: D = D_gnet + G (D_net - D_gnet)', metavar='FLOAT', type=float, show_default='1, none')
@click.option('--sampler',                   help='Sampler (see above)', type=click.Choice(list(choose.samplers())), show_default='heun')
@click.option('--steps', 'num_steps',        help='Number of time steps', metavar='INT', type=at_least_one, default=18)
@click.option('--levels',                    help=levels.HELP, metavar='auto|edm|JSON|LIST', type=levels.Levels(), default='auto')
@click.option('--sigma_min',                 help='Lowest noise level', metavar='FLOAT', type=positive, show_default='by sampler and steps, 0.002')
@click.option('--sigma_max',                 help='Highest noise level', metavar='FLOAT', type=positive, show_default='by sampler, 80')
@click.option('--rho',                       help='Time step exponent', metavar='FLOAT', type=positive, show_default='by sampler and steps, 7')
@click.option('--noise',                     help='path = the same picture for any number of steps; not for heun', type=click.Choice(['fresh', 'path']), default='fresh')
@click.option('--S_min', 'S_min',            help='Lowest noise level with noise added', metavar='FLOAT', type=non_negative, show_default='0')
@click.option('--S_max', 'S_max',            help='Highest noise level with noise added', metavar='FLOAT', type=non_negative, show_default='inf')
@click.option('--S_noise', 'S_noise',        help='Factor on the noise', metavar='FLOAT', type=float, show_default='1')
@click.option('--S_churn', 'S_churn',        help='heun, ablation: amount of noise', metavar='FLOAT', type=non_negative, show_default='0')
@click.option('--eta',                       help='rk, taylor, euler: amount of noise; 0 = ODE, 1 = exact time reversal', metavar='FLOAT', type=non_negative, show_default='1, with guidance G^-1/2')
@click.option('--solver',                    help='ablation: ODE solver', type=click.Choice(edm.CHOICES['solver']))
@click.option('--disc', 'discretization',    help='ablation: time steps', type=click.Choice(edm.CHOICES['discretization']))
@click.option('--schedule',                  help='ablation: noise schedule σ(t)', type=click.Choice(edm.CHOICES['schedule']))
@click.option('--scaling',                   help='ablation: signal scaling s(t)', type=click.Choice(edm.CHOICES['scaling']))
@click.option('--randn_like',                help="The forks' spelling: db = heun, ddb = taylor", type=click.Choice(['db', 'ddb']))
@click.option('--scheme',                    help='With --randn_like=ddb: the sampler', type=click.Choice(list(sampler_2nd.SCHEMES)))
def main(**kwargs):
    opts = dnnlib.EasyDict(kwargs)
    options = {name: opts[name] for name in choose.OPTIONS}
    opts.sampler = choose.name_of(opts.sampler, opts.randn_like, opts.scheme, options)
    sampler = choose.make(opts.sampler, **options)
    check_options(opts)
    try:
        device = dist.init(opts.device)
        with dnnlib.util.alone_on_stdout() if opts.metrics else contextlib.nullcontext(sys.stdout) as opts.numbers_to:
            loaded = networks.LoadedNetworks(opts, device)
            sampler = levels.choose_levels(opts.levels, sampler, loaded.main.net, opts.network_pkl, opts.guidance)
            opts.vectors = None if opts.labels is None else networks.read_vectors(opts.labels, loaded.net.label_dim)
            with open_output(opts, loaded, sampler) or contextlib.nullcontext() as output:
                run(opts, loaded, sampler, output)
    except Stopped as stop:
        if dist.get_rank() == 0:
            click.echo(stopped_line(opts, str(stop)), err=True)
        raise SystemExit(128 + signal.Signals[str(stop)]) from None
    except dnnlib.util.FailedWriteError as err:
        raise click.ClickException(f'{err}; once this is mended, the same command continues') from None
    except (OSError, ValueError) as err:
        raise click.ClickException(dnnlib.util.printable(err)) from None
    except (RuntimeError, MemoryError) as err:
        message = explain(err, opts)
        if message is None:
            raise
        raise click.ClickException(message) from None

# fmt: on


def check_options(opts: dnnlib.EasyDict) -> None:
    """What can be said without a network. Raises click.UsageError."""
    chosen = choose.samplers()[opts.sampler]
    if opts.noise == 'path' and not chosen.path:
        raise click.UsageError(f'--noise=path is for the SDE samplers, such as --sampler=rk, not for {opts.sampler}')
    if opts.compile_net and chosen.jvp:
        raise click.UsageError(
            f'--compile does nothing for --sampler={opts.sampler}: PyTorch runs a compiled network uncompiled where it '
            'takes a JVP; use --sampler=rk'
        )
    if opts.outdir is None:
        for name, given in [('format', opts.format != 'png'), ('overwrite', opts.overwrite), ('subdirs', opts.subdirs)]:
            if given:
                raise click.UsageError(f'--{name} needs --outdir, the folder for the images')
        if all(opts[name] is None for name in ('metrics', 'grid', 'trajectory')):
            raise click.UsageError('--outdir is missing: the folder for the images')
    if opts.subdirs and opts.format != 'png':
        raise click.UsageError(f'--subdirs is for PNG files; --format={opts.format} is one file')
    if opts.format == 'npz' and max(opts.seeds) >= 2**63:
        raise click.UsageError(f'--seeds={max(opts.seeds)}: --format=npz holds seeds below 2^63')
    if (opts.metrics is None) != (opts.ref is None) or (opts.detector is not None and opts.ref is None):
        raise click.UsageError('--metrics and --ref go together (and --detector with them)')
    if opts.labels is not None and opts.class_idx is not None:
        raise click.UsageError('--labels and --class exclude each other')
    networks.check_guidance(opts.guidance, opts.gnet)


if __name__ == '__main__':
    dnnlib.util.print_any_text()
    main()
