"""Train runs on this machine: in this process, one after the other, or several at a time in processes of a pool."""

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import Executor, Job, Outcome
from steppe.experiments.execution.pool import ProcessPool, Worker
from steppe.experiments.execution.tensorboard import with_tensorboard
from steppe.experiments.execution.workers import POLL_SECONDS, RunTask, WorkerExecutor, train_task
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stop
from steppe.experiments.world import World


class InProcessExecutor(Executor):
    """Trains one run at a time, in this process or in all of torchrun's processes together."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world = recipe, world

    def run(
        self, jobs: Iterable[Job], data: Dataset, control: Path, reporter: Reporter, stop: Stop
    ) -> Generator[Outcome, None, None]:
        data = data.to(self.world.device)
        for job in jobs:
            try:
                with with_tensorboard(reporter, job.run, control, self.world) as logged:
                    train(job.run, job.folder, data, self.world, logged, stop)
            except ExperimentError as error:
                if self.world.size > 1:  # the other processes may not have met it, and would wait for this one forever
                    raise
                yield Outcome(job, str(error))
            else:
                yield Outcome(job)


class LocalExecutor(WorkerExecutor[Worker]):
    """Trains `capacity` runs at a time in a pool of processes, which ends with the context."""

    def __init__(self, recipe: Recipe, capacity: int, console: Console) -> None:
        super().__init__(recipe, console)
        self._max = capacity
        self._pool = ProcessPool()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.__exit__(*exception)

    def _capacity(self) -> int:
        return self._max

    def _start(self, task: RunTask, shared: Dataset) -> Worker:
        return self._pool.submit(partial(_train, task, shared))

    def _wait(self, running: Sequence[Worker]) -> list[Worker]:
        return self._pool.wait(running, POLL_SECONDS)

    def _result(self, worker: Worker) -> str | None:
        result: str | None = self._pool.result(worker)
        return result

    def _kill(self, worker: Worker) -> None:
        self._pool.kill(worker)


def _train(task: RunTask, data: Dataset, report: Callable[..., None]) -> str | None:
    return train_task(task, data)  # its progress goes through the event file, as it does on Ray
