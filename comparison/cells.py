"""A cell of a comparison: a sampler with its settings. What it costs, its images, and what a judge says of them."""

import bisect
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

import sampler_2nd
from comparison import peers
from sampling import choose, draw

DEFAULTS = {'rho': 7, 'eta': 1, 'S_churn': 0}  # of the dials that a comparison turns


def ours() -> dict[str, choose.Sampler]:
    """The samplers of this project that have no other dials than those of `DEFAULTS`."""
    return {name: row for name, row in choose.samplers().items() if set(row.dials) <= set(DEFAULTS)}


@dataclass(frozen=True)
class Cell:
    """A sampler with all of its settings. `group`: the budget or the number of steps that was asked for.

    `sigmas`: noise levels instead of those of the settings; `levels`: what they are called.
    """

    sampler: str
    settings: tuple[tuple[str, float], ...]
    num_steps: int
    group: int
    sigmas: tuple[float, ...] | None = None
    levels: str = ''

    def make(self) -> Callable[..., torch.Tensor]:
        """The sampler; ValueError from it if it diverges, where to_uint8 would make arbitrary pixels of it."""
        maker: Callable[..., Any] = peers.make if self.sampler in peers.PEERS else choose.make
        sampler = maker(self.sampler, num_steps=self.num_steps, sigmas=self.sigmas, **dict(self.settings))

        def checked(*args, **kwargs):
            images = sampler(*args, **kwargs)
            if not torch.isfinite(images).all():
                raise ValueError(f'{self.sampler} with {self.num_steps} steps diverged: its images are not finite')
            return images

        return checked

    def identity(self) -> dict[str, Any]:
        settings = {**dict(self.settings), 'num_steps': self.num_steps}
        levels = {} if self.sigmas is None else {'levels': list(self.sigmas)}
        return {'sampler': self.sampler, 'version of the samplers': draw.IMAGE_VERSION, **settings, **levels}

    def label(self, varied: set[str]) -> str:
        """The sampler's name, and those settings that are unusual or differ between cells."""
        told = [f'{name} {value:g}' for name, value in self.settings if name in varied or value != DEFAULTS.get(name)]
        return ', '.join([self.sampler, *told, *([self.levels] if 'levels' in varied else [])])


# ----------------------------------------------------------------------------
# What a cell costs.


def affordable_steps(sampler: str, settings: tuple[tuple[str, float], ...], evaluations: int) -> int:
    """The most steps, two at least, that so many evaluations pay for; a JVP counts as one more.

    Raises:
        click.UsageError: they do not pay for two.
    """

    def cost(num_steps: int) -> int:
        return sum(count_work(Cell(sampler, settings, num_steps, evaluations)))

    num_steps = 1 + bisect.bisect_right(range(2, evaluations + 1), evaluations, key=cost)
    if num_steps < 2:
        raise click.UsageError(f'--evaluations={evaluations}: two steps of {sampler} cost {cost(2)}')
    return num_steps


@cache
def count_work(cell: Cell) -> tuple[int, int]:
    """(evaluations, how many of them with a JVP) of the sampler, counted on images of one pixel."""
    net = sampler_2nd.CountCalls(OnePixel())
    cell.make()(net, torch.zeros([1, 1, 1, 1]), randn_like=torch.zeros_like)
    return net.calls, net.jvp_calls


class OnePixel:
    """The exact denoiser of a standard normal pixel."""

    def __call__(self, x, sigma, class_labels=None):
        return x / (1 + sigma**2)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


# ----------------------------------------------------------------------------
# Sampling and judging.


class Measured(NamedTuple):
    """What is kept of a cell and a set of seeds: a `metrics.judge.Verdict`, and the work.

    Attributes:
        calls, jvp_calls: network evaluations for an image, and how many of them with a JVP.
        seconds: per image.
        machine: what they were measured on.
    """

    numbers: dict[str, float]
    title: str
    warnings: list[str]
    calls: int
    jvp_calls: int
    seconds: float
    machine: str


def sample_and_judge(
    net: Any,
    cell: Cell,
    seeds: Sequence[int],
    batch: int,
    judge: Any,
    device: torch.device,
    progress: Callable[[int], Any],
    class_idx: Sequence[int] | None = None,
) -> Measured:
    """Draw the images of the seeds, as generate.py does, and hand them to the judge.

    Only sampling is timed, after one image that warms up.

    Args:
        judge: a `metrics.judge.Judge`, or one with its methods.
        progress: is told how many images are done, batch by batch.
    """
    clock = clock_for(device)
    batches, sampler = draw.split_seeds(seeds, batch), cell.make()
    images = judge.start()
    list(draw.generate_images(net, [seeds[:1]], sampler, device, class_idx))
    counted = sampler_2nd.CountCalls(net)
    seconds, start = 0.0, clock()
    for batch_seeds, pixels in draw.generate_images(counted, batches, sampler, device, class_idx):
        seconds += clock() - start
        images.add_pixels(batch_seeds, pixels)
        progress(len(batch_seeds))
        start = clock()
    return Measured(
        **judge.finish(images)._asdict(),
        calls=counted.calls // len(batches),
        jvp_calls=counted.jvp_calls // len(batches),
        seconds=seconds / len(seeds),
        machine=describe_machine(device, batch),
    )


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds. On a CPU processor time, summed over all threads, which other programs disturb less."""
    return time.process_time if device.type == 'cpu' else time.perf_counter


def describe_machine(device: torch.device, batch: int) -> str:
    """What decides the seconds."""
    if device.type == 'cuda':
        return f'{torch.cuda.get_device_name(device)}, batches of {batch}'
    threads = torch.get_num_threads()
    return f'{_processor()} ({device}), {threads} thread{"s" * (threads > 1)} of {os.cpu_count()}, batches of {batch}'


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return (names or [platform.processor() or platform.machine()])[0]
