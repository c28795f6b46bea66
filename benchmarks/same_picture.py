"""Does one seed keep its picture as the number of steps grows? With --noise=path it should; with fresh noise, not."""

import os
import sys

import click
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from dnnlib import options
from images.pictures import enlarge, tile, to_pil
from sampling import choose, draw, networks

STEPS = (10, 20, 40, 80, 160)
ON_A_PATH = [name for name, row in choose.samplers().items() if row.path]


def pictures(net, seeds, noise, sampler, steps, **options):
    """uint8 [seeds, H, W, C]"""
    chosen = choose.make(sampler, num_steps=steps, **options)
    (result,) = draw.generate_images(net, [seeds], chosen, torch.device('cpu'), noise=noise)
    return result[1]


def distances(columns):
    """Root mean square distance of each column of pictures to the last, in grey levels."""
    last = columns[-1].astype(float)
    return [float(np.sqrt(np.mean((column - last) ** 2))) for column in columns[:-1]]


def side_by_side(columns):
    """A row for each seed, a column for each number of steps."""
    rows = np.stack(columns, axis=1)
    return to_pil(tile(enlarge(rows.reshape(-1, *rows.shape[2:])), len(columns)))


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', help='Network pickle', metavar='PATH|URL', default=str(networks.SHIPPED_NETWORK))
@click.option('--seeds', help='One per row', metavar='LIST', default='0-7')
@click.option('--sampler', type=click.Choice(ON_A_PATH), default='rk')
@click.option('--rho', help='Time step exponent', metavar='FLOAT', type=float, default=7)
@click.option('--sheet', help='Where the pictures go', metavar='FILE.png', default='docs/noise-path.png')
def main(network, seeds, sampler, rho, sheet):
    """Print the distance of the pictures at 10, 20, 40 and 80 steps to those at 160, and save all of them.

    \b
    python benchmarks/same_picture.py
    """
    net = networks.open_network(network, torch.device('cpu'))
    seeds = options.parse_int_list(seeds)
    print('| noise | ' + ' | '.join(f'{n} steps' for n in STEPS[:-1]) + ' |')
    print('|---' * len(STEPS) + '|')
    for noise in ('fresh', 'path'):
        columns = [pictures(net, seeds, noise, sampler, steps, rho=rho) for steps in STEPS]
        print(f'| {noise} | ' + ' | '.join(f'{d:.1f}' for d in distances(columns)) + ' |', flush=True)
    side_by_side(columns).save(sheet)


if __name__ == '__main__':
    main()
