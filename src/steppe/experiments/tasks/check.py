"""Try a task on a few samples before anything is trained, so that an error names the user's own function and line."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steppe.experiments.config.task_info import TaskInfo
from steppe.experiments.errors import ExperimentError, first_line
from steppe.experiments.tasks.batches import share_out
from steppe.experiments.tasks.samples import RandomStream, Samples
from steppe.experiments.tasks.task import Task, describe, logits_of
from steppe.experiments.world import World
from steppe.flatness._batches import cast

_SAMPLES = 4


def check(task: Task, device: torch.device) -> TaskInfo:
    """Run the model forward and backward on a few samples, and each metric on some of the test data.

    Returns the metrics, and a description of the model and the data.

    Raises:
        ExperimentError: A function of the task raised an error, or returned something that cannot be trained on.
    """
    world = World(device)
    with RandomStream(0, 0, 0).active():
        batches, sizes = {}, {}
        for split in task.splits:
            with _explained(f"{split}=", "could not be read"):
                samples = task.samples(split)
                sizes[split] = len(samples)
                batches[split] = next(share_out(samples.to(device), [_some(samples)], world, seed=0)).data
        with _explained("model=", "raised an error"):
            model = task.model()
        if not isinstance(model, nn.Module):
            raise ExperimentError(f"the task's model= returned {describe(model)}, and a torch.nn.Module is needed")
        model.to(device)
        if not any(p.requires_grad for p in model.parameters()):
            raise ExperimentError(
                "the task's model has no parameter that requires a gradient, so nothing can be trained"
            )
        outputs, targets = _outputs(task, model, batches["train"])
        _check_loss(task, model, outputs, targets)
        with _explained("optimizer=", "raised an error"):
            optimizer = task.optimizer(model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ExperimentError(
                f"the task's optimizer= returned {describe(optimizer)}, and a torch optimizer is needed"
            )
        model.eval()
        with torch.no_grad():
            for split, batch in batches.items():
                if split != "train":
                    _check_metrics(task, *_outputs(task, model, batch))
    parameters = sum(p.numel() for p in model.parameters())
    data = " + ".join(f"{number:,}" for number in sizes.values())
    return replace(task.info, description=f"{type(model).__name__} ({parameters:,} parameters), {data} samples")


def _some(samples: Samples) -> Tensor:
    return torch.arange(min(_SAMPLES, len(samples)) if samples.sizes is None else samples.sizes[0])


def _outputs(task: Task, model: nn.Module, batch: Any) -> tuple[Any, Any]:
    with _explained("predict=" if task.predict else "the model", f"raised an error on a batch {describe(batch)}"):
        found = task.outputs(model, batch)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ExperimentError(
            f"the task's predict= returned {describe(found)}, and a pair is needed: (outputs, targets)"
        )
    return found


def _check_loss(task: Task, model: nn.Module, outputs: Any, targets: Any) -> None:
    shapes = f"outputs {describe(logits_of(outputs))} and targets {describe(targets)}"
    with _explained("loss=", f"raised an error on {shapes}"):
        loss = task.mean_loss(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise ExperimentError(
            f"the task's loss= returned {describe(loss)} for {shapes}, and the mean loss of a batch is needed: a "
            "tensor of one floating-point number, not the loss of each sample"
        )
    if not loss.requires_grad:
        raise ExperimentError(
            f"the task's loss does not depend on the weights through autograd, for {shapes}: nothing would be trained. "
            "Do not use .item(), .detach(), argmax or torch.no_grad() on the way from the model to the loss"
        )
    if not math.isfinite(loss.item()):
        raise ExperimentError(
            f"the loss of the new model is {loss.item()} on {shapes}: look for NaN in the data, or a loss that takes "
            "other outputs (logits or probabilities?)"
        )
    with _explained("the backward pass", f"raised an error on {shapes}"):
        loss.backward()  # type: ignore[no-untyped-call]
    if all(p.grad is None for p in model.parameters()):
        raise ExperimentError("the loss gives no gradient to any parameter of the model that model= returned")
    model.zero_grad()


def _check_metrics(task: Task, outputs: Any, targets: Any) -> None:
    outputs, targets = cast((logits_of(outputs), targets), device=torch.device("cpu"))
    for name, metric in task.all_metrics().items():
        shapes = f"outputs {describe(outputs)} and targets {describe(targets)}"
        with _explained(f"the metric {name!r}", f"raised an error on {shapes}"):
            value = metric.function(outputs, targets)
        with _explained(f"the metric {name!r}", f"returned {describe(value)} for {shapes}, and a number is needed"):
            float(value)


@contextmanager
def _explained(what: str, happened: str) -> Iterator[None]:
    """Turn an error into one line with the user's own line in it."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        raise ExperimentError(
            f"the task's {what} {happened} ({type(error).__name__}: {first_line(error)}){_place(error)}"
        ) from error


def _place(error: BaseException) -> str:
    """Return the last place of a traceback outside of installed packages; nothing if there is none."""
    ours = Path(__file__).parents[2]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not path.is_relative_to(ours) and "site-packages" not in path.parts and frame.filename[0] != "<":
            return f", at {frame.filename}:{frame.lineno}: {frame.line}"
    return ""
