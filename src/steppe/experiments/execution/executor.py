"""Executors: where runs are trained. In this process, one after the other; in several; or on Ray."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution import cpus
from steppe.experiments.execution.progress import Reporter
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stop
from steppe.experiments.world import World, join, launched, resolve

__all__ = ["Executor", "InProcess", "Job", "Outcome", "ExecutionOptions", "failures", "start"]


@dataclass(frozen=True)
class ExecutionOptions:
    """Where the runs are trained, and how many at a time; no run's result depends on it."""

    on: Literal["here", "ray"] = "here"
    """here: on this machine. ray: on all machines of a Ray cluster, or on this one's CPUs and GPUs, as many runs at a
    time as there is room for (needs the ray extra)."""
    runs_at_once: int | None = None
    """Runs at a time on this machine, each in a process of its own; by default as many as its CPUs have room for, and 1
    on a GPU. 1 trains one after the other, in this process."""
    ray_address: str | None = None
    """A Ray cluster; by default $RAY_ADDRESS, else a Ray on this machine for the length of the command. All machines
    must see the run folder under the same path."""
    cpus_per_run: int | None = None
    """CPUs that Ray sets aside for a run; by default as many as --threads, or 1."""
    gpus_per_run: float | None = None
    """GPUs that Ray sets aside for a run, 0.5 for two runs on each; by default 1 where the runs train on GPUs."""

    def __post_init__(self) -> None:
        if self.runs_at_once is not None and self.runs_at_once < 1:
            raise ValueError(
                f"runs_at_once={self.runs_at_once}: the runs that are trained at a time must be at least 1"
            )
        if self.runs_at_once is not None and self.on == "ray":
            raise ValueError(
                f"runs_at_once={self.runs_at_once}: Ray trains as many runs as its machines have room for: say how "
                "much a run takes, by --cpus-per-run or --gpus-per-run"
            )
        if self.cpus_per_run is not None and self.cpus_per_run < 1:
            raise ValueError(f"cpus_per_run={self.cpus_per_run}: the CPUs of a run must be at least 1")
        if self.gpus_per_run is not None and not self.gpus_per_run >= 0:
            raise ValueError(f"gpus_per_run={self.gpus_per_run}: the GPUs of a run must be 0 or more")


@dataclass(frozen=True)
class Job:
    """A unit of a resolved recipe, and the folder where it keeps its metrics and its checkpoint."""

    run: Run
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """A job that came to its end; `error` says why it could not be trained, where it could not."""

    job: Job
    error: str | None = None


class Executor(ABC):
    """Trains jobs of `recipe`, which is resolved for where they run; `world` is this process's own place."""

    recipe: Recipe
    world: World
    together = False
    """Whether several runs may be in progress at a time."""

    @abstractmethod
    def run(
        self, jobs: Iterable[Job], data: Dataset, control: Path, reporter: Reporter, stop: Stop
    ) -> Generator[Outcome, None, None]:
        """Train each job, taking the next one only when there is room for it; yield each when it ends.

        `data` lies on the CPU; `control` is a folder that all who train can see. Raises Stopped when `stop` was asked
        for, after the runs in progress have saved a checkpoint. An ExperimentError of one run does not end the others.
        """


class InProcess(Executor):
    """One after the other, in this process, or in all of torchrun's together."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world = recipe, world

    def run(
        self, jobs: Iterable[Job], data: Dataset, control: Path, reporter: Reporter, stop: Stop
    ) -> Generator[Outcome, None, None]:
        """Train each job."""
        data = data.to(self.world.device)
        for job in jobs:
            try:
                train(job.run, job.folder, data, self.world, reporter, stop)
            except ExperimentError as error:
                if self.world.size > 1:  # the others may not have met it, and would wait for this one for ever
                    raise
                yield Outcome(job, str(error))
            else:
                yield Outcome(job)


@contextmanager
def start(recipe: Recipe, where: ExecutionOptions, console: Console, *, most: int | None = None) -> Iterator[Executor]:
    """Set up what trains `recipe`, for the length of the context; `most` is how many runs there are to train at a time.

    Raises ExperimentError when that cannot be had here.
    """
    if where.on == "here":
        recipe = resolve(recipe)
        at_once = _at_once(recipe, where, most)
        with join(recipe) as world:
            if at_once == 1:
                yield InProcess(recipe, world)
                return
            from steppe.experiments.execution.local import Processes  # which is an executor itself

            with Processes(recipe, at_once, console) as processes:
                yield processes
        return
    if launched() > 1:
        raise ExperimentError(
            "--on ray under torchrun: each of its processes would hand out the same runs. Start steppe without torchrun"
        )
    from steppe.experiments.execution.ray import OnRay  # ray is an extra of its own

    with OnRay(recipe, where, console) as executor:
        yield executor


def _at_once(recipe: Recipe, where: ExecutionOptions, most: int | None) -> int:
    """How many runs of a resolved recipe to train at a time on this machine."""
    said = where.runs_at_once
    if launched() > 1:
        if said not in (None, 1):
            raise ExperimentError(
                f"--runs-at-once {said} under torchrun: its processes train one run together. Leave one of them out"
            )
        return 1
    if said is None:
        said = 1 if recipe.device == "cuda" else max(1, cpus.available() // (recipe.threads or 1))
    return said if most is None else min(said, most)


def failures(outcomes: Iterable[Outcome]) -> str | None:
    """Say in one line which of the runs failed and why; None when none did."""
    outcomes = list(outcomes)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if len(failed) <= 1:
        return failed[0].error if failed else None
    reasons = "; ".join(f"({n}) {outcome.error}" for n, outcome in enumerate(failed, 1))
    return f"{len(failed)} of {len(outcomes)} runs failed: {reasons}"
