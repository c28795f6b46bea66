"""How fast is a training step, where does its time go, and what is gained over the same step written plainly?

Three programs make the same steps from the same weights, images and random numbers, in turns:

    eager           PyTorch as in its tutorials: its dropout, Adam and the moving average weight by weight
    channels_first  dropout with fewer random bits, and one kernel for all weights
    train.py        `training.training_loop.Trainer`: wide networks on a CPU also channels last, for faster convolutions

A ratio is the median over the turns of one program's time over another's in the same turn. The first turns, of which no
time is taken, go without dropout, from weights without zeros: there the losses have to agree to rounding.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works uninstalled

import train  # noqa: E402
from benchmarks.cost import randomize_zeros  # noqa: E402
from training import fast, networks, training_loop  # noqa: E402
from training.dataset import ImageFolderDataset  # noqa: E402
from training.run_state import Run  # noqa: E402

PARTS = ['loading', 'forward', 'backward', 'optimizer']

# name → (resolution, channels, options of train.py)
SETTINGS = {
    'mnist': (32, 1, ['--cbase=32', '--cres=1,2,2', '--num-blocks=1', '--batch=32', '--augment=0']),
    'digits': (16, 1, ['--arch=ncsnpp', '--precond=ve', '--cbase=16', '--cres=1,2', '--num-blocks=1', '--batch=64']),
    'cifar10': (32, 3, ['--batch=64']),
}


class StepTimer:
    """Seconds by part of a step; waits for the GPU at each mark."""

    def __init__(self, device: torch.device):
        self._device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.start()

    def start(self) -> None:
        self._last = self._now()
        self._step: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def mark(self, part: str) -> None:
        """The time since the last mark went into `part`."""
        now = self._now()
        self._step[part] += now - self._last
        self._last = now

    def stop(self) -> None:
        for part, seconds in self._step.items():
            self.seconds[part].append(seconds)

    def _now(self) -> float:
        if self._device.type == 'cuda':
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class TimedTrainer(training_loop.Trainer):
    """train.py's steps."""

    def __init__(self, config: training_loop.Config, run: Run, dataset: Any):
        super().__init__(config, run, dataset)
        self.timer = StepTimer(config.device)
        self.loss = 0.0

    def timed_step(self) -> float:
        self.timer.start()
        batches = self.fetch()
        self.warn_if_not_finite()
        self.timer.mark('loading')
        self.loss = 0.0
        self.accumulate(batches)
        self.timer.mark('backward')
        self.update()
        self.run.cur_nimg += self.config.batch_size
        self.timer.mark('optimizer')
        self.timer.stop()
        return self.loss

    def objective(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = super().objective(images, labels)
        self.timer.mark('forward')
        self.loss += loss.item()
        return loss


class EagerTrainer(TimedTrainer):
    """The rival: the same steps as one would write them in a minute."""

    def objective(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self.loss_fn(self.run.net, images, labels, self.augment_pipe).sum() / self.config.batch_size
        self.timer.mark('forward')
        self.loss += loss.item()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        for group in self.run.optimizer.param_groups:
            group['lr'] = self.config.lr(self.run.cur_nimg)
        for param in self.run.net.parameters():
            if param.grad is not None:
                param.grad = torch.nan_to_num(param.grad, nan=0, posinf=1e5, neginf=-1e5)
        self.run.optimizer.step()
        halflife_nimg = min(self.config.ema_halflife_kimg * 1000, self.run.cur_nimg * 0.05)
        beta = 0.5 ** (self.config.batch_size / max(halflife_nimg, 1e-8))
        for average, param in zip(self.run.ema.parameters(), self.run.net.parameters(), strict=True):
            average.copy_(beta * average + (1 - beta) * param)


def draw_dataset(folder: Path, resolution: int, channels: int, count: int = 256) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, [resolution, resolution, channels], dtype=np.uint8)
        PIL.Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).save(folder / f'{i:08d}.png')


def read_config(options: list[str], data: Path, workers: int, device: torch.device) -> training_loop.Config:
    """What train.py makes of its command line."""
    command = train.main.make_context('train.py', ['--outdir=-', f'--data={data}', '--seed=0', *options])
    opts = train.dnnlib.EasyDict({**command.params, 'workers': workers, 'lr_rampup': 0.01})
    config = train.make_config(opts, ImageFolderDataset(str(data)))
    return training_loop.Config(device=device, **train._loop_kwargs(config, device))


def make_trainers(config: training_loop.Config, dataset: Any) -> dict[str, TimedTrainer]:
    torch.manual_seed(0)
    shape = {'img_resolution': dataset.resolution, 'img_channels': dataset.num_channels}
    source = train.dnnlib.util.construct_class_by_name(**config.network_kwargs, **shape, label_dim=0)
    trainers: dict[str, TimedTrainer] = {}
    randomize_zeros(source)
    for name in ('eager', 'channels_first', 'train.py'):
        net = copy.deepcopy(source).to(config.device).train()
        if name != 'eager':
            fast.install(net)
        if name == 'train.py':
            net = training_loop.set_memory_format(net)
        plain = {'foreach': False, 'fused': False} if name == 'eager' else {}
        optimizer = training_loop.make_optimizer(net, {**config.optimizer_kwargs, **plain})
        run = Run(net, copy.deepcopy(net).eval().requires_grad_(False), optimizer)
        trainers[name] = (EagerTrainer if name == 'eager' else TimedTrainer)(config, run, dataset)
    return trainers


def compare(trainers: dict[str, TimedTrainer], steps: int, warm_up: int) -> dict[str, list[float]]:
    """Losses of the warm-up, by program, without dropout, whose masks differ; the times after it are in the timers."""
    losses = defaultdict(list)
    for step in range(warm_up + steps):
        for name in list(trainers)[:: 1 if step % 2 else -1]:
            torch.manual_seed(step)
            set_dropout(
                trainers[name].run.net, trainers[name].config.network_kwargs['dropout'] if step >= warm_up else 0
            )
            loss = trainers[name].timed_step()
            if step < warm_up:
                losses[name].append(loss)
                trainers[name].timer.seconds.clear()
    return losses


def set_dropout(net: torch.nn.Module, p: float) -> None:
    for block in net.modules():
        if isinstance(block, networks.UNetBlock):
            block.dropout = p


def print_table(trainers: dict[str, TimedTrainer], losses: dict[str, list[float]]) -> None:
    batch = next(iter(trainers.values())).config.batch_size
    totals = {name: [sum(s) for s in zip(*t.timer.seconds.values(), strict=True)] for name, t in trainers.items()}
    print(f'| program | images/s | {" | ".join(PARTS)} | speed over eager | losses differ by |')
    print('|---' * (len(PARTS) + 4) + '|')
    for name, trainer in trainers.items():
        total = sum(totals[name])
        shares = ' | '.join(f'{sum(trainer.timer.seconds[part]) / total:.1%}' for part in PARTS)
        ratios = sorted(eager / own for eager, own in zip(totals['eager'], totals[name], strict=True))
        speed = f'{statistics.median(ratios):.2f} ({ratios[len(ratios) // 4]:.2f}–{ratios[-1 - len(ratios) // 4]:.2f})'
        differs = max(abs(a / b - 1) for a, b in zip(losses[name], losses['eager'], strict=True))
        rate = batch / statistics.median(totals[name])
        print(f'| {name} | {rate:.1f} | {shares} | {speed} | {differs:.1e} |')


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--setting', help='Network and batch', type=click.Choice(list(SETTINGS)), default='mnist')
@click.option('--options', help='More options of train.py, such as --bf16=1', metavar='STR', default='')
@click.option('--steps', help='Timed steps of each program', metavar='INT', type=click.IntRange(min=1), default=20)
@click.option('--warm-up', help='Steps before them', metavar='INT', type=click.IntRange(min=1), default=3)
@click.option('--workers', help='Data loading processes', metavar='INT', type=click.IntRange(min=0), default=1)
@click.option('--device', help='cuda, mps or cpu', metavar='NAME', show_default='the first there is')
def main(setting: str, options: str, steps: int, warm_up: int, workers: int, device: str | None) -> None:
    """Time training steps, and print a table.

    \b
    python benchmarks/train.py --setting=mnist
    python benchmarks/train.py --setting=digits
    """
    torch.multiprocessing.set_start_method('spawn', force=True)
    chosen = train.dist.init(device)
    resolution, channels, defaults = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as folder:
        draw_dataset(Path(folder), resolution, channels)
        config = read_config([*defaults, *options.split()], Path(folder), workers, chosen)
        trainers = make_trainers(config, ImageFolderDataset(folder, cache=True))
        print(f'{setting}: {resolution}x{resolution}x{channels}, {" ".join([*defaults, *options.split()])}')
        print(f'{chosen}, {torch.get_num_threads()} threads, {workers} loading processes, {steps} steps each')
        print(f'{sum(p.numel() for p in trainers["eager"].run.net.parameters()):,} parameters\n')
        losses = compare(trainers, steps, warm_up)
        for trainer in trainers.values():
            trainer.close()
    print_table(trainers, losses)


if __name__ == '__main__':
    main()
