"""Make the executor that the options ask for."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.resolve import resolve
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution import cpus
from steppe.experiments.execution.executor import ExecutionOptions, Executor
from steppe.experiments.execution.local import InProcessExecutor, LocalExecutor
from steppe.experiments.execution.ray import RayExecutor
from steppe.experiments.execution.tensorboard import TensorBoard
from steppe.experiments.world import join, launched


@contextmanager
def start_executor(
    recipe: Recipe, options: ExecutionOptions, console: Console, *, max_runs: int | None = None
) -> Iterator[Executor]:
    """Make an executor for `recipe`, for the length of the context; there are `max_runs` runs to train at a time.

    Raises:
        ExperimentError: if the options or the recipe do not fit this machine.
    """
    if recipe.output.tensorboard:
        TensorBoard(recipe.folder)  # raises if it is not installed, before anything is trained
    if options.on == "ray":
        if launched() > 1:
            raise ExperimentError(
                "--on ray under torchrun: each of its processes would train the same runs. Start steppe without "
                "torchrun"
            )
        with RayExecutor(recipe, options, console) as on_ray:
            yield on_ray
        return
    recipe = resolve(recipe)
    at_once = _runs_at_once(recipe, options, max_runs)
    with join(recipe.hardware.device, recipe.hardware.threads) as world:
        if at_once == 1:
            yield InProcessExecutor(recipe, world)
        else:
            with LocalExecutor(recipe, at_once, console) as local:
                yield local


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
