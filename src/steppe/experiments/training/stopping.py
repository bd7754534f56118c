"""Stop a run where it can resume: a signal is recorded, and the training loop checks it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

    def remember(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        handlers.close()

    with ExitStack() as handlers:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers.callback(signal.signal, number, signal.getsignal(number))
                signal.signal(number, remember)
        yield stop
