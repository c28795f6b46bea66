"""How good are the shipped network's digits, for the same number of network evaluations, with each sampler?

Three measures against the real digits that it was trained on: the Fréchet distance between normal laws fitted to their
40 leading principal components (pixels of real digits, in [−1, 1]), the sliced Wasserstein distance of pixels over
200 random directions, and the share of samples that an independent classifier (digits_classifier.py) reads as the class
asked for. All samplers get the same latents and classes; the error bar is the standard deviation over the seed sets.
Printed first: the distances of one half of the real digits to the other, which chance alone makes. The Fréchet distance
of n real digits falls as 1/n, the other one as its root.
Seconds are processor time, summed over all threads, which other programs disturb less; on a GPU, those that pass.
"""

import os
import sys
from functools import partial
from typing import NamedTuple

import click
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import sampler_2nd
from benchmarks import digits_classifier, peers
from benchmarks.clock import clock_for
from benchmarks.record import Record
from dnnlib import options
from metrics import distances
from sampling import draw, networks
from torch_utils import distributed

COMPONENTS, DIRECTIONS = 40, 200


class Noise:
    """Standard normals from one generator; a peer that asks by times gets independent increments."""

    def __init__(self, seed, shape, device='cpu'):
        self._generator, self._shape = torch.Generator(device).manual_seed(seed), shape
        self._dtype = sampler_2nd.state_dtype(self._generator.device)

    def fresh(self, *_):
        source = self._generator
        return torch.randn(self._shape, generator=source, device=source.device, dtype=self._dtype)

    __call__ = fresh


class Judge:
    """The measures. `real`: pixels in [−1, 1], [N, pixels]."""

    def __init__(self, real, classifier, seed=0):
        self.mean, self.real, self.classifier = real.mean(0), real, classifier
        self.axes = torch.linalg.svd(real - self.mean, full_matrices=False)[2][:COMPONENTS].T
        directions = torch.randn(real.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(seed)).to(real)
        self.directions = directions / directions.norm(dim=0)

    def frechet_distance(self, fake):
        """|μ − μ'|² + tr(C + C' − 2 (C C')^{1/2}) in the principal components; [N, pixels]."""
        a, b = ((x - self.mean) @ self.axes for x in (self.real, fake))
        moments = b.mean(0), torch.cov(b.T), a.mean(0), torch.cov(a.T)
        return distances.frechet_distance(*(each.numpy() for each in moments)).distance

    def sliced_wasserstein(self, fake):
        """Root mean square, over directions, of the distance between the quantiles of the projections."""
        q = (torch.arange(200, dtype=fake.dtype) + 0.5) / 200
        a, b = (torch.quantile(x @ self.directions, q, dim=0) for x in (self.real, fake))
        return float((a - b).square().mean().sqrt())

    def share_right(self, images, classes):
        """`images`: uint8 [N, 1, 32, 32]."""
        return float((digits_classifier.read_digits(self.classifier, images) == classes).double().mean())


def distances_between_halves(real, splits=4):
    """Fréchet distances and sliced Wasserstein distances of a random half of the real digits to the other half."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(splits):
        mine, others = real[torch.randperm(len(real), generator=generator)].tensor_split(2)
        judge = Judge(others, None)
        found.append((judge.frechet_distance(mine), judge.sliced_wasserstein(mine)))
    return np.array(found).T


class Result(NamedTuple):
    frechet: float
    sliced: float
    right: float
    seconds: float  # per digit


def sample(net, sampler, evaluations, rho, num, seed, batch):
    """(uint8 [num, 1, 32, 32], classes [num], seconds)"""
    sigmas = sampler_2nd.noise_levels(net, sampler.levels(evaluations), 0.002, 80, rho)
    classes = torch.arange(num) % net.label_dim
    device = next(net.parameters()).device
    clock = clock_for(device)
    parts, start = [], clock()
    for i, labels in enumerate(torch.eye(net.label_dim)[classes].split(batch)):
        shape = [len(labels), net.img_channels, net.img_resolution, net.img_resolution]
        noise, network = Noise(seed * 1_000_000 + i, shape, device), sampler_2nd.Denoiser(net, labels.to(device))

        def denoise(x, sigma, network=network):
            return network(x, torch.as_tensor(sigma).reshape(-1)[0])

        with torch.no_grad():
            parts.append(sampler.run(denoise, noise.fresh() * sigmas[0], sigmas, noise))
    images = torch.from_numpy(draw.to_uint8(torch.cat(parts))).permute(0, 3, 1, 2).contiguous()  # waits for a GPU
    return images, classes, clock() - start


def sample_and_judge(judge, net, sampler, evaluations, rho, num, seed, batch):
    images, classes, seconds = sample(net, sampler, evaluations, rho, num, seed, batch)
    pixels = images.flatten(1).double() / 127.5 - 1
    return Result(
        judge.frechet_distance(pixels),
        judge.sliced_wasserstein(pixels),
        judge.share_right(images, classes),
        seconds / num,
    )._asdict()


def cell(results):
    """'FD ± sd / SW ± sd / share ± sd / s per image'; one set has no sd."""
    *measures, seconds = zip(*results, strict=True)
    told = []
    for values, form in zip(measures, ('.2f', '.4f', '.1%'), strict=True):
        sd = f' ± {np.std(values, ddof=1):{form}}' if len(values) > 1 else ''
        told.append(f'{np.mean(values):{form}}{sd}')
    return ' / '.join([*told, f'{np.mean(seconds):.3f} s'])


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', help='Network pickle', metavar='PATH|URL', default=str(networks.SHIPPED_NETWORK))
@click.option('--data', help="Dataset tool's mnist-5k", metavar='ZIP|DIR', default='datasets/mnist-32x32.zip')
@click.option('--num', help='Digits of each seed set', metavar='INT', type=click.IntRange(min=50), default=5000)
@click.option('--sets', help='Seed sets', metavar='INT', type=click.IntRange(min=1), default=3)
@click.option('--evaluations', help='Of the network, per digit', metavar='LIST', default='12,16,24,32')
@click.option('--rho', help='Time step exponent', metavar='FLOAT', type=float, default=7)
@peers.noise_options
@click.option('--sampler', 'names', help='Which samplers', metavar='NAME', multiple=True, show_default='all installed')
@click.option('--results', help='Kept here, and not computed again', metavar='JSONL', default='out/digits.jsonl')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=100)
@click.option('--device', help='cuda, mps or cpu', metavar='NAME', default='cpu')
def main(network, data, num, sets, evaluations, rho, names, results, batch, device, **noise):
    """Print: Fréchet distance / sliced Wasserstein distance / share read right / seconds per digit.

    \b
    python dataset_tool.py --source=mnist-5k --dest=datasets/mnist-32x32.zip
    python benchmarks/digits.py
    """
    samplers = peers.available(peers.PEERS) | peers.ours_with(**noise)
    unknown = set(names) - set(samplers)
    if unknown:
        raise click.UsageError(f'--sampler={unknown.pop()!r} is not one of: {", ".join(samplers)}')
    try:
        net = networks.open_network(network, distributed.select_device(device))
    except ValueError as err:
        raise click.UsageError(str(err)) from None
    counts = options.parse_int_list(evaluations)
    try:
        train, _ = digits_classifier.load_digits(data)
        classifier, _ = digits_classifier.fit_judge(data)
    except OSError as err:
        raise click.ClickException(str(err)) from None
    real = train.images.flatten(1).double() / 127.5 - 1
    judge, record = Judge(real, classifier), Record(results)
    network_id = digits_classifier.identify(network)
    fd, sw = distances_between_halves(real)
    print(f'Real digits: E x² = {float(real.square().mean()):.4f}')
    print(f'Half of them to the other half: {fd.mean():.2f} ± {fd.std(ddof=1):.2f} / {sw.mean():.4f}')
    print('| sampler | ' + ' | '.join(map(str, counts)) + ' |')
    print('|---' * (len(counts) + 1) + '|')
    for name in names or samplers:
        cells = []
        for n in counts:
            of = {'sampler': name, 'evaluations': n, 'rho': rho, 'num': num, 'batch': batch}
            of |= {'network': network_id, 'device': device, 'version of the samplers': draw.IMAGE_VERSION}
            found = []
            for seed in range(sets):
                compute = partial(sample_and_judge, judge, net, samplers[name], n, rho, num, seed, batch)
                found.append(Result(**record.get({**of, 'seed': seed}, compute)))
            cells.append(cell(found))
        print(f'| {name} | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    main()
