"""Which sampler suits a network best, for the work that it costs?

Every combination of sampler, number of steps, rho and noise is a cell. All cells sample the same seeds from the same
network, exactly as generate.py does; a cell has its distances to the reference statistics, one for each set of seeds,
the network evaluations that were counted, and the seconds that were measured. OUTDIR gets

    results.jsonl   a line for each cell and set, once it is done; what is in it is not computed again
    pictures/       the images of the first seeds, a strip for each cell
    report.html     tables, plots and pictures in one file, written anew after each set
"""

from pathlib import Path

import click

import dnnlib
from comparison import command, report
from comparison.cells import Cell
from comparison.run import Comparison, content_hash
from dnnlib.options import user_path
from images.image_files import ImageFiles, holds_images
from images.tree import FileTree
from metrics import measure
from metrics.judge import Judge
from sampling import networks
from torch_utils import distributed as dist
from torch_utils.errors import one_line_errors

HELP = """Compare samplers on one network: distances with error bars, evaluations, seconds and pictures.

The same command again goes on where it was stopped. Markdown tables go to stdout, OUTDIR/report.html has all.

\b
# The shipped network, four samplers, three budgets
python compare.py --ref=datasets/mnist-32x32.zip --detector=efficientnet-lite0 --num=500 \\
    --samplers=heun,taylor,rk,k-diffusion-dpmpp_2m_sde --evaluations=8,16,32

\b
# A network of your own: which rho, how much noise?
python compare.py --network=my.pkl --ref=fid-refs/my-dataset.npz --num=5000 \\
    --samplers=taylor --steps=20,40 --rho=3,7 --eta=0,0.5,1
"""


@click.command(help=HELP, context_settings={'show_default': True, 'max_content_width': 120})
@click.option(
    '--ref',
    help='Reference statistics or real images, as for fid.py',
    metavar='NPZ|URL|DIR|ZIP',
    type=user_path,
    required=True,
)
@click.option('--metrics', help=f'Some of {",".join(measure.METRICS)}', metavar='LIST', default='fid')
@click.option(
    '--detector', help='Features, as for fid.py', metavar='NAME', type=user_path, show_default='that of --ref'
)
@click.option(
    '--outdir', help='Where results, pictures and the report go', metavar='DIR', type=user_path, default='out/compare'
)
@command.comparison_options
@click.pass_context
def main(context, **kwargs):
    report.need_packages('the report', 'compare', 'matplotlib', 'jinja2')
    opts = dnnlib.EasyDict(kwargs)
    command.check_options(context, opts)
    with one_line_errors():
        cells = command.make_cells(opts)
        metrics = measure.parse_metrics(opts.metrics)
        check_ref(opts.ref)
        if opts.dry_run:
            click.echo(command.cells_table(cells, opts.num * opts.sets))
            return
        comparison = make_comparison(opts, cells, metrics)
        command.carry_out(comparison, opts, command.command_line(context, 'compare.py'))


def make_comparison(opts: dnnlib.EasyDict, cells: list[Cell], metrics: list[str]) -> Comparison:
    """What the options ask for, with the network loaded."""
    device = dist.init(opts.device)
    real = ImageFiles([opts.ref]) if holds_images(opts.ref) else None
    net = networks.open_network(opts.network, device, opts.trust_pickle)
    networks.check_network(net, None)
    hashes = {option: content_hash(option, opts[option]) for option in ('network', 'ref')}
    return Comparison(
        net=net,
        judge=Judge(metrics, opts.ref, opts.detector, device, real),
        cells=cells,
        outdir=Path(opts.outdir),
        identity={**hashes, 'detector': opts.detector, 'metrics': metrics, 'num': opts.num},
        batch=opts.batch,
        device=device,
        **{name: opts[name] for name in ('num', 'sets', 'shown')},
    )


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


if __name__ == '__main__':
    dnnlib.util.print_any_text()
    main()
