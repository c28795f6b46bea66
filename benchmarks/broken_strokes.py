"""At which noise level does a network of digits break strokes? Noise real digits to σ, sample down, count broken ones.

A digit is broken if it lies in more than one piece; of real ones few do. What a digit has kept at σ, the network cannot
break any more; so the level from which on the share rises is the one that the network does not master, and where
training should look (`train.py --P_mean --P_std`). All levels see the same digits and the same noise, those of the last
500, which neither the network nor anything else was fitted to.
"""

import os
import sys
from collections.abc import Iterable

import click
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from benchmarks import digits_classifier
from comparison.peers import Normals
from dnnlib.options import ListOf
from sampling import choose, draw, networks
from torch_utils.errors import one_line_errors

INK = 64  # a pixel brighter than this belongs to the digit
SPECK = 4  # pieces of fewer pixels are dust, not strokes


def is_broken(image: np.ndarray) -> bool:
    """Does the ink of a grayscale image [H, W] lie in more than one piece? Pixels touch at sides and corners."""
    try:
        from scipy import ndimage
    except ImportError:
        raise click.ClickException('counting pieces needs scipy: pip install -e ".[bench]"') from None
    pieces, count = ndimage.label(image > INK, structure=np.ones([3, 3]))
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    return int((sizes >= SPECK).sum()) > 1


def share_broken(images: Iterable[np.ndarray]) -> float:
    return float(np.mean([is_broken(image) for image in images]))


def resample(net, digits: digits_classifier.Digits, sigma: float, steps: int, batch: int) -> np.ndarray:
    """The digits with noise of standard deviation `sigma`, sampled down by `rk`: uint8 [N,32,32]."""
    parts = []
    sampler = choose.make('rk', num_steps=steps, sigma_max=sigma)
    onehots = torch.eye(digits_classifier.NUM_CLASSES)[digits.labels]
    for i, (images, labels) in enumerate(zip(digits.images.split(batch), onehots.split(batch), strict=True)):
        noise = Normals(i, images.shape)
        with torch.no_grad():
            x = sampler(net, noise(), labels, randn_like=noise, init=images.double() / 127.5 - 1)
        parts.append(draw.to_uint8(x)[..., 0])
    return np.concatenate(parts)


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', help='Network', metavar='PATH', default=str(networks.SHIPPED_NETWORK))
@click.option('--data', help='Real digits', metavar='ZIP', default='datasets/mnist-32x32.zip')
@click.option(
    '--sigma',
    'levels',
    help='Noise levels',
    metavar='LIST',
    type=ListOf(click.FloatRange(0.002, 80, min_open=True)),
    default='0.4,1.2,2,4,80',
)
@click.option('--steps', help='Steps from each of them', metavar='INT', type=click.IntRange(min=1), default=24)
@click.option('--batch', help='Digits at a time', metavar='INT', type=click.IntRange(min=1), default=100)
def main(network: str, data: str, levels: list[float], steps: int, batch: int) -> None:
    """Share of held-out digits that a network breaks when it samples them down from each noise level.

    \b
    python benchmarks/broken_strokes.py
    """
    with one_line_errors():
        _, digits = digits_classifier.load_digits(data)
        net = networks.open_network(network, torch.device('cpu'))
    before = np.array([is_broken(image) for image in digits.images[:, 0].numpy()])
    print(f'{"real":>8}  {before.mean():6.1%} in more than one piece')
    for level in levels:
        after = np.array([is_broken(image) for image in resample(net, digits, level, steps, batch)])
        newly = (after & ~before).sum() / (~before).sum()
        print(f'{level:8g}  {after.mean():6.1%}, of those that were whole {newly:6.1%}')


if __name__ == '__main__':
    main()
