"""The progress bar of a run of several processes."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from torch_utils import distributed as dist


@contextlib.contextmanager
def progress_bar(total: int, todo: int, steps: int) -> Iterator[Callable[[], None]]:
    """A bar over the images of all processes; gives what to call after each of the `steps` of this one.

    Rank 0 shows its own share for that of all, so nothing is exchanged: the batches are nearly equal, and it has as
    many as any. What was finished before counts at once.
    """
    layout = '{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]'
    done = 0
    # The first step may take minutes, so a terminal shows the bar at once, and without it the errors that the sampler
    # finds in its arguments. From a file it could not go again: there it waits.
    with tqdm(
        desc=f'Sampling {total} images',
        total=total,
        initial=total - todo,
        unit=' images',
        bar_format=layout,
        delay=0 if sys.stderr.isatty() else 0.1,
        disable=dist.get_rank() != 0 or not todo,
    ) as bar:

        def step_done() -> None:
            nonlocal done
            done += 1
            bar.update(total - todo + todo * done // steps - bar.n)

        try:
            yield step_done
        finally:
            bar.leave = done > 0
        bar.update(total - bar.n)
