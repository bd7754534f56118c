"""Runs in processes of this machine, several at a time; a run whose process dies goes on in another."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.progress import TensorBoard
from steppe.experiments.execution.workers import TICK, Task, WorkerDied, Workers, work

__all__ = ["Processes"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Process:
    """A worker, and this end of the pipe to it; it takes one task after the other."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a forked process would inherit torch's threads, half alive
        self.pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self._ready = False
        self._data: bytes | None = None
        self._unsaid: list[bytes] = []
        with _signals_held():
            self._process.start()
        theirs.close()

    def give(self, task: Task, data: bytes) -> None:
        """Let it train; OSError when it is dead. `data` goes with the first task that needs it."""
        self._unsaid = [*([] if data is self._data else [data]), pickle.dumps(task)]
        self._data = data
        if self._ready:
            self._say()

    def look(self) -> bool:
        """Whether it has ended its task, or is dead; call it when there is something in the pipe, or when it died."""
        if self._ready or not self.pipe.poll():
            return True
        with suppress(EOFError, OSError):
            self.pipe.recv()  # it has started: what is said earlier would wait in the pipe, and we with it
            self._ready = True
            self._say()
            return False
        return True

    def result(self) -> str | None:
        """What `work` returned; raises Died, or RuntimeError with a mistake's traceback."""
        try:
            kind, said = self.pipe.recv()
        except (EOFError, OSError):
            raise WorkerDied(self._how()) from None
        if kind == "mistake":
            raise RuntimeError(f"a worker failed:\n{said}")
        return None if said is None else str(said)

    def kill(self) -> None:
        """End it at once, and wait until it has."""
        self._process.kill()
        self._process.join()
        self.pipe.close()

    @property
    def sentinel(self) -> int:
        """Ready when the process has ended."""
        return self._process.sentinel

    def _say(self) -> None:
        for words in self._unsaid:
            self.pipe.send_bytes(words)
        self._unsaid = []

    def _how(self) -> str:
        self._process.join(TICK)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"it was ended by {signal.Signals(-code).name}, by somebody or because memory ran out"
        if not self._ready:
            raise ExperimentError(
                f"a process for a run could not be started (exit code {code}), and says why above. A script that "
                'trains several runs at a time does so under `if __name__ == "__main__":`; else say runs_at_once=1'
            )
        return f"it ended with code {code}"


class Processes(Workers[_Process]):
    """Trains `most` runs at a time on this machine. Use it as a context manager: it keeps its processes until then."""

    def __init__(self, recipe: Recipe, most: int, console: Console) -> None:
        super().__init__(recipe, console)
        self._most = most
        self._idle: list[_Process] = []
        self._given: Dataset | None = None
        self._data = b""

    def __enter__(self) -> Self:
        if self.recipe.tensorboard:
            TensorBoard(self.recipe.folder)  # where it is not installed, say so once, and now
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        while self._idle:
            self._idle.pop().kill()

    def _room(self) -> int:
        return self._most

    def _share(self, data: Dataset) -> None:
        if data is not self._given:
            # not as multiprocessing does it, by shared memory: there is little of it in a container
            self._given, self._data = data, pickle.dumps(data)

    def _begin(self, task: Task) -> _Process:
        while self._idle:
            process = self._idle.pop()
            try:
                process.give(task, self._data)
            except OSError:  # it was killed while it had nothing to do
                process.kill()
            else:
                return process
        process = _Process()
        process.give(task, self._data)
        return process

    def _wait(self, running: Sequence[_Process]) -> list[_Process]:
        ready = connection.wait([it for one in running for it in (one.pipe, one.sentinel)], timeout=TICK)
        return [one for one in running if (one.pipe in ready or one.sentinel in ready) and one.look()]

    def _end(self, worker: _Process) -> str | None:
        try:
            result = worker.result()
        except BaseException:
            worker.kill()
            raise
        self._idle.append(worker)
        return result

    def _drop(self, worker: _Process) -> None:
        worker.kill()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep Ctrl-C from a process that is started here, until it can decide for itself: it is not meant."""
    resource_tracker.ensure_running()  # which lets signals through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection) -> None:
    """Train what comes through the pipe, for as long as whoever started this process lives."""
    for number in _SIGNALS:  # they reach every process of a terminal; the first one tells when to stop
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(None)
    data: Dataset | None = None
    while True:
        said = pickle.loads(pipe.recv_bytes())
        if isinstance(said, Dataset):
            data = said
            continue
        assert data is not None
        try:
            pipe.send(("done", work(said, data)))
        except Exception:
            pipe.send(("mistake", traceback.format_exc()))


def _end_with_parent() -> None:
    """Nobody reads what is trained for a session that was killed, and its next one waits for the runs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)  # at any moment, as if this process had been killed with it: checkpoints are whole
