"""A pool of worker processes on this machine, for runs and for measurements.

Neither concurrent.futures nor loky can replace it: when one of their workers is killed, they end all the others, and
each run in progress would lose what it did since its checkpoint. Here, only the task of that worker fails. An executor
of concurrent.futures for each worker hides the exit code that names the cause of its death.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Self

import cloudpickle  # type: ignore[import-untyped]

from steppe.experiments.errors import ExperimentError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Task = Callable[[Callable[..., None]], Any]
"""A function of a function that reports progress; it must be picklable."""


class WorkerDied(Exception):  # noqa: N818 (the name of the event)
    """A worker ended before its task did; the message is the cause."""


class Worker:
    """A worker process and the local end of its pipe; it executes one task after the other."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a forked process would inherit torch's threads in a broken state
        self.pipe, remote = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(remote,), daemon=True)
        self._ready = False
        self.reply: tuple[str, Any] | None
        with _signals_blocked():
            self.process.start()
        remote.close()

    def submit(self, task: Task, on_progress: Callable[..., None]) -> None:
        """Start a task, once the process is ready."""
        self._task, self._on_progress, self.reply = task, on_progress, None
        if self._ready:
            with suppress(OSError):  # the process is dead, which wait() notices
                self._send()

    def receive(self) -> bool:
        """Handle one message; True if the task has ended or the process is dead."""
        with suppress(EOFError, OSError):
            if not self.pipe.poll():
                return True
            kind, content = self.pipe.recv()
            if kind == "ready":  # what is sent before would fill the pipe and block this process
                self._ready = True
                self._send()
                return False
            if kind == "progress":
                self._on_progress(*content)
                return False
            self.reply = kind, content
        return True

    def _send(self) -> None:
        # By value where a function has no name to import it by, as in a notebook. And pickled here, because
        # multiprocessing would share tensors by a memory of which containers have little.
        self.pipe.send_bytes(cloudpickle.dumps(self._task))

    def death(self) -> Exception:
        """Return the error of a task whose process has died."""
        self.process.join(1)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return WorkerDied(f"it was ended by {name}, by another program or because memory ran out")
        if self._ready:
            return WorkerDied(f"it ended with code {code}")
        return ExperimentError(
            f"a worker process could not be started (exit code {code}), for the reason printed above. A script "
            'that trains several runs at a time must do so under `if __name__ == "__main__":`; else say '
            "runs_at_once=1"
        )


class ProcessPool:
    """Worker processes, each used for one task after the other; all of them end with the context."""

    def __init__(self) -> None:
        self._workers, self._idle = set[Worker](), list[Worker]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in set(self._workers):
            self.kill(worker)

    def submit(self, task: Task, on_progress: Callable[..., None] = lambda *values: None) -> Worker:
        """Start a task in an idle process or a new one."""
        self._idle = [worker for worker in self._idle if worker.process.is_alive()]  # the others were killed
        worker = self._idle.pop() if self._idle else Worker()
        self._workers.add(worker)
        worker.submit(task, on_progress)
        return worker

    def wait(self, workers: Sequence[Worker], timeout: float) -> list[Worker]:
        """Wait until a task ends, for `timeout` seconds at most; return the workers whose task has ended."""
        ready = connection.wait([handle for w in workers for handle in (w.pipe, w.process.sentinel)], timeout)
        # a dead process has open handles as long as the workers of its DataLoader live, which were forked from it
        ended = {w for w in workers if w.pipe in ready or w.process.sentinel in ready or not w.process.is_alive()}
        return [w for w in workers if w in ended and w.receive()]

    def result(self, worker: Worker) -> Any:
        """Return the result of a task that has ended; raises what the task raised, or WorkerDied."""
        kind, content = worker.reply or ("error", worker.death())
        if kind == "error":
            self.kill(worker)
            raise content
        self._idle.append(worker)
        return content

    def kill(self, worker: Worker) -> None:
        """End a worker and its task at once, and wait until it has ended."""
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


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
    multiprocessing.current_process().daemon = False  # else a DataLoader could not start workers here
    for number in _SIGNALS:  # Ctrl-C reaches every process of a terminal; the parent decides when to stop
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    pipe.send(("ready", None))
    while True:
        task = pickle.loads(pipe.recv_bytes())
        try:
            pipe.send(("result", task(lambda *values: pipe.send(("progress", values)))))
        except (ExperimentError, OSError) as error:  # with a message for the user
            pipe.send(("error", error))
        except Exception:
            pipe.send(("error", RuntimeError(f"a worker failed:\n{traceback.format_exc()}")))


def _exit_with_parent() -> None:
    """End this process with its parent: an orphan would hold the locks of runs that the next session resumes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)  # at any moment: checkpoints are written atomically
