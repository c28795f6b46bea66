"""Means and standard deviations of named quantities, over everything that all ranks reported since the last update.

`report` may be called anywhere, as often as one likes: it adds to running sums on the device of the value and waits for
no GPU. `Collector.update` fetches the sums and adds them up over the ranks; then the collector answers questions:

    training_stats.report('Loss/loss', loss)          # in every step, on every rank
    training_stats.default_collector.update()         # now and then, on every rank
    training_stats.default_collector.mean('Loss/loss')
"""

from __future__ import annotations

import math
import re
import weakref
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import dnnlib

T = TypeVar('T')

_rank = 0
_sync_device: torch.device | None = None
_collectors: weakref.WeakSet[Collector] = weakref.WeakSet()


def init_multiprocessing(rank: int, sync_device: torch.device | str | None) -> None:
    """Tell this module about the process group.

    Args:
        rank: number of this process.
        sync_device: where `Collector.update` adds up over the ranks: cuda for nccl, cpu for gloo; None without a group.
    """
    global _rank, _sync_device
    _rank = rank
    _sync_device = None if sync_device is None else torch.device(sync_device)


def report(name: str, value: T) -> T:
    """Add every element of `value` to the statistic `name`, and return `value` unchanged.

    Args:
        name: any text; by custom 'Group/name'.
        value: number, tensor, array, or nested sequence of numbers. An empty one only makes the name known.
    """
    collectors = [collector for collector in _collectors if collector._matches(name)]
    if collectors:
        moments = _moments(value)
        for collector in collectors:
            collector._add(name, moments)
    return value


def report0(name: str, value: T) -> T:
    """`report` on rank 0; on the other ranks only make the name known."""
    report(name, value if _rank == 0 else [])
    return value


class Collector:
    """Statistics of the reports between the two last calls of `update`, or from construction to the first.

    With count c, sum s and sum of squares q, reduced per report in float32 and added up in float64:

        mean = s/c        std = sqrt(max(q/c − mean², 0)), and 0 if c = 1

    Both are NaN if c = 0 or s is not finite. A name that was never reported has c = 0.

    Args:
        regex: the collector sees the names that match as a whole.
        keep_previous: a name without new reports keeps its values; else it gets c = 0.
    """

    def __init__(self, regex: str = '.*', keep_previous: bool = True) -> None:
        self._regex = re.compile(regex)
        self._keep_previous = keep_previous
        self._pending: dict[str, dict[torch.device, torch.Tensor]] = {}
        self._moments: dict[str, tuple[float, float, float]] = {}
        _collectors.add(self)

    def update(self) -> None:
        """Make the reports since the last update the current ones. With a sync device, every rank must call this."""
        names = _union_over_ranks(list(self._pending))
        totals = _sum_over_ranks([_total(self._pending.get(name, {})) for name in names])
        self._pending = {name: {} for name in names}
        for name, (count, s, q) in zip(names, totals, strict=True):
            if count > 0 or not self._keep_previous or name not in self._moments:
                self._moments[name] = (count, s, q)

    def names(self) -> list[str]:
        """The names known at the last update, in the order of their first reports."""
        return list(self._moments)

    def num(self, name: str) -> int:
        """How many numbers were reported."""
        return int(self._get(name)[0])

    def mean(self, name: str) -> float:
        """Their mean."""
        count, s, _q = self._get(name)
        return s / count if count > 0 and math.isfinite(s) else math.nan

    def std(self, name: str) -> float:
        """Their standard deviation, with divisor c."""
        count, s, q = self._get(name)
        if count == 0 or not math.isfinite(s):
            return math.nan
        return math.sqrt(max(q / count - (s / count) ** 2, 0.0)) if count > 1 else 0.0

    def as_dict(self) -> dnnlib.EasyDict:
        """name → {num, mean, std}, for all names."""
        return dnnlib.EasyDict(
            {
                name: dnnlib.EasyDict(num=self.num(name), mean=self.mean(name), std=self.std(name))
                for name in self.names()
            }
        )

    def __getitem__(self, name: str) -> float:
        """`mean(name)`."""
        return self.mean(name)

    def _get(self, name: str) -> tuple[float, float, float]:
        return self._moments.get(name, (0.0, 0.0, 0.0))

    def _matches(self, name: str) -> bool:
        return self._regex.fullmatch(name) is not None

    def _add(self, name: str, moments: torch.Tensor | None) -> None:
        sums = self._pending.setdefault(name, {})
        if moments is not None:
            # Not in place: `moments` may belong to several collectors, or stem from inference mode.
            old = sums.get(moments.device)
            sums[moments.device] = moments if old is None else old + moments


# ----------------------------------------------------------------------------
# Sums.


@torch.no_grad()
def _moments(value: Any) -> torch.Tensor | None:
    """float64 [count, sum, sum of squares] on the device of the value; None if it is empty.

    The count is made in float64, because float32 cannot hold it beyond 2²⁴. mps has no float64: from there the sums go
    to the CPU.
    """
    x = (value if isinstance(value, torch.Tensor) else torch.tensor(value)).detach().to(torch.float32)
    if x.numel() == 0:
        return None
    sums = torch.stack([x.sum(), x.square().sum()])
    if sums.device.type == 'mps':
        sums = sums.cpu()
    sums = sums.to(torch.float64)
    return torch.cat([sums.new_full((1,), x.numel()), sums])


def _total(sums: dict[torch.device, torch.Tensor]) -> list[float]:
    """[count, sum, sum of squares] over the devices of this process."""
    columns = zip([0.0, 0.0, 0.0], *(t.tolist() for t in sums.values()), strict=True)
    return [sum(column) for column in columns]


def _union_over_ranks(names: list[str]) -> list[str]:
    """All names that any rank knows, in the same order everywhere, which adding up over the ranks relies on."""
    if _sync_device is None:
        return names
    per_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(per_rank, names)
    return list(dict.fromkeys(name for known in per_rank for name in known))


def _sum_over_ranks(totals: list[list[float]]) -> list[list[float]]:
    if _sync_device is None or not totals:
        return totals
    sums = torch.tensor(totals, dtype=torch.float64, device=_sync_device)
    dist.all_reduce(sums)
    return sums.tolist()


default_collector = Collector()
