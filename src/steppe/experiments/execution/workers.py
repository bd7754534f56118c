"""Runs in other processes: what a worker does with one, and how several are handed out and looked after."""

from __future__ import annotations

import math
import signal
import time
import uuid
from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.events import EventReader, EventWriter
from steppe.experiments.execution.executor import Executor, Job, Outcome
from steppe.experiments.execution.progress import Reporter, TensorBoard, Together
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stop, Stopped
from steppe.experiments.world import World, join

__all__ = ["TICK", "WorkerDied", "Task", "Workers", "work"]

_RETRIES = 3
TICK = 0.25
"""Seconds between two looks at the runs."""
_PATIENCE = 60.0  # seconds that a worker waits for another one, of a session that was killed, to let go of the run
_STOPPED = "stopped"

W = TypeVar("W")


class WorkerDied(Exception):  # noqa: N818 (it says what happened)
    """A worker ended before its run did; the message says how."""


@dataclass(frozen=True)
class Task:
    """What a worker gets."""

    job: Job
    stop: Path
    """A file that appears when the runs shall stop."""
    tensorboard: Path | None
    interval: float
    torch: str


@dataclass
class _Running:
    job: Job
    task: Task
    event_reader: EventReader
    retries: int = 0


class Workers(Executor, Generic[W]):
    """Hands jobs to workers, as many at a time as there is room for; W is what stands for one with a task."""

    together = True

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.world = recipe, World(torch.device("cpu"))
        self._console = console

    @abstractmethod
    def _room(self) -> int:
        """How many runs there may be at a time."""

    @abstractmethod
    def _share(self, data: Dataset) -> None:
        """Make this the data of the tasks to come."""

    @abstractmethod
    def _begin(self, task: Task) -> W:
        """Let a worker do `work` with the task and the data."""

    @abstractmethod
    def _wait(self, running: Sequence[W]) -> list[W]:
        """Wait until one of them has ended, for `TICK` at most; return those that have."""

    @abstractmethod
    def _end(self, worker: W) -> str | None:
        """Return what `work` returned; raises Died, or what was raised in the worker, which is a mistake of ours."""

    @abstractmethod
    def _drop(self, worker: W) -> None:
        """End a worker at once: nobody wants its run any more, and its checkpoint is whole."""

    def run(
        self, jobs: Iterable[Job], data: Dataset, control: Path, reporter: Reporter, stop: Stop
    ) -> Generator[Outcome, None, None]:
        """Train the jobs."""
        stopping = control.absolute() / f".stop-{uuid.uuid4().hex[:12]}"
        self._share(data)
        todo, running, more = iter(jobs), dict[W, _Running](), True
        try:
            while True:
                while more and not stop and len(running) < self._room():
                    if (job := next(todo, None)) is None:
                        more = False
                        break
                    task = self._task(job, control, stopping, reporter)
                    event_reader = EventReader(job.run, job.folder, reporter)
                    running[self._begin(task)] = _Running(job, task, event_reader)
                if not running:
                    if stop or not more:
                        break
                    time.sleep(TICK)  # all machines are gone: others may come
                    continue
                if stop:
                    stopping.touch()
                done = self._wait(list(running))
                for one in running.values():
                    one.event_reader.poll()
                for worker in done:
                    one = running.pop(worker)
                    try:
                        error = self._end(worker)
                    except WorkerDied as died:
                        if one.retries < _RETRIES and not stop:
                            self._tell_of_retry(one, died)
                            running[self._begin(one.task)] = replace(one, retries=one.retries + 1)
                            continue
                        error = _given_up(one, died)
                    one.event_reader.poll()  # its last words may have come between the look and the end
                    one.event_reader.close()
                    if error != _STOPPED:
                        yield Outcome(one.job, error)
        finally:
            for worker in running:
                with suppress(Exception):
                    self._drop(worker)
            stopping.unlink(missing_ok=True)
        if stop:
            raise Stopped(stop.signal)

    def _task(self, job: Job, control: Path, stopping: Path, reporter: Reporter) -> Task:
        board = control.absolute() / "tensorboard" if self.recipe.tensorboard else None
        job = replace(job, folder=job.folder.absolute())
        return Task(job, stopping, board, reporter.interval, torch.__version__)

    def _tell_of_retry(self, one: _Running, died: WorkerDied) -> None:
        self._console.print(
            f"{one.job.run.name}: its worker died ({died}); it goes on from its checkpoint in another, "
            f"retry {one.retries + 1} of {_RETRIES}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def work(task: Task, data: Dataset) -> str | None:
    """Train a job in a worker; return why it could not be trained, that it was stopped, or None."""
    try:
        if task.torch != torch.__version__:
            raise ExperimentError(
                f"a worker has torch {torch.__version__} and the command {task.torch}, so its results could differ: "
                "install the same version on all machines"
            )
        with _alone(task.job.folder), join(task.job.run.recipe) as world:
            reporter: Reporter = EventWriter(task.job.folder, task.interval)
            if task.tensorboard is not None:
                reporter = Together(reporter, TensorBoard(task.tensorboard))
            with reporter:
                train(task.job.run, task.job.folder, data.to(world.device), world, reporter, _Asked(task.stop))
    except Stopped:
        return _STOPPED
    except ExperimentError as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error)
    return None


class _Asked(Stop):
    """Whether a file is there; looked for now and then only, since it may lie on another machine."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._looked = path, -math.inf

    def __bool__(self) -> bool:
        if not self.signal and time.monotonic() - self._looked > TICK:
            self._looked = time.monotonic()
            self.signal = signal.SIGINT if self._path.exists() else 0
        return self.signal != 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder; the worker of a session that was killed may need a moment to let go of it."""
    end = time.monotonic() + _PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(RunFolder(folder).locked())
                break
            except ExperimentError:
                if time.monotonic() > end:
                    raise
                time.sleep(TICK)
        yield


def _given_up(one: _Running, died: WorkerDied) -> str:
    return (
        f"{one.job.run.name} did not finish: its worker died {one.retries + 1} times, the last time because "
        f"{died}. Its checkpoint is kept, and the same command goes on; if memory is short, let fewer run at a time: "
        "--runs-at-once 1, or on Ray a larger --cpus-per-run"
    )
