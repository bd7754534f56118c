"""Load a user's task by its name, and prepare it for a search."""

from dataclasses import replace
from functools import partial

import torch
from torch.utils.data import Subset

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.entry_points import call_factory, check_name, load_entry_point
from steppe.experiments.errors import ExperimentError, OptionError
from steppe.experiments.tasks.check import check
from steppe.experiments.tasks.samples import DatasetSamples, RandomStream, Samples, TensorSamples
from steppe.experiments.tasks.task import Task


def load_task(name: str, option: str = "task") -> Task:
    """Import a task, package.module:name: a :class:`Task`, or a function without arguments that returns one.

    `option` is that of the command line which names it, for errors.
    """
    check_name(option, name)
    # every process and every session makes the task anew, and a random split in it must be the same each time
    with RandomStream(0, 0, 0).active():
        found = load_entry_point(option, name)
        if not isinstance(found, Task) and callable(found):
            found = call_factory(option, name, found)
    if not isinstance(found, Task):
        raise ExperimentError(
            f"--{option} {name} gives {type(found).__name__}: a steppe.experiments.Task is needed, or a function "
            "without arguments that returns one"
        )
    return replace(found, entry_point=name)


def with_task(recipe: Recipe, given: Task | None = None) -> tuple[Recipe, Task | None]:
    """Return the recipe with what its task decides, and the task, after a trial of it; None for the built-in images.

    `given` is a task that has no name by which it could be imported.
    """
    if not recipe.data.task:
        return recipe, None
    task = _uncounted(given or load_task(recipe.data.task))
    on_gpu = recipe.hardware.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    info = check(task, device)
    second = load_task(recipe.forgetting.then, "then") if recipe.forgetting.then else task.then
    if second is None and recipe.forgetting.then_lr is not None:
        raise ExperimentError(
            f"then_lr={recipe.forgetting.then_lr}: the task has no second one, then=, so it would have no effect: give "
            "it one, name one by --then, or leave it out"
        )
    if second is not None:
        try:
            check(replace(second, model=task.model, optimizer=task.optimizer, metrics=task.metrics), device)
        except ExperimentError as error:
            raise ExperimentError(f"the second task, with the model of the first: {error}") from error
    if recipe.evaluation.flatness_every is not None:
        check_single_samples(
            task.samples("train", recipe.comparison.first_seed),
            "train",
            f"flatness_every={recipe.evaluation.flatness_every} measures",
        )
    if recipe.training.batch_size is None:
        recipe = recipe.replace(batch_size=task.usual_batch_size(task.samples("train", recipe.comparison.first_seed)))
    if recipe.training.schedule == "own" and not callable(task.schedule):
        try:
            recipe = recipe.replace(schedule=task.schedule or "constant")
        except ValueError as error:
            raise OptionError(f"with the schedule of the task, {error}") from error
    return replace(recipe, task=info), task


def _uncounted(task: Task) -> Task:
    """Return the task for a new command, before which its data may have changed."""
    return replace(task, counted=[], then=None if task.then is None else _uncounted(task.then))


def check_single_samples(samples: Samples, split: str, who: str) -> None:
    """Raise an ExperimentError if the data decide which samples make a batch; `who` begins what needs single ones."""
    if samples.sizes is not None:
        raise ExperimentError(
            f"the {split} data decide which samples make a batch, and {who} flatness on samples that are drawn one by "
            f"one: give {split}= as tensors, a Dataset or a DataLoader without a sampler of its own"
        )


def held_out(task: Task, one_in: int) -> Task:
    """Return the task for tuning: its test data are the validation data, or one in `one_in` training samples."""
    if task.validation is not None:
        return replace(task, test=task.validation, validation=None)
    return replace(task, train=partial(_part, task, one_in, False), test=partial(_part, task, one_in, True))


def _part(task: Task, one_in: int, held: bool, seed: int) -> Samples:
    """Return the training samples of a seed that are held out, or the others; the choice is the same for all seeds."""
    samples = task.samples("train", seed)
    n = len(samples)
    if n < 2 * one_in:
        raise ExperimentError(
            f"{n} training samples are too few to hold out one in {one_in}: take a smaller --hold-out, or give the "
            "task validation="
        )
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    positions = (chosen[: n // one_in] if held else chosen[n // one_in :]).sort().values
    part: Samples
    if isinstance(samples, TensorSamples):
        part = type(samples)(samples.gather_stored(positions))
    elif isinstance(samples, DatasetSamples):
        part = samples.with_dataset(Subset(samples.dataset, positions.tolist()))
    else:
        raise ExperimentError(
            "the training data decide which samples make a batch, so none can be held out for the search: give the "
            "task validation="
        )
    part.name, part.origin = samples.name, positions
    return part
