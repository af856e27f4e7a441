"""How a run is asked to stop: by a scheduler's signal or Ctrl-C, noticed between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PREEMPTED = 75  # exit code: saved, start me again (EX_TEMPFAIL)
PATIENCE_S = 15.0  # in which a process has to notice the signal, unless it waits for another one that is gone


class Stop(Exception):
    """Raised in an evaluation when the run is to stop: it is left, and made again when the run resumes."""


class StopRequest:
    """Whether, and by what, the run was asked to stop.

    Attributes:
        signal: the first signal that came, None before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.answered = threading.Event()

    def __bool__(self) -> bool:
        if self.signal is not None:
            self.answered.set()
        return self.signal is not None

    def raise_if_asked(self, done: int = 0, total: int = 0) -> None:
        """Raise Stop; takes what the progress of an evaluation takes."""
        if self:
            raise Stop

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self.signal == signal.SIGINT


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for SIGTERM, SIGUSR1 and Ctrl-C; the handlers that were there come back afterwards.

    A second Ctrl-C interrupts at once. In a run of several processes one may wait, deaf, for another that has
    ended: it ends itself after PATIENCE_S, with the last checkpoint saved.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and request.signal is not None:
            raise KeyboardInterrupt
        request.signal = number

    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        numbers.append(signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        with _watchdog(request, {int(number) for number in numbers}):
            yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watchdog(request: StopRequest, numbers: set[int]) -> Iterator[None]:
    """End this process when it does not notice a signal, as while it waits in a collective operation.

    The interpreter writes a byte for each signal even then, and a thread reads it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    old = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while byte := os.read(reading, 1):
            if byte[0] in numbers and not request.answered.wait(PATIENCE_S):
                rank = os.environ.get("RANK", "0")
                print(
                    f"process {rank} waits for one that has stopped, and stops; the same command resumes "
                    "from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(PREEMPTED)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        os.close(writing)  # ends the thread
        with suppress(RuntimeError):
            thread.join()
        os.close(reading)
