"""What a run tells about itself: the status line, stats.jsonl, loss.png and TensorBoard.

As a command it draws the losses of several runs: python -m training.reporter STATS.JSONL… --dest=loss.png
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import torch

import dnnlib
from dnnlib import plain_json
from dnnlib.options import NewFile
from torch_utils import distributed as dist
from torch_utils import training_stats
from torch_utils.errors import one_line_errors
from training.run_state import Run


class Reporter:
    """The status line and the row of stats.jsonl that each tick ends with. Clocks start with the object."""

    def __init__(self, run_dir: str, total_kimg: float, device: torch.device):
        self.stats_path = os.path.join(run_dir, 'stats.jsonl')
        self._total_kimg = total_kimg
        self._device = device
        self._tick_began = self._tick_ended = time.monotonic()
        self._maintenance_sec = 0.0

    def start_tick(self) -> None:
        """Call after the work between ticks (snapshots, states), which counts as maintenance."""
        self._tick_began = time.monotonic()
        self._maintenance_sec = self._tick_began - self._tick_ended

    def end_tick(self, run: Run) -> None:
        self._tick_ended = time.monotonic()
        tick_sec = self._tick_ended - self._tick_began
        run.elapsed_sec += tick_sec + self._maintenance_sec
        kimg = run.cur_nimg / 1000
        tick_kimg = (run.cur_nimg - run.tick_start_nimg) / 1000
        report = training_stats.report0
        line = [
            f'tick {report("Progress/tick", run.cur_tick):<5d}',
            f'kimg {report("Progress/kimg", kimg):<9.1f}',
            f'time {dnnlib.util.format_time(report("Timing/total_sec", run.elapsed_sec)):<12s}',
            f'sec/tick {report("Timing/sec_per_tick", tick_sec):<7.1f}',
            f'sec/kimg {report("Timing/sec_per_kimg", tick_sec / tick_kimg):<7.2f}',
            f'maintenance {report("Timing/maintenance_sec", self._maintenance_sec):<6.1f}',
            f'cpumem {report("Resources/cpu_mem_gb", _peak_cpu_memory() / 2**30):<6.2f}',
            f'gpumem {report("Resources/peak_gpu_mem_gb", self._peak_gpu_memory("allocated")):<6.2f}',
            f'reserved {report("Resources/peak_gpu_mem_reserved_gb", self._peak_gpu_memory("reserved")):<6.2f}',
        ]
        dist.print0(' '.join(line))
        if self._device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self._device)
        training_stats.default_collector.update()
        if dist.get_rank() == 0:
            row = json.dumps({**training_stats.default_collector.as_dict(), 'timestamp': time.time()})
            with dnnlib.util.explain_failed_write(self.stats_path), open(self.stats_path, 'ab') as file:
                file.write(f'{self._line_break()}{row}\n'.encode())
        dist.update_progress(run.cur_nimg // 1000, int(self._total_kimg))

    def _line_break(self) -> str:
        """What ends the last line of stats.jsonl, if a kill has cut it."""
        if not os.path.getsize(self.stats_path):
            return ''
        with open(self.stats_path, 'rb') as file:
            file.seek(-1, os.SEEK_END)
            return '' if file.read(1) == b'\n' else '\n'

    def _peak_gpu_memory(self, kind: str) -> float:
        """GiB since the last tick; 0 without CUDA."""
        if self._device.type != 'cuda':
            return 0.0
        return getattr(torch.cuda, f'max_memory_{kind}')(self._device) / 2**30


def _peak_cpu_memory() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


# ----------------------------------------------------------------------------
# Pictures.


def read_losses(stats_path: str | Path) -> tuple[list[float], list[float]]:
    """(kimg, mean loss per pixel) of each tick. A resumed run repeats ticks: the later line counts."""
    losses = {}
    for line in Path(stats_path).read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(ValueError, LookupError, TypeError):  # a line that a kill has cut
            row = plain_json.parse(line)
            losses[row['Progress/kimg']['mean']] = row['Loss/loss']['mean']
    kimg = sorted(losses)
    return kimg, [losses[x] for x in kimg]


def draw_losses(runs: Mapping[str, str | Path], dest: str | Path) -> None:
    """The loss over images seen of one run or several, label → stats.jsonl, as a PNG, by matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout='constrained')
    axes = figure.subplots()
    for label, path in runs.items():
        kimg, loss = read_losses(path)
        skip = 1 if len(kimg) > 2 else 0  # the first tick is one batch of the untrained network
        axes.plot(kimg[skip:], loss[skip:], linewidth=1, label=label)
        if any(value > 0 for value in loss[skip:]):  # a run that has gone wrong may have no number to draw
            axes.set(yscale='log')
    axes.set(xlabel='images seen (thousands)', ylabel='loss per pixel')
    axes.grid(alpha=0.3, which='both')
    if len(runs) > 1:
        axes.legend(frameon=False)
    with dnnlib.util.atomic_write(dest) as file:
        FigureCanvasAgg(figure).print_png(file)


class TensorBoard:
    """Loss, learning rate, gradient norm and sample sheets over images seen, for `tensorboard --logdir`."""

    def __init__(self, run_dir: str, first_nimg: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_dir, purge_step=first_nimg)

    def end_tick(self, nimg: int, lr: float, grad_norm: float) -> None:
        loss = training_stats.default_collector.mean('Loss/loss')
        for name, value in [('Loss/loss', loss), ('Progress/lr', lr), ('Progress/grad_norm', grad_norm)]:
            if math.isfinite(value):
                self._writer.add_scalar(name, value, nimg)
        self._writer.flush()

    def add_samples(self, nimg: int, picture: np.ndarray) -> None:
        self._writer.add_image('samples', picture, nimg, dataformats='HWC')


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.argument('stats', nargs=-1, metavar='STATS.JSONL...', required=True)
@click.option('--dest', help='Picture to write', metavar='PNG', type=NewFile('.png'), default='out/loss.png')
def main(stats: tuple[str, ...], dest: str) -> None:
    """Draw training curves of one run or several, and print their last values.

    \b
    python -m training.reporter training-runs/00000-…/stats.jsonl --dest=loss.png
    """
    with one_line_errors():
        for path in stats:
            kimg, loss = read_losses(path)
            if not kimg:
                raise click.ClickException(f'{path} has no line of a training run; name the stats.jsonl of one')
            click.echo(f'{path}: {len(kimg)} ticks, last loss {loss[-1]:.4f} at {kimg[-1]:.1f} kimg')
        try:
            draw_losses({path: path for path in stats}, dest)
        except ImportError:
            raise click.ClickException('drawing needs matplotlib: pip install -e ".[plot]"') from None
    click.echo(f'Saved {dest}')


if __name__ == '__main__':
    dnnlib.util.print_any_text()
    main()
