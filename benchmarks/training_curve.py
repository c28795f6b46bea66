"""How did a training run go? Draws the loss over images seen, from the stats.jsonl of its run directory."""

import json
from pathlib import Path

import click


def read_losses(path: str | Path) -> tuple[list[float], list[float]]:
    """(kimg, mean loss per pixel) of each tick. A resumed run repeats ticks: the later line counts."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    losses = {row['Progress/kimg']['mean']: row['Loss/loss']['mean'] for row in rows}
    return list(losses), list(losses.values())


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--stats', help='stats.jsonl of a run', metavar='FILE', default='docs/mnist-stats.jsonl')
@click.option('--dest', help='Picture to write', metavar='PNG', default='docs/mnist-loss.png')
def main(stats: str, dest: str) -> None:
    """Draw a training curve.

    \b
    python benchmarks/training_curve.py --stats=training-runs/00000-…/stats.jsonl --dest=loss.png
    """
    try:
        import matplotlib
    except ImportError:
        raise click.ClickException('drawing needs matplotlib: pip install -e ".[plot]"') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    kimg, loss = read_losses(stats)
    figure, axes = plt.subplots(figsize=(6, 3.2), layout='constrained')
    axes.plot(kimg[1:], loss[1:], linewidth=1)  # the first tick is one batch of the untrained network
    axes.set(xlabel='images seen (thousands)', ylabel='loss per pixel', yscale='log')
    axes.grid(alpha=0.3, which='both')
    figure.savefig(dest, dpi=150)
    print(f'{len(kimg)} ticks, last loss {loss[-1]:.4f} at {kimg[-1]:.1f} kimg; saved {dest}')


if __name__ == '__main__':
    main()
