"""Executors train runs: the interface, its inputs and its results. :mod:`.launch` makes one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.config.sections import Minimum, check_ranges
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.stopping import Stop
from steppe.experiments.world import World


@dataclass(frozen=True)
class ExecutionOptions:
    """The machines that train the runs, and the number of runs at a time; no run's result depends on them."""

    on: Literal["local", "ray"] = "local"
    """local: on this machine. ray: on all machines of a Ray cluster, or on this one's CPUs and GPUs, as many runs at a
    time as there is room for (needs the ray extra). A Ray on this machine cannot be reached from others. A cluster has
    no password: use it in a network that you trust."""
    runs_at_once: Annotated[int | None, Minimum(1, "the number of runs at a time")] = None
    """Runs at a time on this machine, each in a separate process; by default as many as its CPUs have room for, and 1
    on a GPU. 1 trains one after the other, in this process."""
    ray_address: str | None = None
    """A Ray cluster; by default $RAY_ADDRESS, else a Ray on this machine that ends with the command. Machines that do
    not see the run folder send their results."""
    cpus_per_run: Annotated[int | None, Minimum(1, "the CPUs of a run")] = None
    """CPUs that Ray reserves for a run; by default as many as --threads, or 1."""
    gpus_per_run: Annotated[float | None, Minimum(0, "the GPUs of a run")] = None
    """GPUs that Ray reserves for a run, 0.5 for two runs on each; by default 1 where the runs train on GPUs."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.runs_at_once is not None and self.on == "ray":
            raise ValueError(
                f"runs_at_once={self.runs_at_once}: Ray trains as many runs as its machines have room for: set how "
                "much a run takes with --cpus-per-run or --gpus-per-run"
            )


MakeTask = Callable[[Recipe], Task]
"""A function that returns the task of a run's recipe; it is sent to the processes that train."""


@dataclass(frozen=True)
class Job:
    """A run of a resolved recipe, and the folder for its metrics and its checkpoint."""

    run: Run
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """A job that has ended; `error` is the reason why its run was not trained to the end, or None."""

    job: Job
    error: str | None = None


class Executor(ABC):
    """Trains runs of `recipe`, which is resolved for the machines that train; `world` is this process's own place."""

    recipe: Recipe
    world: World

    @abstractmethod
    def run(
        self, jobs: Iterable[Job], make_task: MakeTask, control: Path, reporter: Reporter, stop: Stop
    ) -> Generator[Outcome, None, None]:
        """Train each job, taking the next one only when there is room for it; yield each when it ends.

        `control` is a folder for files of the session. An ExperimentError of one run does not end the others.
        After a request to stop, the runs in progress save a checkpoint, and Stopped is raised.
        """


def failures(outcomes: Iterable[Outcome]) -> str | None:
    """Return one line on the runs that failed and the reasons; None if all succeeded."""
    outcomes = list(outcomes)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if len(failed) <= 1:
        return failed[0].error if failed else None
    reasons = "; ".join(f"({n}) {outcome.error}" for n, outcome in enumerate(failed, 1))
    return f"{len(failed)} of {len(outcomes)} runs failed: {reasons}"
