"""Stop a run where it can resume: a signal is recorded, and the training loop checks it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):  # noqa: N818 (no error: the run stopped on request)
    """Training stopped on request, after a checkpoint; `signal` is the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stop:
    """A request to stop: true once a signal has arrived; `signal` is its number, or 0."""

    def __init__(self) -> None:
        self.signal = 0

    def __bool__(self) -> bool:
        return self.signal != 0


@contextmanager
def on_signals() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second one ends the process at once.

    Outside the main thread, where Python delivers no signals, there is never a request.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def remember(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        for other in numbers:
            signal.signal(other, before[other])

    for number in numbers:
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, before[number])
