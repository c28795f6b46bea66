"""What ends a run, in one line on the terminal."""

import contextlib
from collections.abc import Iterator

import click

from dnnlib.util import one_line, printable
from torch_utils import misc


def out_of_memory_line(err: Exception) -> str | None:
    """What to say where `err` is a lack of memory, the device's or the computer's; None for any other error."""
    return f'out of memory: {one_line(err, 200)}; lower --batch' if misc.is_out_of_memory(err) else None


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a file, an option or a lack of memory brings about into one line and an exit status."""
    try:
        yield
    except (OSError, ValueError) as err:
        raise click.ClickException(printable(err)) from None
    except (RuntimeError, MemoryError) as err:
        message = out_of_memory_line(err)
        if message is None:
            raise
        raise click.ClickException(message) from None
