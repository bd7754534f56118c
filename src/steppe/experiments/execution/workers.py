"""Train several runs at a time in workers, of this machine or of Ray, and resume the runs of workers that died."""

import math
import signal
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import Executor, Job, MakeTask, Outcome
from steppe.experiments.execution.forwarding import EventReader, EventWriter
from steppe.experiments.execution.pool import WorkerDied
from steppe.experiments.execution.progress import print_line
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stop, Stopped
from steppe.experiments.world import World, join

POLL_SECONDS = 0.25
_STOPPED = "stopped"
_RETRIES = 3
LOCK_SECONDS = 60.0  # time for the worker of a killed session to release the run's folder

W = TypeVar("W")


@dataclass(frozen=True)
class RunTask:
    """A job and the settings of the session, as a worker gets them."""

    job: Job
    stop_file: Path
    """A file that appears when the runs must stop."""
    interval: float
    torch_version: str


class PolledStop(Stop):
    """A request to stop that comes from another machine, so it is looked up now and then only."""

    def __init__(self, requested: Callable[[], bool]) -> None:
        super().__init__()
        self._requested, self._checked = requested, -math.inf

    def __bool__(self) -> bool:
        if not self.signal and time.monotonic() - self._checked > POLL_SECONDS:
            self._checked = time.monotonic()
            self.signal = signal.SIGINT if self._requested() else 0
        return self.signal != 0


@dataclass(frozen=True)
class Workplace:
    """The folder that a run trains in, its reporter and its request to stop."""

    folder: Path
    reporter: Reporter
    stop: Stop


@contextmanager
def _in_place(task: RunTask) -> Iterator[Workplace]:
    """Let a run train in the folder of its job."""
    folder = task.job.folder
    with RunFolder(folder).locked(timeout=LOCK_SECONDS):
        yield Workplace(folder, EventWriter(folder, task.interval), PolledStop(task.stop_file.exists))


def train_task(
    task: RunTask,
    make_task: MakeTask,
    workplace: Callable[[RunTask], AbstractContextManager[Workplace]] = _in_place,
) -> str | None:
    """Train a job in a worker; return the reason why it was not trained to the end, `_STOPPED`, or None."""
    job, hardware = task.job, task.job.run.recipe.hardware
    try:
        if task.torch_version != torch.__version__:
            raise ExperimentError(
                f"a worker has torch {torch.__version__} and the command {task.torch_version}, so its results could "
                "differ: install the same version on all machines"
            )
        with workplace(task) as place, join(hardware.device, hardware.threads) as world:
            train(job.run, place.folder, make_task(job.run.recipe), world, place.reporter, place.stop)
    except Stopped:
        return _STOPPED
    except ExperimentError as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error)
    return None


@dataclass
class _RunInProgress:
    job: Job
    task: RunTask
    events: EventReader
    retries: int = 0

    def close(self) -> None:
        self.events.poll()  # drain events written after the last poll
        self.events.close()


class WorkerExecutor(Executor, Generic[W]):
    """Trains as many runs at a time as there is room for; W is the handle of a worker with a task."""

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.world = recipe, World(torch.device("cpu"))
        self._console = console

    @abstractmethod
    def _capacity(self) -> int:
        """Return how many runs may be in progress at a time."""

    def _share(self, make_task: MakeTask, control: Path, stop_file: Path) -> AbstractContextManager[Any]:
        """Provide the function as `_start` takes it, until the runs have ended."""
        return nullcontext(make_task)

    @abstractmethod
    def _start(self, task: RunTask, shared: Any) -> W:
        """Let a worker call `train_task` with the task and the shared data."""

    @abstractmethod
    def _wait(self, running: Sequence[W]) -> list[W]:
        """Wait until a task ends, for `POLL_SECONDS` at most; return the workers whose task has ended."""

    @abstractmethod
    def _result(self, worker: W) -> str | None:
        """Return the result of `train_task`; raises WorkerDied, or the error of a bug."""

    @abstractmethod
    def _kill(self, worker: W) -> None:
        """End a worker at once; its run resumes at the last checkpoint."""

    def run(
        self, jobs: Iterable[Job], make_task: MakeTask, control: Path, reporter: Reporter, stop: Stop
    ) -> Generator[Outcome, None, None]:
        control = control.absolute()
        stop_file = control / f".stop-{uuid.uuid4().hex[:12]}"
        with self._share(make_task, control, stop_file) as shared:
            yield from self._run(iter(jobs), shared, control, stop_file, reporter, stop)
        if stop:
            raise Stopped(stop.signal)

    def _run(
        self, jobs: Iterator[Job], shared: Any, control: Path, stop_file: Path, reporter: Reporter, stop: Stop
    ) -> Generator[Outcome, None, None]:
        running, exhausted = dict[W, _RunInProgress](), False
        try:
            while True:
                while not exhausted and not stop and len(running) < self._capacity():
                    if (job := next(jobs, None)) is None:
                        exhausted = True
                    else:
                        one = self._in_progress(job, stop_file, reporter)
                        running[self._start(one.task, shared)] = one
                if not running:
                    if stop or exhausted:
                        break
                    time.sleep(POLL_SECONDS)  # there is no room at the moment: machines may join the cluster
                    continue
                if stop:
                    stop_file.touch()
                ended = self._wait(list(running))
                for one in running.values():
                    one.events.poll()
                for worker in ended:
                    one = running.pop(worker)
                    try:
                        error = self._result(worker)
                    except WorkerDied as died:
                        if one.retries < _RETRIES and not stop:
                            self._announce_retry(one, died)
                            running[self._start(one.task, shared)] = replace(one, retries=one.retries + 1)
                            continue
                        error = _final_error(one, died)
                    one.close()
                    if error != _STOPPED:
                        yield Outcome(one.job, error)
        finally:
            for worker in running:
                with suppress(Exception):
                    self._kill(worker)
            stop_file.unlink(missing_ok=True)

    def _in_progress(self, job: Job, stop_file: Path, reporter: Reporter) -> _RunInProgress:
        events = EventReader(job.run, job.folder, reporter)
        # a worker may have another working directory
        absolute = replace(job, folder=job.folder.absolute())
        return _RunInProgress(job, RunTask(absolute, stop_file, reporter.interval, torch.__version__), events)

    def _announce_retry(self, one: _RunInProgress, died: WorkerDied) -> None:
        print_line(
            self._console,
            f"{one.job.run.name}: its worker died ({died}); another one resumes it from its checkpoint, "
            f"retry {one.retries + 1} of {_RETRIES}",
        )


def _final_error(one: _RunInProgress, died: WorkerDied) -> str:
    return (
        f"{one.job.run.name} did not finish: its worker died {one.retries + 1} times, the last time because "
        f"{died}. Its checkpoint is kept, and the same command resumes it; if memory is short, train fewer runs at a "
        "time: --runs-at-once 1, or on Ray a larger --cpus-per-run"
    )
