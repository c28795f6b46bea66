"""How did training go? Draws the loss over images seen of one run or several, from their stats.jsonl."""

import os
import sys
from pathlib import Path

import click

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from training import progress


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.argument('stats', nargs=-1, metavar='STATS.JSONL...')
@click.option('--dest', help='Picture to write', metavar='PNG', default='out/loss.png')
def main(stats: tuple[str, ...], dest: str) -> None:
    """Draw training curves, and print their last values. By default that of the shipped network.

    \b
    python benchmarks/training_curve.py training-runs/00000-…/stats.jsonl --dest=loss.png
    """
    runs = {path: path for path in stats or ['docs/mnist-stats.jsonl']}
    try:
        for path in runs:
            kimg, loss = progress.read_losses(path)
            if not kimg:
                raise click.ClickException(f'{path} has no line of a training run; name the stats.jsonl of one')
            print(f'{path}: {len(kimg)} ticks, last loss {loss[-1]:.4f} at {kimg[-1]:.1f} kimg')
        Path(dest).parent.mkdir(parents=True, exist_ok=True)
        progress.draw_losses(runs, dest)
    except ImportError:
        raise click.ClickException('drawing needs matplotlib: pip install -e ".[plot]"') from None
    except OSError as err:
        raise click.ClickException(str(err)) from None
    print(f'Saved {dest}')


if __name__ == '__main__':
    main()
