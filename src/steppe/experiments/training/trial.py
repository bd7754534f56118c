"""Take steps of each method on a user's task before anything is trained, so that one that cannot is named early."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.errors import ExperimentError, place, typed
from steppe.experiments.storage.run_folder import CHECKPOINT, RunFolder
from steppe.experiments.tasks.failing import samples_of
from steppe.experiments.tasks.samples import generators_restored
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.run import Training
from steppe.experiments.world import World, lost_connection


def try_methods(recipe: Recipe, task: Task, folder: RunFolder, world: World) -> None:
    """Take steps of each method of a resolved recipe that has no checkpoint in the run folder; nothing is kept.

    Several processes take them together.

    Raises:
        ExperimentError: A method cannot train the task.
    """
    if world.size == 1:
        on_gpu = recipe.hardware.device == "cuda" and torch.cuda.is_available()  # on Ray, other machines may have one
        world = World(torch.device("cuda" if on_gpu else "cpu"))
    watched = _WatchedTask(**{field.name: getattr(task, field.name) for field in fields(task)})
    for method in recipe.comparison.methods:
        run = Run(recipe.replace(compile=False), method, recipe.comparison.first_seed)
        if (folder.run(run) / CHECKPOINT).exists():
            continue
        try:
            with generators_restored():
                _take_steps(run, watched, world)
        except Exception as error:
            if lost_connection(error):
                raise
            reason = (
                str(error) if isinstance(error, ExperimentError) else f"{typed(error)}{place(error)}{samples_of(error)}"
            )
            raise ExperimentError(f"{method} cannot train this task: {reason}") from error


def _take_steps(run: Run, task: Task, world: World) -> None:
    method = run.method.definition
    if method.needs_classes and not task.classes:
        raise ExperimentError("it needs the number of classes, which is not known: give the task classes=")
    training = Training(run, task, world)
    batch = next(training.rest_of_epoch())
    if getattr(method.step_function, "remembers_samples", False) and not batch.ordered:
        raise ExperimentError(
            "it keeps the outputs of each sample, and the data decide which samples a batch holds, so it could not "
            "tell them apart: give a Dataset, or a DataLoader without a sampler of its own"
        )
    for _ in range(_STEPS):
        training.step(batch)


_STEPS = 2
"""What a method keeps of a step, as the base's momentum, is there from the second one on."""


class _WatchedTask(Task):
    """A task that compares the losses of samples, where a method evaluates them, with the mean loss."""

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        each = super().losses(outputs, targets)
        with torch.no_grad():
            mean, whole = float(each.mean()), float(self.mean_loss(outputs, targets))
        if abs(mean - whole) > 1e-3 * abs(whole) + 1e-6:
            raise ExperimentError(
                f"it evaluates the loss of each sample, whose mean is {mean:.6g}, and the task's loss of the same "
                f"batch is {whole:.6g}: it would minimize another loss. Give a loss= that is the mean over the "
                "samples, without weights or samples that it leaves out"
            )
        return each
