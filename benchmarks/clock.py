"""The clock that benchmarks read."""

import time
from collections.abc import Callable

import torch


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds. On a CPU processor time, summed over all threads, which other programs disturb less."""
    return time.process_time if device.type == 'cpu' else time.perf_counter
