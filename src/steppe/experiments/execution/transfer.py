"""Train on machines that do not see the run folder: what a run writes travels to the machine of the command.

Each file travels with the digest of its content, so one that was damaged on the way is not written.
"""

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError, first_line
from steppe.experiments.execution.executor import MakeTask
from steppe.experiments.execution.forwarding import EVENTS, EventWriter
from steppe.experiments.execution.workers import LOCK_SECONDS, PolledStop, RunTask, Workplace, train_task
from steppe.experiments.storage.files import write_atomically
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS, RunFolder

_TRIES, _SECONDS_BETWEEN = 4, 0.5


@dataclass(frozen=True)
class SentFile:
    """The content of a file on its way, with its digest."""

    content: bytes
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "SentFile":
        content = path.read_bytes()
        return cls(content, hashlib.sha256(content).hexdigest())

    def write(self, path: Path) -> None:
        """Write it atomically; ExperimentError if it was damaged on the way."""
        if hashlib.sha256(self.content).hexdigest() != self.sha256:
            raise ExperimentError(
                f"{path} was damaged on the way between two machines, and is not written: the same command resumes the "
                "run from its last checkpoint"
            )
        write_atomically(path, self.content)


def sees(token: Path) -> bool:
    """True if this machine sees the file that the command wrote: its name is unique, and it holds its name."""
    for attempt in range(_TRIES):
        try:
            return token.read_text() == token.name
        except OSError:
            if not token.parent.is_dir():
                return False
        if attempt < _TRIES - 1:  # a network file system may show a new file late
            time.sleep(_SECONDS_BETWEEN)
    return False


class Receiver:
    """Writes into the run folders what workers send; an actor of Ray on the machine of the command.

    Each time that a run is started, it is an attempt with a name of its own. Only the latest one may write: the worker
    of an earlier one may still train on a machine that only the network has lost.
    """

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._attempts: dict[Path, str] = {}
        self._locks: dict[Path, AbstractContextManager[None]] = {}

    def expect(self, folder: Path, attempt: str) -> None:
        """Let an attempt write from now on, and no earlier one."""
        self._attempts[folder] = attempt
        self._unlock(folder)  # the new one may see the folder, and lock it itself

    def begin(self, folder: Path, attempt: str) -> dict[str, SentFile]:
        """Return the files from which the attempt resumes; the folder stays locked until the run ends."""
        self._check(folder, attempt)
        self._unlock(folder)
        lock = RunFolder(folder).locked(timeout=LOCK_SECONDS)
        lock.__enter__()
        self._locks[folder] = lock
        path = folder / CHECKPOINT
        return {CHECKPOINT: SentFile.read(path)} if path.exists() else {}

    def append_event(self, folder: Path, attempt: str, line: str) -> None:
        self._check(folder, attempt)
        with (folder / EVENTS).open("a") as file:
            file.write(line)

    def store(self, folder: Path, attempt: str, files: Mapping[str, SentFile]) -> None:
        """Write files of a run, each atomically; ExperimentError if one was damaged on the way."""
        self._check(folder, attempt)
        for name, file in files.items():
            file.write(folder / name)

    def end(self, folder: Path, attempt: str) -> None:
        self._check(folder, attempt)
        self._unlock(folder)

    def stop_requested(self) -> bool:
        return self._stop_file.exists()

    def _unlock(self, folder: Path) -> None:
        if (lock := self._locks.pop(folder, None)) is not None:
            lock.__exit__(None, None, None)

    def _check(self, folder: Path, attempt: str) -> None:
        if self._attempts.get(folder) != attempt:
            raise ExperimentError(f"another worker has taken over the run in {folder}")


class _Sender(EventWriter):
    """Sends the progress and the files of a run to its receiver."""

    def __init__(self, receiver: "_Receiver", local: Path, interval: float) -> None:
        super().__init__(local, interval)
        self._receiver, self._local = receiver, local

    def begin(self, run: Run, *rest: Any) -> None:
        super().begin(run, *rest)
        self._send(METRICS)  # those of the checkpoint, or none

    def saved(self, run: Run) -> None:
        self._send(CHECKPOINT, METRICS)

    def _send(self, *names: str) -> None:
        self._receiver("store", {name: SentFile.read(self._local / name) for name in names})

    def _append(self, line: str) -> None:
        self._receiver("append_event", line)


class _Receiver:
    """The receiver of an attempt, called from its worker."""

    def __init__(self, actor: Any, folder: Path, attempt: str) -> None:
        self._actor, self._arguments = actor, (folder, attempt)

    def __call__(self, method: str, *values: Any) -> Any:
        return self._get(getattr(self._actor, method).remote(*self._arguments, *values))

    def stop_requested(self) -> bool:
        return bool(self._get(self._actor.stop_requested.remote()))

    def _get(self, reference: Any) -> Any:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # raised by the receiver; its text would be a traceback
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise ExperimentError(
                f"the process that receives the results is gone ({first_line(error)}). The checkpoint is kept, and "
                "the same command resumes the run"
            ) from error


@contextmanager
def _apart(actor: Any, attempt: str, task: RunTask) -> Iterator[Workplace]:
    """Let a run train in a temporary folder of this machine."""
    receiver = _Receiver(actor, task.job.folder, attempt)
    with tempfile.TemporaryDirectory(prefix="steppe-") as folder:
        local = Path(folder)
        for name, file in receiver("begin").items():
            file.write(local / name)
        try:
            yield Workplace(local, _Sender(receiver, local, task.interval), PolledStop(receiver.stop_requested))
        finally:
            receiver("end")


def train_anywhere(task: RunTask, make_task: MakeTask, token: Path, actor: Any, attempt: str) -> str | None:
    """Do as `train_task`, also on a machine that does not see the run folder; `actor` is a `Receiver` or None."""
    if sees(token):
        return train_task(task, make_task)
    if actor is None:
        return (
            f"a machine that joined Ray does not see {task.job.folder}: start the same command again, which resumes "
            "its runs and lets the results of that machine travel"
        )
    return train_task(task, make_task, partial(_apart, actor, attempt))
