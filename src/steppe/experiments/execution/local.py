"""Train several runs at a time in processes of this machine."""

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.execution.pool import ProcessPool, Worker
from steppe.experiments.execution.worker import POLL_SECONDS, RunTask, train_task
from steppe.experiments.execution.workers import WorkerExecutor


class LocalExecutor(WorkerExecutor[Worker]):
    """Trains `capacity` runs at a time in a pool of processes, which ends with the context."""

    def __init__(self, recipe: Recipe, capacity: int, console: Console) -> None:
        super().__init__(recipe, console)
        self._max = capacity
        self._pool = ProcessPool()
        self._data: Dataset | None = None
        self._pickled = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        self._pool.__exit__(kind, error, trace)

    def _capacity(self) -> int:
        return self._max

    def _share(self, data: Dataset) -> None:
        if data is not self._data:
            # pickle, because multiprocessing would use shared memory, of which containers have little
            self._data, self._pickled = data, pickle.dumps(data)

    def _start(self, task: RunTask) -> Worker:
        return self._pool.submit(partial(_train, task), self._pickled)

    def _wait(self, running: Sequence[Worker]) -> list[Worker]:
        return self._pool.wait(running, POLL_SECONDS)

    def _result(self, worker: Worker) -> str | None:
        result: str | None = self._pool.result(worker)
        return result

    def _kill(self, worker: Worker) -> None:
        self._pool.kill(worker)


def _train(task: RunTask, data: Dataset, report: Callable[..., None]) -> str | None:
    return train_task(task, data)  # its progress goes through the event file, as it does on Ray
