"""Make the executor for some options, and train runs on this machine: in this process, or in processes of a pool."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.resolve import resolve
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution import cpus
from steppe.experiments.execution.executor import ExecutionOptions, Executor, Job, MakeTask, Outcome
from steppe.experiments.execution.pool import ProcessPool, Worker
from steppe.experiments.execution.ray import RayExecutor, connect
from steppe.experiments.execution.workers import POLL_SECONDS, RunTask, WorkerExecutor, train_task
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stop
from steppe.experiments.world import World, join, launched


class InProcessExecutor(Executor):
    """Trains one run at a time, in this process or in all of torchrun's processes together."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world = recipe, world

    def run(
        self, jobs: Iterable[Job], make_task: MakeTask, control: Path, reporter: Reporter, stop: Stop
    ) -> Generator[Outcome, None, None]:
        for job in jobs:
            try:
                train(job.run, job.folder, make_task(job.run.recipe), self.world, reporter, stop)
            except ExperimentError as error:
                if self.world.size > 1:  # the other processes may not have met it, and would wait for this one forever
                    raise
                yield Outcome(job, str(error))
            else:
                yield Outcome(job)


class LocalExecutor(WorkerExecutor[Worker]):
    """Trains `capacity` runs at a time in the processes of a pool."""

    def __init__(self, recipe: Recipe, pool: ProcessPool, capacity: int, console: Console) -> None:
        super().__init__(recipe, console)
        self._pool, self._max = pool, capacity

    def _capacity(self) -> int:
        return self._max

    def _start(self, task: RunTask, shared: MakeTask) -> Worker:
        return self._pool.submit(partial(_train, task, shared))

    def _wait(self, running: Sequence[Worker]) -> list[Worker]:
        return self._pool.wait(running, POLL_SECONDS)

    def _result(self, worker: Worker) -> str | None:
        return self._pool.result(worker)  # type: ignore[no-any-return]

    def _kill(self, worker: Worker) -> None:
        self._pool.kill(worker)


def _train(task: RunTask, make_task: MakeTask, report: Callable[..., None]) -> str | None:
    return train_task(task, make_task)  # its progress goes through the event file, as it does on Ray


@contextmanager
def start_executor(
    recipe: Recipe, options: ExecutionOptions, console: Console, *, max_runs: int | None = None
) -> Iterator[Executor]:
    """Make an executor for `recipe`, for the length of the context; there are `max_runs` runs to train at a time.

    Raises:
        ExperimentError: if the options or the recipe do not fit this machine.
    """
    if options.on == "ray":
        if launched() > 1:
            raise ExperimentError(
                "--on ray under torchrun: each of its processes would train the same runs. Start steppe without "
                "torchrun"
            )
        with connect(options.ray_address) as ray:
            yield RayExecutor(ray, recipe, options, console)
        return
    recipe = resolve(recipe)
    at_once = _runs_at_once(recipe, options, max_runs)
    with join(recipe.hardware.device, recipe.hardware.threads) as world, ProcessPool() as pool:
        yield InProcessExecutor(recipe, world) if at_once == 1 else LocalExecutor(recipe, pool, at_once, console)


def _runs_at_once(recipe: Recipe, options: ExecutionOptions, max_runs: int | None) -> int:
    """Return the number of runs of a resolved recipe to train at a time on this machine."""
    number = options.runs_at_once
    if launched() > 1:
        if number not in (None, 1):
            raise ExperimentError(
                f"--runs-at-once {number} under torchrun: its processes train one run together. Leave one of them out"
            )
        return 1
    if number is None:
        on_gpu = recipe.hardware.device == "cuda"
        number = 1 if on_gpu else max(1, cpus.available() // (recipe.hardware.threads or 1))
    return number if max_runs is None else min(number, max_runs)
