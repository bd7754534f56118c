"""Train one run in a worker process, of this machine or of Ray."""

import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.events import EventWriter
from steppe.experiments.execution.executor import Job
from steppe.experiments.execution.tensorboard import TensorBoard
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stop, Stopped
from steppe.experiments.world import join

POLL_SECONDS = 0.25
STOPPED = "stopped"

_LOCK_SECONDS = 60.0  # time for the worker of a killed session to release the run's folder


@dataclass(frozen=True)
class RunTask:
    """A job and the settings of the session, as a worker gets them."""

    job: Job
    stop_file: Path
    """A file that appears when the runs must stop."""
    tensorboard: Path | None
    interval: float
    torch_version: str


class StopFile(Stop):
    """A request to stop by a file, which may lie on another machine, so it is looked up now and then only."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._checked = path, -math.inf

    def __bool__(self) -> bool:
        if not self.signal and time.monotonic() - self._checked > POLL_SECONDS:
            self._checked = time.monotonic()
            self.signal = signal.SIGINT if self._path.exists() else 0
        return self.signal != 0


def train_task(task: RunTask, data: Dataset) -> str | None:
    """Train a job in a worker; return the reason why it was not trained to the end, `STOPPED`, or None."""
    job, recipe = task.job, task.job.run.recipe
    try:
        if task.torch_version != torch.__version__:
            raise ExperimentError(
                f"a worker has torch {torch.__version__} and the command {task.torch_version}, so its results could "
                "differ: install the same version on all machines"
            )
        with (
            RunFolder(job.folder).locked(timeout=_LOCK_SECONDS),
            join(recipe.hardware.device, recipe.hardware.threads) as world,
        ):
            reporter: Reporter = EventWriter(job.folder, task.interval)
            if task.tensorboard is not None:
                reporter = TensorBoard(task.tensorboard, reporter)
            with reporter:
                train(job.run, job.folder, data.to(world.device), world, reporter, StopFile(task.stop_file))
    except Stopped:
        return STOPPED
    except ExperimentError as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error)
    return None
