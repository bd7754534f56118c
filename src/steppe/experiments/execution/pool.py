"""Several jobs at a time, each in a process of its own with one CPU thread, and a line for each that is under way."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from queue import Empty
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from steppe.experiments.errors import ExperimentError

__all__ = ["Tell", "pooled"]

J = TypeVar("J")
T = TypeVar("T")

Tell = Callable[[str, int], None]
"""(what is being done, passes so far)."""

_EVERY = 0.5  # seconds between two messages of a job

_inbox: Any = None


class _Screen:
    """A line for each job in progress on a terminal; elsewhere one for each that is done."""

    def __init__(self, total: int, console: Console) -> None:
        self._console, self._total, self._done = console, total, 0
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[doing]}"),
        )
        self._lines = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, float] = {}
        self._ended: set[str] = set()

    def __enter__(self) -> Self:
        if self._lines is not None:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None:
            self._lines.stop()

    def say(self, name: str, what: str, passes: int) -> None:
        """A job told where it is."""
        self._begun.setdefault(name, time.monotonic())
        if self._lines is None or name in self._ended:  # what it told last may come after its end
            return
        if name not in self._tasks:
            self._tasks[name] = self._lines.add_task(name, doing="", total=None)
        self._lines.update(self._tasks[name], doing=f"{what} (pass {passes})")

    def done(self, name: str) -> None:
        """A job came to its end."""
        self._done += 1
        self._ended.add(name)
        if self._lines is not None and name in self._tasks:
            self._lines.remove_task(self._tasks.pop(name))
        seconds = time.monotonic() - self._begun.get(name, time.monotonic())
        self._console.print(
            f"{name}: measured in {seconds:.0f} s ({self._done} of {self._total})", highlight=False, soft_wrap=True
        )


def pooled(work: Callable[[J, Tell], T], jobs: Sequence[tuple[str, J]], most: int, console: Console) -> list[T]:
    """Do each job, `most` at a time; return what they give, in their order.

    One at a time is done in this process, with all of its threads. The first error ends the others.
    """
    with _Screen(len(jobs), console) as screen:
        if most == 1 or len(jobs) == 1:
            return [_here(work, name, job, screen) for name, job in jobs]
        return _apart(work, jobs, most, screen) if jobs else []


def _here(work: Callable[[J, Tell], T], name: str, job: J, screen: _Screen) -> T:
    result = work(job, lambda what, passes: screen.say(name, what, passes))
    screen.done(name)
    return result


def _apart(work: Callable[[J, Tell], T], jobs: Sequence[tuple[str, J]], most: int, screen: _Screen) -> list[T]:
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit torch's threads, half alive
    with ExitStack() as stack:
        inbox = stack.enter_context(spawn.Manager()).Queue()
        pool = ProcessPoolExecutor(min(most, len(jobs)), spawn, initializer=_begin, initargs=(inbox,))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        futures: dict[Future[T], str] = {pool.submit(_do, work, name, job): name for name, job in jobs}
        waiting = set(futures)
        while waiting:
            with suppress(Empty):
                screen.say(*inbox.get(timeout=_EVERY))
            for future in [f for f in waiting if f.done()]:
                waiting.discard(future)
                _checked(future)
                screen.done(futures[future])
        return [future.result() for future in futures]


def _checked(future: Future[Any]) -> None:
    try:
        future.result()
    except BrokenProcessPool as error:
        raise ExperimentError(
            "a process that measures was killed, perhaps because memory ran out: say --processes 1, or fewer "
            "--samples; what is measured already is kept"
        ) from error


def _begin(inbox: Any) -> None:
    global _inbox
    _inbox = inbox
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process: the first one says so
    torch.set_num_threads(1)


def _do(work: Callable[[J, Tell], T], name: str, job: J) -> T:
    told = -_EVERY

    def tell(what: str, passes: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _EVERY:
            told = time.monotonic()
            _inbox.put((name, what, passes))

    return work(job, tell)
