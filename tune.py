"""Find the noise levels that suit a network when steps are few.

The network's loss is measured at 24 noise levels, on 64 images that it draws itself. From this curve follow the levels
for any number of steps (sampling/levels.py). It is kept beside the network, where generate.py, compare.py and
example.py find it.
"""

import click
from tqdm import tqdm

import dnnlib
from dnnlib.options import NewFile, user_path
from sampling import levels, networks
from torch_utils import distributed as dist
from torch_utils.errors import one_line_errors

SHOWN = (6, 8, 12)  # numbers of steps whose levels are printed


# ruff: noqa: E501 – options stand in a table, one per line
# fmt: off
@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network',      help='Network file', metavar='NAME|PATH|URL', type=user_path, default=str(networks.SHIPPED_NETWORK), show_default='the shipped MNIST network')
@click.option('--dest',         help='Where the curve goes', metavar='JSON', type=NewFile('.json'), show_default='NETWORK.levels.json, beside the network')
@click.option('--seed',         help='Of the images and the noise', metavar='INT', type=click.IntRange(min=0), default=0)
@click.option('--device',       help='cuda, mps or cpu', metavar='NAME', show_default='the first there is')
@click.option('--trust-pickle', help='Run the code inside the network file', is_flag=True)
def main(network, dest, seed, device, trust_pickle):
    """Measure the loss curve of a network, a minute on a CPU, and print the levels that follow from it.

    \b
    python tune.py --network=my.pkl          # writes my.pkl.levels.json
    python generate.py --network=my.pkl --sampler=rk --steps=8 --outdir=out
    """
    if dest is None and dnnlib.util.is_remote(network):
        raise click.UsageError(f'--network={network} is on a server; say with --dest where the curve goes')
    with one_line_errors():
        net = networks.open_network(network, dist.init(device), trust_pickle)
        with tqdm(total=levels.NUM_LEVELS + levels.START_STEPS, unit='step') as bar:
            curve = levels.measure_curve(net, seed=seed, progress=bar.update)
        path = dest or levels.beside(network)
        curve.save(path, made_from=f'{levels.NUM_IMAGES} images of the network, seeds from {seed}')
    for steps in SHOWN:
        print(f'--steps={steps}: ' + ' '.join(f'{sigma:.3g}' for sigma in curve.levels(steps)))
    print(f'Saved {path}')

# fmt: on


if __name__ == '__main__':
    dnnlib.util.print_any_text()
    main()
