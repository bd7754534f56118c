"""Measure the flatness of every run of a run folder, and the loss on the lines between the runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from steppe.experiments.analysis.verdicts import FLATNESS, read_flatness_file, read_lines
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import ExecutionOptions, MakeTask
from steppe.experiments.execution.launch import start_executor
from steppe.experiments.execution.prepared_task import OneTask, prepare_task
from steppe.experiments.execution.progress import print_line
from steppe.experiments.measuring.jobs import MeasuringOptions, Prepared, Progress, measure_all, run_jobs
from steppe.experiments.measuring.normalization import Loss, is_cross_entropy, takes_logits
from steppe.experiments.storage import checkpoint_file
from steppe.experiments.storage.files import write_checked
from steppe.experiments.storage.records import record_at
from steppe.experiments.storage.run_folder import CHECKPOINT, RunFolder, owner
from steppe.experiments.tasks.load import check_single_samples, with_task
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.evaluation import flatness_sample
from steppe.experiments.training.run import Training
from steppe.experiments.world import World, launched
from steppe.flatness import Flatness, Objective, interpolation, normalized_logits

_LINE_POINTS = 13


@dataclass(frozen=True)
class RunJob:
    """A run to measure."""

    folder: Path
    run: Run
    processes: int
    """The number of processes that the run was trained in."""
    options: MeasuringOptions
    given: OneTask | None = None
    """The task, if it has no name by which it could be imported."""

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def path(self) -> Path:
        return RunFolder(self.folder).run(self.run) / FLATNESS

    def is_measured(self) -> bool:
        """True if the file is newer than the checkpoint, and its settings are those of the options."""
        found, _ = read_flatness_file(self.path)
        return (
            found is not None
            and self.path.stat().st_mtime >= self.path.with_name(CHECKPOINT).stat().st_mtime
            and self.options.settings().items() <= found.settings.items()
        )

    def prepare(self, progress: Progress) -> Prepared:
        training, options = self.restore(), self.options
        sample = self.sample(training, "train", self.run.seed)
        objective, normalized = objectives(training.task, training.network, sample, options, progress)
        return Prepared(objective, normalized, options.budget, training.optimizer)

    def save(self, found: Flatness) -> None:
        content = found.to_json()
        content["settings"] |= self.options.settings()
        write_checked(self.path, content)

    def restore(self) -> Training:
        recipe = self.run.recipe
        make_task, device = _task_and_device(recipe, self.folder, Console(quiet=True), self.given)
        # the layout that every network can be measured in; it changes no weight
        run = replace(self.run, recipe=recipe.replace(channels_last=False, compile=False))
        task = make_task(recipe)
        training = Training(run, task, World(device))
        checkpoint = self.path.with_name(CHECKPOINT)
        state = checkpoint_file.load(checkpoint, owner(self.run, self.processes, task.initial_weights))
        with checkpoint_file.one_line_errors(checkpoint):
            training.network.load_state_dict(state["model"])
            if "adam_sharpness" in self.options.budget.names_of_further:
                training.optimizer.load_state_dict(state["optimizer"])
            if self.run.method.average:  # what is evaluated, and so measured, are the averaged weights
                assert training.average is not None
                training.average.load_state_dict(state["average"])
                with training.averaged_weights():
                    averaged = {name: value.clone() for name, value in training.network.state_dict().items()}
                training.network.load_state_dict(averaged)
        return training

    def sample(self, training: Training, split: str, seed: int) -> list[Any]:
        """Draw the samples of a split to measure on, in batches."""
        options, device = self.options, training.world.device
        return flatness_sample(training.samples[split], options.samples, seed, device, options.batch_size)


@dataclass(frozen=True)
class LineJob:
    """The line between the weights of a run and of the reference's run of the same seed."""

    job: RunJob
    reference: Run

    @property
    def name(self) -> str:
        return f"{self.reference.name} to {self.job.name}"

    @property
    def key(self) -> tuple[str, str, int]:
        """The values that identify the line in its file."""
        return str(self.reference.method), str(self.job.run.method), self.job.run.seed


def measure_runs(
    path: Path,
    options: MeasuringOptions,
    console: Console,
    task: Task | None = None,
    methods: Sequence[MethodSpec] = (),
) -> None:
    """Measure every run of a folder that is not measured yet, and the lines between the runs.

    `task` and `methods` are those that have no name by which they could be imported. ExperimentError if there is
    nothing to measure, or a measure cannot be computed.
    """
    if launched() > 1:
        raise ExperimentError(
            "steppe measure under torchrun: the runs are measured independently, and need no processes that measure "
            "one together. Start it without torchrun, with --processes for many at a time"
        )
    folder = RunFolder(path)
    recipe, processes = folder.read()
    known = {str(method): method for method in methods}
    recipe = recipe.replace(methods=tuple(known.get(str(method), method) for method in recipe.comparison.methods))
    for member in recipe.replace(out=path).members():
        measure_runs(member.folder, options, console)
    if recipe.comparison.widths:
        return
    if recipe.data.task and ":" not in recipe.data.task and task is None:
        raise ExperimentError(
            f"the runs in {path} are of a task that was given as an object of Python ({recipe.data.task}), which no "
            "other session can make again: compare it by a name, package.module:task, or measure it in Python, by "
            "steppe.experiments.measure(folder, task=...)"
        )
    if task is not None:
        theirs, ours = recipe.task.description, with_task(recipe, task)[0].task.description
        if ours != theirs:
            raise ExperimentError(
                f"the runs in {path} are of another task ({theirs}) than the one that was given ({ours}): give theirs"
            )
    given = None if task is None else OneTask(task)
    with folder.locked():
        runs = _finished(folder, recipe, console)
        make_task, _ = _task_and_device(recipe, path, console, given)  # makes or downloads a backbone once, here
        data = {split: make_task(recipe).samples(split, runs[0].seed) for split in ("train", "test")}
        for split, of_split in data.items():
            check_single_samples(of_split, split, "steppe measure measures")
        samples = min(options.samples, len(data["train"]))
        options = replace(options, samples=samples, budget=replace(options.budget, m=min(options.budget.m, samples)))
        jobs = [RunJob(path, run, processes, options, given) for run in runs]
        measure_all([job for job in jobs if not job.is_measured()], options.jobs_at_once, console)
        write_checked(path / FLATNESS, {"lines": _lines(folder, jobs, options.jobs_at_once, console)})


def objectives(
    task: Task, network: nn.Module, sample: list[Any], options: MeasuringOptions, progress: Progress
) -> tuple[Objective, Objective | None]:
    """Return a network's mean loss on a sample, and, of a classifier, that of its normalized logits."""
    objective, loss, normalized = partial(options.objective, network, sample, progress=progress), task.loss, None

    def of_first_batch(loss: Loss) -> Objective:
        return options.objective(network, sample[:1], evaluate=replace(task, loss=loss).evaluate)

    if loss is not None and is_cross_entropy(loss) and takes_logits(loss, of_first_batch):
        normalized = objective(evaluate=replace(task, loss=normalized_logits(loss)).evaluate)
    return objective(evaluate=task.loss_and_outputs), normalized


def _finished(folder: RunFolder, recipe: Recipe, console: Console) -> list[Run]:
    """Return the runs whose compute is spent; others would be compared at less compute."""
    results = folder.results(recipe)
    compared = [run for run in results if run.method in recipe.comparison.methods]
    begun = [run for run in compared if (folder.run(run) / CHECKPOINT).exists()]
    runs = [run for run in begun if record_at(results[run], run.standardized_epochs)]
    if not runs:
        raise ExperimentError(
            f"{folder.path} has no finished runs, so there is nothing to measure: run steppe compare first"
        )
    if len(runs) < len(begun):
        names = ", ".join(run.name for run in begun if run not in runs)
        print_line(console, f"Not finished, so not measured: {names}")
    return runs


def _lines(folder: RunFolder, jobs: Sequence[RunJob], processes: int, console: Console) -> list[dict[str, Any]]:
    """Measure the loss between each run and the reference's of its seed; lines between unchanged runs are kept."""
    known = {(line["a"], line["b"], line["seed"]): line for line in read_lines(folder)}
    runs, reference = {job.run for job in jobs}, jobs[0].run.recipe.comparison.methods[0]
    lines = [LineJob(job, Run(job.run.recipe, reference, job.run.seed)) for job in jobs]
    lines = [line for line in lines if line.job.run != line.reference and line.reference in runs]
    written = (folder.path / FLATNESS).stat().st_mtime_ns if known else 0
    changed = {job.run for job in jobs if job.path.stat().st_mtime_ns > written}
    todo = {line.name: line for line in lines if changed & {line.job.run, line.reference} or line.key not in known}
    measured = run_jobs({name: partial(measure_line, line) for name, line in todo.items()}, processes, console)
    known |= {line.key: found for line, found in zip(todo.values(), measured, strict=True)}
    return [known[line.key] for line in lines]


def measure_line(line: LineJob, progress: Progress) -> dict[str, Any]:
    """Measure the loss between two runs, on training and test samples, with BatchNorm statistics estimated anew."""
    options = line.job.options
    end, start = line.job.restore(), replace(line.job, run=line.reference).restore()
    samples = {"train": line.job.sample(start, "train", start.run.seed), "test": line.job.sample(start, "test", 0)}
    found: dict[str, Any] = dict(zip(("a", "b", "seed"), line.key, strict=True))
    for split, sample in samples.items():
        objective, _ = objectives(start.task, start.network, sample, options, progress)
        losses = interpolation(objective, end.network.state_dict(), points=_LINE_POINTS, statistics=True)
        found |= {"axis": losses.axis.tolist(), split: losses.to_json()["losses"], "reestimated": losses.statistics}
    return found


def _task_and_device(
    recipe: Recipe, path: Path, console: Console, given: OneTask | None
) -> tuple[MakeTask, torch.device]:
    """Return the task of a recipe, with the backbone of its runs, and this machine's device."""
    local = recipe.replace(device="auto", threads=torch.get_num_threads(), compile=False, channels_last=False)
    with start_executor(local, ExecutionOptions(), console) as executor:
        executor.recipe = recipe  # the backbone of the recipe itself, not one pretrained with these changes
        return prepare_task(executor, path, console, None if given is None else given.task), executor.world.device
