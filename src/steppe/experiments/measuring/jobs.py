"""Jobs of `steppe measure`: each measures one network and writes a file, several at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from steppe.experiments.config.sections import check_ranges
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution import cpus
from steppe.experiments.execution.pool import ProcessPool, Worker, WorkerDied
from steppe.experiments.execution.progress import JobProgress, print_line
from steppe.flatness import Budget, Flatness, Objective, measure
from steppe.flatness._further import check_measures
from steppe.flatness.budget import CONDITIONAL

T = TypeVar("T")
_BatchNorm = Literal["eval", "train"]

Progress = Callable[[str, int], None]
"""A function of the current activity and the number of passes so far."""

_INTERVAL = 0.5  # seconds between two progress messages of a job


@dataclass(frozen=True)
class MeasuringOptions:
    """The samples that flatness is measured on, the budget of each measure, and the processes."""

    samples: int = 256
    """Number of training samples to measure on, drawn by the run's seed: the same for all methods of a seed."""
    batch_norm: _BatchNorm = "eval"
    """eval: BatchNorm uses its running statistics, as after training. train: those of each batch, as in training."""
    batch_size: int = 256
    """Samples in memory at a time. Changes the result with --batch-norm train only. If all samples are one batch, a
    product with the Hessian takes a third less time."""
    budget: Budget = field(default_factory=Budget)
    processes: int | None = None
    """Runs to measure at a time, each on one CPU thread; by default as many as there are CPUs, and 1 on a GPU."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: the number of samples must be at least one")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes={self.processes}: the runs that are measured at a time must be at least 1")

    def objective(self, network: nn.Module, data: Any, **arguments: Any) -> Objective:
        return Objective(network, data, batch_norm=self.batch_norm, batch_size=self.batch_size, **arguments)

    def settings(self) -> dict[str, Any]:
        """Return the options that the numbers depend on."""
        sampling = {"samples": self.samples, "batch_norm": self.batch_norm, "batch_size": self.batch_size}
        return sampling | asdict(self.budget)

    @property
    def jobs_at_once(self) -> int:
        return self.processes or (1 if torch.cuda.is_available() else cpus.available())


class Prepared(NamedTuple):
    """A network with its data, as :func:`steppe.flatness.measure` takes them."""

    objective: Objective
    normalized: Objective | None
    """The loss of normalized logits, if the network has logits."""
    budget: Budget
    optimizer: Optimizer | None = None
    """The optimizer that has trained the network, where its state is known and a measure needs it."""


class FlatnessJob(Protocol):
    """A network to measure. It must be picklable, and makes network and data in the process that measures."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> MeasuringOptions: ...

    def prepare(self, progress: Progress) -> Prepared: ...

    def save(self, found: Flatness) -> None: ...


def measure_all(jobs: Sequence[FlatnessJob], processes: int, console: Console) -> None:
    """Measure networks; raises the first ExperimentError, and keeps finished files.

    If measures are named that not every network allows, each is checked for them first: a measurement takes minutes.
    """
    if jobs:  # the first one is finished after minutes
        print_line(console, f"Measuring {len(jobs)} network{'s'[: len(jobs) > 1]}")
    for job in jobs:
        if not set(CONDITIONAL).isdisjoint(job.options.budget.names_of_further):
            check_job(job)
    run_jobs({job.name: partial(measure_job, job) for job in jobs}, processes, console)


def check_job(job: FlatnessJob) -> None:
    """Raise an ExperimentError if a measure cannot be computed for a network."""
    prepared = job.prepare(lambda activity, passes: None)
    with _one_line_errors(job):
        check_measures(prepared.objective, prepared.budget, prepared.optimizer)


def measure_job(job: FlatnessJob, progress: Progress) -> None:
    """Measure one network and write the result; an ExperimentError names it if a measure cannot be computed."""
    objective, normalized, budget, optimizer = job.prepare(progress)
    with _one_line_errors(job):
        found = measure(objective, budget, normalized=normalized, optimizer=optimizer)
    job.save(found)


@contextmanager
def _one_line_errors(job: FlatnessJob) -> Iterator[None]:
    try:
        yield
    except (FloatingPointError, TypeError, ValueError, RuntimeError) as error:
        raise ExperimentError(f"{job.name}: {' '.join(str(error).split())}") from error


def run_jobs(jobs: Mapping[str, Callable[[Progress], T]], processes: int, console: Console) -> list[T]:
    """Run the jobs, several at a time in worker processes with one CPU thread each.

    A single one at a time runs in this process, with all of its threads. After an error, no further job is started;
    the error is raised when those in progress have ended. The results are in the order of the jobs.
    """
    results: dict[str, T] = {}
    with JobProgress(console, len(jobs)) as display:
        if processes == 1 or len(jobs) == 1:
            for name, job in jobs.items():
                results[name] = job(partial(display.show, name))
                display.done(name)
            return list(results.values())
        remaining, running, errors = iter(jobs.items()), dict[Worker, str](), list[ExperimentError]()
        with ProcessPool() as pool:
            while True:
                for name, job in islice(remaining, 0 if errors else processes - len(running)):
                    task = partial(_run_in_worker, job)
                    running[pool.submit(task, on_progress=partial(display.show, name))] = name
                if not running:
                    break
                for worker in pool.wait(list(running), _INTERVAL):
                    name = running.pop(worker)
                    try:
                        results[name] = pool.result(worker)
                        display.done(name)
                    except ExperimentError as error:
                        errors.append(error)
                    except WorkerDied as died:
                        message = (
                            f"the process that measures {name} died ({died}), perhaps because memory ran out: say "
                            "--processes 1, or fewer --samples; finished measurements are kept"
                        )
                        errors.append(ExperimentError(message))
        if errors:
            raise errors[0]
        return [results[name] for name in jobs]


def _run_in_worker(job: Callable[[Progress], T], report: Callable[..., None]) -> T:
    torch.set_num_threads(1)
    reported = -_INTERVAL

    def progress(activity: str, passes: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _INTERVAL:
            reported = time.monotonic()
            report(activity, passes)

    return job(progress)
