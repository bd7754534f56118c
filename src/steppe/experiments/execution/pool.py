"""A pool of worker processes on this machine, for runs and for measurements.

Neither concurrent.futures nor loky can replace it: when one of their workers is killed, they end all the others, and
each run in progress would lose what it did since its checkpoint. Here, only the task of that worker fails.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from steppe.experiments.errors import ExperimentError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTHING = pickle.dumps(None)
_EXPECTED = (ExperimentError, OSError)
"""Errors with a message for the user, which a worker sends as they are; of others, it sends the traceback."""

Task = Callable[[Any, Callable[..., None]], Any]
"""A function of the shared value and of a function that reports progress; it must be picklable."""


class WorkerDied(Exception):  # noqa: N818 (the name of the event)
    """A worker ended before its task did; the message is the cause."""


class Worker:
    """A worker process and the local end of its pipe; it executes one task after the other."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a forked process would inherit torch's threads in a broken state
        self.pipe, remote = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(remote,), daemon=True)
        self._ready = False
        self._shared: bytes | None = None
        self._unsent: list[bytes] = []
        self._reply: tuple[str, Any] | None = None
        self._on_progress: Callable[..., None]
        with _signals_blocked():
            self._process.start()
        remote.close()

    @property
    def sentinel(self) -> int:
        """A handle that is ready when the process has ended."""
        return self._process.sentinel

    def submit(self, task: Task, shared: bytes, on_progress: Callable[..., None]) -> None:
        """Start a task; OSError when the process is dead. `shared` is sent only if it differs from the last one."""
        self._unsent = [*([] if shared is self._shared else [pickle.dumps("shared"), shared]), pickle.dumps(task)]
        self._shared, self._reply, self._on_progress = shared, None, on_progress
        if self._ready:
            self._send()

    def receive(self) -> bool:
        """Handle one message; True if the task has ended or the process is dead."""
        if not self.pipe.poll():
            return True
        with suppress(EOFError, OSError):
            kind, content = self.pipe.recv()
            if kind == "ready":  # what is sent before would fill the pipe and block this process
                self._ready = True
                self._send()
                return False
            if kind == "progress":
                self._on_progress(*content)
                return False
            self._reply = kind, content
        return True

    def result(self) -> Any:
        """Return the task's result; raises what the task raised, or WorkerDied."""
        if self._reply is None:
            raise WorkerDied(self._cause_of_death())
        kind, content = self._reply
        if kind == "error":
            raise content
        return content

    def kill(self) -> None:
        """End the process at once, and wait until it has ended."""
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _send(self) -> None:
        for message in self._unsent:
            self.pipe.send_bytes(message)
        self._unsent = []

    def _cause_of_death(self) -> str:
        self._process.join(1)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"it was ended by {signal.Signals(-code).name}, by another program or because memory ran out"
        if not self._ready:
            raise ExperimentError(
                f"a worker process could not be started (exit code {code}), for the reason printed above. A script "
                'that trains several runs at a time must do so under `if __name__ == "__main__":`; else say '
                "runs_at_once=1"
            )
        return f"it ended with code {code}"


class ProcessPool(AbstractContextManager["ProcessPool"]):
    """Worker processes, each used for one task after the other; all of them end with the context."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        for worker in list(self._workers):
            self.kill(worker)

    def submit(
        self, task: Task, shared: bytes = _NOTHING, on_progress: Callable[..., None] = lambda *values: None
    ) -> Worker:
        """Start a task in an idle process or a new one; `shared` is a pickled value for it."""
        while self._idle:
            worker = self._idle.pop()
            try:
                worker.submit(task, shared, on_progress)
            except OSError:  # it was killed while it was idle
                self.kill(worker)
            else:
                return worker
        self._workers.append(worker := Worker())
        worker.submit(task, shared, on_progress)
        return worker

    def wait(self, workers: Sequence[Worker], timeout: float) -> list[Worker]:
        """Wait until a task ends, for `timeout` seconds at most; return the workers whose task has ended."""
        ready = connection.wait([handle for w in workers for handle in (w.pipe, w.sentinel)], timeout)
        return [w for w in workers if (w.pipe in ready or w.sentinel in ready) and w.receive()]

    def result(self, worker: Worker) -> Any:
        """Return the result of a task that has ended; raises what the task raised, or WorkerDied."""
        try:
            result = worker.result()
        except BaseException:
            self.kill(worker)
            raise
        self._idle.append(worker)
        return result

    def kill(self, worker: Worker) -> None:
        """End a worker and its task at once."""
        self._workers.remove(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        worker.kill()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep Ctrl-C from a process that is started here until it ignores the signal itself."""
    if not hasattr(signal, "pthread_sigmask"):  # not on Windows
        yield
        return
    resource_tracker.ensure_running()  # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection) -> None:
    """Execute the tasks that come through the pipe, as long as the parent process lives."""
    for number in _SIGNALS:  # Ctrl-C reaches every process of a terminal; the parent decides when to stop
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    pipe.send(("ready", None))
    shared: Any = None
    while True:
        task = pickle.loads(pipe.recv_bytes())
        if task == "shared":
            shared = pickle.loads(pipe.recv_bytes())
            continue
        try:
            pipe.send(("result", task(shared, lambda *values: pipe.send(("progress", values)))))
        except _EXPECTED as error:
            pipe.send(("error", error))
        except Exception:
            pipe.send(("error", RuntimeError(f"a worker failed:\n{traceback.format_exc()}")))


def _exit_with_parent() -> None:
    """End this process with its parent: an orphan would hold the locks of runs that the next session resumes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)  # at any moment: checkpoints are written atomically
