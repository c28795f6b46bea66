"""Files of images → their features, read by worker processes and spread over all ranks."""

import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import click
import numpy as np
import torch
from tqdm import tqdm

from metrics import measure
from metrics.detectors import Detector, load_detector
from metrics.measure import FeatureSet
from metrics.statistics import INCEPTION, Reference
from torch_utils import distributed as dist

DEFAULT_WORKERS = min(3, os.cpu_count() or 1)


class Images(Protocol):
    """Images by position: (position, uint8 [1 or 3, H, W], ''), or (position, None, what is wrong with it)."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> tuple[int, np.ndarray | None, str]: ...


def features_of(
    files: Images,
    chosen: np.ndarray,
    detector: Detector,
    device: torch.device,
    keep: bool,
    batch: int = 64,
    skip_broken: bool = False,
    workers: int = DEFAULT_WORKERS,
    title: str = 'Images',
) -> FeatureSet:
    """Pass the chosen images through the detector, each once, spread over all processes.

    Raises:
        click.ClickException: an image cannot be used, and `skip_broken` does not leave it out.
    """
    result = FeatureSet(detector, device, keep)
    world = dist.get_world_size()
    num_batches = ((len(chosen) - 1) // (batch * world) + 1) * world
    mine = np.array_split(chosen, num_batches)[dist.get_rank() :: world]
    loader: Any = torch.utils.data.DataLoader(
        files,  # type: ignore[arg-type]
        batch_sampler=[part.tolist() for part in mine],
        collate_fn=list,  # images may differ in size, which is an error of its own
        num_workers=workers,
        prefetch_factor=2 if workers else None,
    )
    broken = 0
    for items in tqdm(loader, unit='batch', desc=f'{title}: {len(chosen)}', disable=dist.get_rank() != 0):
        broken += _add(result, items, skip_broken)
    result.finish()
    broken = sum(dist.all_gather_object(broken))
    if broken:
        say(f'{broken} images left out, as they could not be used')
    return result


def _add(result: FeatureSet, items: Sequence[tuple[int, np.ndarray | None, str]], skip_broken: bool) -> int:
    """Add a batch; how many of it are broken."""
    for _, _, problem in items:
        if problem and not skip_broken:
            raise click.ClickException(f'{problem}; --skip-broken leaves such images out')
    good = [(position, image) for position, image, _ in items if image is not None]
    if good:
        result.add([position for position, _ in good], torch.from_numpy(np.stack([image for _, image in good])))
    return len(items) - len(good)


def open_reference(
    ref: str, detector: str | None, device: torch.device, real: Images | None, **options: Any
) -> tuple[Reference, Detector]:
    """The reference behind --ref, and the detector to compare with.

    Args:
        real: the real images, where they themselves are the reference; else `ref` is a file of statistics.
        options: of `features_of`.
    """
    if real is None:
        return measure.open_statistics(ref, detector, device)
    loaded = load_detector(detector or INCEPTION, device)
    say(f'{ref} is measured anew in each run; `fid.py ref` keeps its statistics')
    measured = features_of(real, np.arange(len(real)), loaded, device, title='Reference images', **options)
    reference = measured.reference()
    reference.name = ref
    return reference, loaded


def say(text: str) -> None:
    """For people, not for programs: numbers alone go to stdout."""
    dist.print0(text, file=sys.stderr)
