"""Ctrl-C, SIGTERM and a terminal that closes, noted until the run can end well."""

import os
import signal
import threading
import time
from typing import Any

from torch_utils import distributed as dist

SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, 'SIGHUP') else [])]
IMPATIENCE_SEC = 1  # a repeated signal within it is taken for the same one
GRACE_SEC = 20  # what is left to a loading process after SIGTERM


class Interrupts:
    """Inside the `with` block, the `SIGNALS` end nothing; `received` is the name of the last one, or None.

    A SIGHUP that is ignored, as nohup has it, stays so.
    In a single process the second one, a second later or more, does what it does outside. With several, launchers send
    each signal twice. Outside the main thread, where Python allows no handlers, all stays as it is.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'Interrupts':
        if threading.current_thread() is threading.main_thread():
            ignored = [number for number in SIGNALS[2:] if signal.getsignal(number) is signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS if number not in ignored}
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.received is None:
            self._first = time.monotonic()
        elif dist.get_world_size() == 1 and time.monotonic() > self._first + IMPATIENCE_SEC:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self.received = signal.Signals(number).name


def outlast_signals(_worker_id: int) -> None:
    """For a loading process: feed the main process on, which gets the same signal, until that has ended its run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == 'posix':
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SEC))
