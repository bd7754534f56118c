"""`steppe measure RUN`: how flat the minimum of every run is, and what that allows to say of the methods."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from steppe.experiments.analysis.verdicts import Verdict, compared
from steppe.experiments.config.method_spec import parse
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import Dataset, Split, normalize
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution import cpus
from steppe.experiments.execution.executor import ExecutionOptions, start
from steppe.experiments.execution.pool import Tell, pooled
from steppe.experiments.storage import checkpoints
from steppe.experiments.storage.files import write_json
from steppe.experiments.storage.run_folder import CHECKPOINT, RunFolder
from steppe.experiments.training.pretraining import with_start
from steppe.experiments.training.run import Training, owner
from steppe.experiments.training.sharpness import flatness_sample
from steppe.experiments.world import World
from steppe.flatness import Budget, Flatness, Objective, interpolation, measure, normalized_logits

__all__ = ["FLATNESS", "Measuring", "Sampling", "lines_of", "measure_run", "measured", "objectives", "verdicts"]

FLATNESS = "flatness.json"

_LINE_POINTS = 13

_UNEQUAL = "These are the ends of all runs, and not of equal compute: {0} after {2} standardized epochs, {1} after {3}."


@dataclass(frozen=True)
class Sampling:
    """On what flatness is measured."""

    samples: int = 256
    """Training images that it is measured on, drawn by the run's seed: the same for all methods of a seed."""
    batch_norm: Literal["eval", "train"] = "eval"
    """BatchNorm by its running statistics, as the network is used, or by those of each batch, as it was trained."""
    batch_size: int = 256
    """Images in memory at a time; it matters to the result with --batch-norm train only. Where all samples fit, a
    product with the Hessian costs two thirds."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it takes at least one image")


@dataclass(frozen=True)
class Measuring:
    """How a run folder is measured."""

    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)
    processes: int | None = None
    """Runs to measure at a time, each on one CPU thread; by default as many as there are CPUs, and 1 on a GPU."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes={self.processes}: the runs that are measured at a time must be at least 1")

    def within(self, images: int) -> Measuring:
        """The same where there are so many training images: no more can be drawn, or be in a part."""
        samples = min(self.sampling.samples, images)
        sampling, budget = replace(self.sampling, samples=samples), replace(self.budget, m=min(self.budget.m, samples))
        return replace(self, sampling=sampling, budget=budget)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {**asdict(self.sampling), **asdict(self.budget)}


@dataclass(frozen=True)
class _Job:
    """A run to measure, or, with `other`, the line between two."""

    path: Path
    run: Run
    processes: int
    how: Measuring
    other: Run | None = None

    @property
    def name(self) -> str:
        return self.run.name if self.other is None else f"{self.other.name} to {self.run.name}"


def measure_run(path: Path, how: Measuring, console: Console) -> None:
    """Measure every run of a folder that is not measured yet, and the lines between their solutions.

    Raises ExperimentError when there is nothing to measure.
    """
    folder = RunFolder(path)
    recipe, processes = folder.claimed()
    for member in replace(recipe, out=path).members():
        measure_run(member.folder, how, console)
    if recipe.widths:
        return
    with folder.locked():
        runs = _finished(folder, recipe, console)
        with _world(recipe, path, console) as (dataset, device):  # what the runs start from is had once, here
            most = how.processes or (1 if device.type == "cuda" else cpus.available())
            how = how.within(len(dataset.train) if recipe.shots is None else recipe.shots * len(data.CLASSES))
        jobs = [_Job(path, run, processes, how) for run in runs]
        todo = [(job.name, job) for job in jobs if not _is_measured(folder, job.run, how)]
        pooled(_measure, todo, most, console)
        write_json(path / FLATNESS, {"lines": _lines(jobs, most, console)})


def _finished(folder: RunFolder, recipe: Recipe, console: Console) -> list[Run]:
    """The runs whose compute is spent: one that is on its way would be compared at less of it."""
    results = folder.results(recipe)
    ends = {run: max((r.standardized_epoch for r in results[run]), default=0) for run in results}
    begun = [run for run in ends if (folder.run(run) / CHECKPOINT).exists()]
    runs = [run for run in begun if ends[run] >= run.standardized_epochs]
    if not runs:
        raise ExperimentError(
            f"{folder.path} has no finished runs, so there is nothing to measure: run steppe compare first"
        )
    if len(runs) < len(begun):
        names = ", ".join(run.name for run in begun if run not in runs)
        console.print(f"Not finished, so not measured: {names}", highlight=False, markup=False, soft_wrap=True)
    return runs


def _lines(jobs: Sequence[_Job], most: int, console: Console) -> list[dict[str, Any]]:
    """The loss between each run and the reference's of its seed; what is known of two that stayed is kept."""
    folder = RunFolder(jobs[0].path)
    before = {(line["a"], line["b"], line["seed"]): line for line in lines_of(folder)}
    runs, reference = {job.run for job in jobs}, jobs[0].run.recipe.methods[0]
    pairs = [replace(job, other=Run(job.run.recipe, reference, job.run.seed)) for job in jobs]
    pairs = [job for job in pairs if job.run != job.other and job.other in runs]
    written = (folder.path / FLATNESS).stat().st_mtime_ns if before else 0
    since = {run for run in runs if (folder.run(run) / FLATNESS).stat().st_mtime_ns > written}
    todo = [j for j in pairs if since & {j.run, j.other} or (reference, j.run.method, j.run.seed) not in before]
    drawn = pooled(_line, [(job.name, job) for job in todo], most, console)
    known = before | {(line["a"], line["b"], line["seed"]): line for line in drawn}
    return [known[reference, job.run.method, job.run.seed] for job in pairs]


def measured(folder: RunFolder, recipe: Recipe) -> dict[Run, Flatness]:
    """Read what was measured; ExperimentError when a file is damaged."""
    found = {run: _read(folder.run(run) / FLATNESS) for run in recipe.runs()}
    return {run: flatness for run, flatness in found.items() if flatness is not None}


def lines_of(folder: RunFolder) -> list[dict[str, Any]]:
    """Read the losses between solutions; none where nothing can be read, for they are made anew then."""
    try:
        return list(json.loads((folder.path / FLATNESS).read_text())["lines"])
    except (OSError, ValueError, TypeError, KeyError):
        return []


def verdicts(recipe: Recipe, found: Mapping[Run, Flatness]) -> list[Verdict]:
    """Compare each method with the first one, by pairs of a seed.

    Raises ExperimentError where they were measured in different ways.
    """
    if len({json.dumps(dict(one.settings), sort_keys=True) for one in found.values()}) > 1:
        raise ExperimentError(
            "these runs were measured in different ways, and their numbers cannot be compared: run steppe measure on "
            "the folder again, with the options that you want for all"
        )
    reference, *others = recipe.methods
    made = []
    for method in others:
        runs = [(u, Run(recipe, reference, u.seed)) for u in found if u.method == method]
        pairs = [(found[u], found[other]) for u, other in runs if other in found]
        labels = parse(method).label, parse(reference).label
        ends = [Run(recipe, m, recipe.first_seed).standardized_epochs for m in (method, reference)]
        further = "" if ends[0] == ends[1] else _UNEQUAL.format(*labels, *ends)
        made.append(compared(method, reference, labels, pairs, further))
    return [verdict for verdict in made if verdict is not None]


def _is_measured(folder: RunFolder, run: Run, how: Measuring) -> bool:
    """Whether its file was made of its last checkpoint, with these settings."""
    path, checkpoint = folder.run(run) / FLATNESS, folder.run(run) / CHECKPOINT
    found = _read(path)
    return (
        found is not None
        and path.stat().st_mtime >= checkpoint.stat().st_mtime
        and how.settings().items() <= found.settings.items()
    )


def _read(path: Path) -> Flatness | None:
    if not path.exists():
        return None
    try:
        return Flatness.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExperimentError(
            f"{path} is damaged or of another version ({error}): delete it and run steppe measure on the folder again"
        ) from error


def _measure(job: _Job, tell: Tell) -> None:
    """Measure a run, and write it down."""
    training = _restored(job, job.run)
    plain, normalized = objectives(training.network, _sample(job, training), job.how.sampling, tell)
    try:
        found = measure(plain, job.how.budget, normalized=normalized)
    except (FloatingPointError, ValueError, RuntimeError) as error:
        raise ExperimentError(f"{job.name}: {' '.join(str(error).split())}") from error
    written = found.to_json()
    written["settings"] |= job.how.settings()
    write_json(RunFolder(job.path).run(job.run) / FLATNESS, written)


def _line(job: _Job, tell: Tell) -> dict[str, Any]:
    """Measure the loss between two solutions, on training and on test images, with statistics made anew."""
    assert job.other is not None
    ours, theirs = _restored(job, job.run), _restored(job, job.other)
    samples = {"train": _sample(job, theirs), "test": flatness_sample(theirs.data.test, job.how.sampling.samples, 0)}
    drawn: dict[str, Any] = {"a": job.other.method, "b": job.run.method, "seed": job.run.seed}
    for split, sample in samples.items():
        objective = _objective(theirs.network, sample, job.how.sampling, F.cross_entropy, tell)
        line = interpolation(objective, ours.network.state_dict(), points=_LINE_POINTS, statistics=True)
        drawn |= {"axis": line.axis.tolist(), split: line.to_json()["losses"], "reestimated": line.statistics}
    return drawn


def _restored(job: _Job, run: Run) -> Training:
    """A run as its checkpoint left it."""
    with _world(run.recipe, job.path, Console(quiet=True)) as (dataset, device):
        training = Training(_plain(run), dataset.to(device), World(device))
    digest = None if dataset.start is None else dataset.start.digest()
    path = RunFolder(job.path).run(run) / CHECKPOINT
    training.network.load_state_dict(checkpoints.load(path, owner(run, job.processes, digest))["model"])
    return training


def _plain(run: Run) -> Run:
    """The same run in the layout that any network may be measured in, on any number of threads."""
    return replace(run, recipe=replace(run.recipe, channels_last=False, compile=False))


@contextmanager
def _world(recipe: Recipe, path: Path, console: Console) -> Iterator[tuple[Dataset, torch.device]]:
    """The data of a recipe, with what its runs start from, and this machine's device, whatever they were trained on."""
    here = replace(recipe, device="auto", threads=torch.get_num_threads(), compile=False, channels_last=False)
    with start(here, ExecutionOptions(), console) as executor:
        executor.recipe = recipe  # the backbone is the one that was made for it, not one made here
        yield with_start(data.load(recipe.dataset, recipe.data_dir), executor, path, console), executor.world.device


def _sample(job: _Job, training: Training) -> Split:
    return flatness_sample(training.data.train, job.how.sampling.samples, training.run.seed)


def objectives(network: nn.Module, sample: Split, sampling: Sampling, tell: Tell) -> tuple[Objective, Objective]:
    """A network's mean cross-entropy on a sample: of its logits, and of its logits normalized."""
    losses = F.cross_entropy, normalized_logits(F.cross_entropy)
    plain, normalized = (_objective(network, sample, sampling, loss, tell) for loss in losses)
    return plain, normalized


def _objective(
    network: nn.Module, sample: Split, sampling: Sampling, loss: Callable[[Tensor, Tensor], Tensor], tell: Tell
) -> Objective:
    return Objective(
        network,
        (normalize(sample.images), sample.labels),
        loss=loss,
        batch_norm=sampling.batch_norm,
        batch_size=sampling.batch_size,
        progress=tell,
    )
