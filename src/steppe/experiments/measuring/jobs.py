"""Jobs of `steppe measure`: each measures one network and writes a file, several at a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console

from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.pool import ProcessPool, Worker, WorkerDied
from steppe.experiments.execution.progress import JobProgress
from steppe.experiments.storage.files import write_json
from steppe.flatness import Budget, Flatness, Objective, measure

J = TypeVar("J")
T = TypeVar("T")

Progress = Callable[[str, int], None]
"""A function of the current activity and the number of passes so far."""

_INTERVAL = 0.5  # seconds between two progress messages of a job


class FlatnessJob(Protocol):
    """A network to measure. It must be picklable, and makes network and data in the process that measures."""

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def path(self) -> Path:
        """The JSON file for the measures."""

    def is_measured(self) -> bool:
        """True if the file holds measures of this network, with these options."""

    def prepare(self, progress: Progress) -> tuple[Objective, Objective | None, Budget]:
        """Return the loss, the loss of normalized logits if it has them, and the budget."""

    def to_json(self, found: Flatness) -> dict[str, Any]:
        """Return the content of the file."""


def measure_missing(jobs: Sequence[FlatnessJob], processes: int, console: Console) -> None:
    """Measure the networks that are not measured yet; raises the first ExperimentError, and keeps finished files."""
    run_jobs(measure_job, {job.name: job for job in jobs if not job.is_measured()}, processes, console)


def measure_job(job: FlatnessJob, progress: Progress) -> None:
    plain, normalized, budget = job.prepare(progress)
    try:
        found = measure(plain, budget, normalized=normalized)
    except (FloatingPointError, ValueError, RuntimeError) as error:
        raise ExperimentError(f"{job.name}: {' '.join(str(error).split())}") from error
    write_json(job.path, job.to_json(found))


def run_jobs(function: Callable[[J, Progress], T], jobs: Mapping[str, J], processes: int, console: Console) -> list[T]:
    """Call the function with each job, several at a time in worker processes with one CPU thread each.

    A single one at a time runs in this process, with all of its threads. After an error, no further job is started;
    the error is raised when those in progress have ended. The results are in the order of the jobs.
    """
    results: dict[str, T] = {}
    with JobProgress(console, len(jobs)) as display:
        if processes == 1 or len(jobs) == 1:
            for name, job in jobs.items():
                results[name] = function(job, partial(display.show, name))
                display.done(name)
            return list(results.values())
        remaining, running = iter(jobs.items()), dict[Worker, str]()
        error: ExperimentError | None = None
        with ProcessPool() as pool:
            while len(results) < len(jobs) and (running or error is None):
                for name, job in islice(remaining, 0 if error else processes - len(running)):
                    task = partial(_run_in_worker, function, job)
                    running[pool.submit(task, on_progress=partial(display.show, name))] = name
                for worker in pool.wait(list(running), _INTERVAL):
                    name = running.pop(worker)
                    try:
                        results[name] = pool.result(worker)
                    except ExperimentError as raised:
                        error = error or raised
                    except WorkerDied as died:
                        error = error or ExperimentError(
                            f"the process that measures {name} died ({died}), perhaps because memory ran out: say "
                            "--processes 1, or fewer --samples; finished measurements are kept"
                        )
                    else:
                        display.done(name)
        if error is not None:
            raise error
        return [results[name] for name in jobs]


def _run_in_worker(function: Callable[[J, Progress], T], job: J, report: Callable[..., None]) -> T:
    torch.set_num_threads(1)
    reported = -_INTERVAL

    def progress(activity: str, passes: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _INTERVAL:
            reported = time.monotonic()
            report(activity, passes)

    return function(job, progress)
