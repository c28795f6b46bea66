"""At which noise level does a network of digits break strokes? Noise real digits to σ, sample down, count broken ones.

What a digit has kept at σ, the network cannot break any more; so the level from which on the share rises is the one
that the network does not master, and where training should look (`train.py --P_mean --P_std`). All levels see the same
digits and the same noise, those of the last 500, which neither the network nor anything else was fitted to.
"""

import os
import sys

import click
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from benchmarks import digits_classifier
from benchmarks.broken_strokes import is_broken
from benchmarks.digits import Noise
from sampler_2nd import ito_taylor_sampler
from sampling import draw, networks


def resample(net, digits: digits_classifier.Digits, sigma: float, steps: int, batch: int) -> np.ndarray:
    """The digits with noise of standard deviation `sigma`, sampled down by `rk`: uint8 [N,32,32]."""
    parts = []
    onehots = torch.eye(digits_classifier.NUM_CLASSES)[digits.labels]
    for i, (images, labels) in enumerate(zip(digits.images.split(batch), onehots.split(batch), strict=True)):
        noise = Noise(i, images.shape)
        real = images.double() / 127.5 - 1
        with torch.no_grad():
            x = ito_taylor_sampler(
                net, noise(), labels, noise, num_steps=steps, sigma_max=sigma, scheme='rk', init=real
            )
        parts.append(draw.to_uint8(x)[..., 0])
    return np.concatenate(parts)


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', help='Network', metavar='PATH', default=str(networks.SHIPPED_NETWORK))
@click.option('--data', help='Real digits', metavar='ZIP', default='datasets/mnist-32x32.zip')
@click.option('--sigma', help='Noise levels', metavar='LIST', default='0.4,1.2,2,4,80')
@click.option('--steps', help='Steps from each of them', metavar='INT', type=click.IntRange(min=1), default=24)
@click.option('--batch', help='Digits at a time', metavar='INT', type=click.IntRange(min=1), default=100)
def main(network: str, data: str, sigma: str, steps: int, batch: int) -> None:
    """Share of held-out digits that a network breaks when it samples them down from each noise level.

    \b
    python benchmarks/where_strokes_break.py
    """
    try:
        _, digits = digits_classifier.load_digits(data)
    except OSError as err:
        raise click.ClickException(str(err)) from None
    try:
        levels = [float(level) for level in sigma.split(',')]
    except ValueError:
        levels = []
    if not levels or not all(0.002 < level <= 80 for level in levels):
        raise click.ClickException(f'--sigma={sigma!r}: levels above 0.002 and up to 80, such as 0.4,2,80')
    net = networks.open_network(network, torch.device('cpu'))
    before = np.array([is_broken(image) for image in digits.images[:, 0].numpy()])
    print(f'{"real":>8}  {before.mean():6.1%} in more than one piece')
    for level in levels:
        after = np.array([is_broken(image) for image in resample(net, digits, level, steps, batch)])
        newly = (after & ~before).sum() / (~before).sum()
        print(f'{level:8g}  {after.mean():6.1%}, of those that were whole {newly:6.1%}')


if __name__ == '__main__':
    main()
