"""The task that runs train on: the user's own, or one on a data set of the recipe; it travels to other processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import cloudpickle  # type: ignore[import-untyped]
from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.sampling import hold_out
from steppe.experiments.errors import ExperimentError, first_line
from steppe.experiments.execution.executor import Executor, MakeTask
from steppe.experiments.execution.pretraining import load_data, with_backbone
from steppe.experiments.tasks.images import images_task, second_dataset
from steppe.experiments.tasks.load import held_out, load_task
from steppe.experiments.tasks.task import Task


def prepare_task(
    executor: Executor,
    path: Path,
    console: Console,
    given: Task | None = None,
    one_in: int | None = None,
    *,
    forgets: bool = True,
) -> MakeTask:
    """Return the function that makes the task of a run: the user's own, or one on the recipe's data set.

    `path` is the run folder; `given` is a task that has no name by which it could be imported. With `one_in`, one in so
    many training samples is held out and takes the place of the test data. Without `forgets`, no second task follows.
    """
    recipe = executor.recipe
    if recipe.data.task:
        then = recipe.forgetting.then if forgets else None
        task = _prepared(given or load_task(recipe.data.task), one_in, then)
        return OneTask(task) if task.entry_point is None else NamedTask(task, task.entry_point, one_in, then)
    dataset, second = load_data(recipe, executor.world), None
    if recipe.forgetting.then and forgets:
        with executor.world.first_process_first():
            second = second_dataset(recipe.forgetting.then, dataset, recipe.data.data_dir)
    if one_in is not None:
        dataset, second = hold_out(dataset, one_in), None if second is None else hold_out(second, one_in)
    return partial(images_task, with_backbone(dataset, executor, path, console), robustness=True, second=second)


def _prepared(task: Task, one_in: int | None, then: str | None) -> Task:
    """Return a task with its second one, by its name, its own or none, for a comparison or for a search."""
    second = load_task(then, "then") if then else task.then if then is not None else None
    if one_in is not None:
        task, second = held_out(task, one_in), None if second is None else held_out(second, one_in)
    return replace(task, then=second)


@dataclass(frozen=True)
class OneTask:
    """A function that returns the same task for every recipe; sent to another process, it takes everything along."""

    task: Task

    def __call__(self, recipe: Recipe) -> Task:
        return self.task

    def __reduce__(self) -> tuple[Callable[[bytes], OneTask], tuple[bytes]]:
        return _sent, (_bytes(self.task),)


@dataclass(frozen=True)
class NamedTask:
    """A function that returns the task of a name; another process imports it, once, by the name."""

    task: Task
    name: str
    one_in: int | None
    then: str | None = ""
    """The name of the second task; empty for the task's own, None for none."""

    def __call__(self, recipe: Recipe) -> Task:
        return self.task

    def __reduce__(self) -> tuple[Callable[..., NamedTask], tuple[str, int | None, str | None]]:
        return _imported, (self.name, self.one_in, self.then)


def _bytes(task: Task) -> bytes:
    """Pickle a task, also with functions that no name leads to, as a notebook's."""
    try:
        return bytes(cloudpickle.dumps(task))
    except Exception as error:
        raise ExperimentError(
            f"the task cannot be sent to another process ({type(error).__name__}: {first_line(error)}): name it, "
            "package.module:task, so that each process imports it, or train one run after the other in this process "
            "with runs_at_once=1"
        ) from error


def _sent(task: bytes) -> OneTask:
    return OneTask(pickle.loads(task))


@cache
def _imported(name: str, one_in: int | None, then: str | None) -> NamedTask:
    """Return the same object for every run that a worker trains."""
    return NamedTask(_prepared(load_task(name), one_in, then), name, one_in, then)
