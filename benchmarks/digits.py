"""How good are the shipped network's digits, for the same number of network evaluations, with each sampler?

Four measures against the real digits that it was trained on: the Fréchet distance between normal laws fitted to their
40 leading principal components (pixels of real digits, in [−1, 1]), the sliced Wasserstein distance of pixels over
200 random directions, the share that an independent classifier (digits_classifier.py) reads as the class asked for,
and the share whose strokes lie in more than one piece (broken_strokes.py). The options are those of compare.py, and
seed k draws a digit of the class k mod 10. A network that drew one clean digit of each class and nothing else would be
read well, so look at the pictures of the report too. Printed first: the distances of one half of the real digits to the
other, which chance alone makes. The Fréchet distance of n real digits falls as 1/n, the other one as its root.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import dnnlib
from benchmarks import broken_strokes, digits_classifier
from benchmarks.digits_classifier import NUM_CLASSES
from comparison import command, report
from comparison.run import Comparison, content_hash
from metrics import distances
from metrics.judge import Verdict
from sampling import networks
from torch_utils import distributed
from torch_utils.errors import one_line_errors

COMPONENTS, DIRECTIONS = 40, 200


class DigitsJudge:
    """The measures, as a `metrics.judge.Judge` gives its own. `real`: pixels in [−1, 1], [N, pixels]."""

    def __init__(self, real, classifier, seed=0):
        self.mean, self.real, self.classifier = real.mean(0), real, classifier
        self.axes = torch.linalg.svd(real - self.mean, full_matrices=False)[2][:COMPONENTS].T
        directions = torch.randn(real.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(seed)).to(real)
        self.directions = directions / directions.norm(dim=0)

    def start(self):
        return SampledDigits()

    def finish(self, images):
        """The share read as asked is on record class by class as well."""
        pixels, right = to_unit(images.pixels), self.read_as_asked(images)
        numbers = {
            'Fréchet distance': self.frechet_distance(pixels),
            'sliced Wasserstein': self.sliced_wasserstein(pixels),
            'read as asked': float(right.double().mean()),
            'broken': broken_strokes.share_broken(images.pixels[:, 0].numpy()),
        }
        by_class = {class_title(k): float(right[images.classes == k].double().mean()) for k in range(NUM_CLASSES)}
        return Verdict(numbers | by_class, '', [])

    def read_as_asked(self, images):
        return digits_classifier.read_digits(self.classifier, images.pixels) == images.classes

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


class SampledDigits:
    """Sampled digits, as they come: uint8 [N, 1, 32, 32], and the class that each was asked for."""

    def __init__(self):
        self._pixels, self._classes = [], []

    def add_pixels(self, seeds: Sequence[int], pixels: np.ndarray) -> None:
        self._pixels.append(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        self._classes.append(torch.tensor(seeds) % NUM_CLASSES)

    @property
    def pixels(self) -> torch.Tensor:
        return torch.cat(self._pixels).contiguous()

    @property
    def classes(self) -> torch.Tensor:
        return torch.cat(self._classes)


def class_title(k: int) -> str:
    return f'read as asked, class {k}'


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, …] → [N, pixels] in [−1, 1]."""
    return images.flatten(1).double() / 127.5 - 1


def distances_between_halves(real, splits=4):
    """Fréchet distances and sliced Wasserstein distances of a random half of the real digits to the other half."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(splits):
        mine, others = real[torch.randperm(len(real), generator=generator)].tensor_split(2)
        judge = DigitsJudge(others, None)
        found.append((judge.frechet_distance(mine), judge.sliced_wasserstein(mine)))
    return np.array(found).T


def describe_real(images: torch.Tensor) -> str:
    real = to_unit(images)
    fd, sw = distances_between_halves(real)
    broken = broken_strokes.share_broken(images[:, 0].numpy())
    return (
        f'Real digits: E x² = {float(real.square().mean()):.4f}, {broken:.1%} broken\n'
        f'Half of them to the other half: {fd.mean():.2f} ± {fd.std(ddof=1):.2f} / {sw.mean():.4f}\n'
    )


def class_table(rows: Sequence[report.Row], held_out: torch.Tensor) -> str:
    """Markdown: shares read as asked by class; held_out: bool [10, n], of real digits."""
    lines = ['| by class | ' + ' | '.join(map(str, range(NUM_CLASSES))) + ' |', '|---' * (NUM_CLASSES + 1) + '|']
    shares = {'held-out': held_out.double().mean(1).tolist()}
    for row in rows:
        by_class = [row.numbers[class_title(k)] for k in range(NUM_CLASSES)]
        shares[f'{row.label}, {row.num_steps} steps'] = [report.spread(each).mean for each in by_class]
    lines += [f'| {name} | ' + ' | '.join(f'{share:.0%}' for share in each) + ' |' for name, each in shares.items()]
    return '\n'.join(lines)


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--data', help="Dataset tool's mnist-5k", metavar='ZIP|DIR', default='datasets/mnist-32x32.zip')
@click.option('--outdir', help='Where results, pictures and the report go', metavar='DIR', default='out/digits')
@click.option('--by-class', help='Also print the shares read as asked by class', is_flag=True)
@command.comparison_options
@click.pass_context
def main(context, **kwargs):
    """Print the measures of each sampler, with the network evaluations and the seconds; OUTDIR/report.html has all.

    \b
    python dataset_tool.py --source=mnist-5k --dest=datasets/mnist-32x32.zip
    python benchmarks/digits.py --num=5000 --samplers=rk --evaluations=12,16,24,32 --S_max=5,inf
    """
    report.need_packages('the report', 'bench', 'matplotlib', 'jinja2', 'scipy')
    opts = dnnlib.EasyDict(kwargs)
    command.check_options(context, opts)
    with one_line_errors():
        cells = command.make_cells(opts)
        if opts.dry_run:
            click.echo(command.cells_table(cells, opts.num * opts.sets))
            return
        device = distributed.init(opts.device)
        net = networks.open_network(opts.network, device, opts.trust_pickle)
        networks.check_network(net, NUM_CLASSES - 1)
        train, _ = digits_classifier.load_digits(opts.data)
        click.echo(describe_real(train.images))
        classifier, held_out = digits_classifier.fit_judge(opts.data)
        hashes = {'network': content_hash('network', opts.network), 'ref': content_hash('data', opts.data)}
        comparison = Comparison(
            net=net,
            judge=DigitsJudge(to_unit(train.images), classifier),
            cells=cells,
            outdir=Path(opts.outdir),
            identity={**hashes, 'num': opts.num},
            batch=opts.batch,
            device=device,
            class_idx=range(NUM_CLASSES),
            **{name: opts[name] for name in ('num', 'sets', 'shown')},
        )
        command.carry_out(comparison, opts, command.command_line(context, 'benchmarks/digits.py'))
    if opts.by_class:
        click.echo('\n' + class_table(comparison.rows(), held_out))


if __name__ == '__main__':
    main()
