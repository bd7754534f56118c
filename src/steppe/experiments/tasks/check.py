"""Try a task on a few samples before anything is trained, so that an error names the user's own function and line."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from steppe.experiments.config.task_info import TaskInfo
from steppe.experiments.errors import ExperimentError, explained, place_of
from steppe.experiments.tasks.batches import share_out
from steppe.experiments.tasks.outputs import in_order, spread_out
from steppe.experiments.tasks.samples import RandomStream, Samples, TensorSamples
from steppe.experiments.tasks.task import Metric, Task, describe, label_of, logits_of
from steppe.experiments.world import World, launched
from steppe.flatness._batches import cast, list_tensors

_SAMPLES = 4
_ON_ANY_NUMBER = (TypeError, NameError, AttributeError, ImportError)  # errors of a function, whatever its samples


def check(task: Task, device: torch.device) -> TaskInfo:
    """Run the model forward and backward on a few samples, and each metric on some of the test data.

    Returns the metrics, and a description of the model and the data.

    Raises:
        ExperimentError: A function of the task raised an error, or returned something that cannot be trained on.
    """
    world = World(device)
    with RandomStream(0, 0, 0).active():
        batches, splits = {}, dict[str, Samples]()
        for split in task.splits:
            with explained(f"{split}=", "could not be read"):
                try:
                    samples = task.samples(split)
                except ExperimentError as error:
                    named = str(error).startswith(split)
                    raise ExperimentError(str(error) if named else f"{split}: {error}") from error
                splits[split] = samples
                if not len(samples):
                    raise ExperimentError(f"{split} is empty: at least one sample is needed")
                batches[split] = few_samples(samples.to(device), world)
                if task.predict is None and task.metrics and _is_sample(batches[split]):
                    raise ExperimentError(
                        f"a batch of {split}= is {describe(batches[split])}, whose target has no dimension of samples: "
                        "a list is taken for a list of batches. If it holds samples, give DataLoader(samples, "
                        "batch_size=...)"
                    )
                if not isinstance(samples, TensorSamples) and not same_tensors(
                    batches[split], few_samples(samples, world)
                ):
                    warnings.warn(_OWN_NUMBERS.format(split), stacklevel=2)
        with explained("model=", "raised an error", task.model):
            model = task.new_model()
        model.to(device)
        if launched() > 1 and device.type == "cpu" and any(isinstance(m, _BatchNorm) for m in model.modules()):
            raise ExperimentError(
                "the task's model has BatchNorm layers, and in several processes on CPUs each would normalize by its "
                "own part of the batch: start it without torchrun, or use GroupNorm or LayerNorm"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ExperimentError(
                "the task's model has no parameter that requires a gradient, so nothing can be trained"
            )
        with _naming_types(model, batches["train"]):
            outputs, targets = _outputs(task, model, batches["train"])
            _check_loss(task, model, outputs, targets)
        with explained("optimizer=", "raised an error", task.optimizer):
            optimizer = task.optimizer(model)
        _check_optimizer(optimizer, model)
        model.eval()
        with torch.no_grad():
            for split, batch in batches.items():
                if split != "train":
                    _check_metrics(task, model, batch, splits[split], world)
    parameters = sum(p.numel() for p in model.parameters())
    data = " + ".join(f"{len(samples):,}" for samples in splits.values())
    return replace(task.info, description=f"{type(model).__name__} ({parameters:,} parameters), {data} samples")


@contextmanager
def _naming_types(model: nn.Module, batch: Any) -> Iterator[None]:
    """Add to an error about types that the numbers of the data, float64 in NumPy, have another one than the weights."""
    try:
        yield
    except ExperimentError as error:
        weights = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        numbers = {tensor.dtype for tensor in list_tensors(batch) if tensor.is_floating_point()}
        if "type" not in str(error) or not numbers or numbers & weights:
            raise
        theirs, ours = (", ".join(sorted(str(t).removeprefix("torch.") for t in types)) for types in (numbers, weights))
        raise ExperimentError(
            f"{error}. The numbers of the data are {theirs}, and the weights {ours}: give tensors of that type, by "
            f"inputs.to(torch.{ours})"
        ) from error


def _some(samples: Samples) -> Tensor:
    """Return the positions of a few samples, from the first to the last: data may be sorted by their class."""
    if samples.sizes is not None:
        return torch.arange(samples.sizes[0])
    n = len(samples)
    return torch.linspace(0, n - 1, min(_SAMPLES, n), dtype=torch.float64).long()


def few_samples(samples: Samples, world: World) -> Any:
    """Return the first batch of a seed, or one of a few samples."""
    return next(share_out(samples, [_some(samples)], world, seed=0)).data


def _is_sample(batch: Any) -> bool:
    """True if the target is a number or a tensor of one, and no tensor of the targets of several samples."""
    if isinstance(batch, Mapping):
        target = batch.get(label_of(batch))
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        target = batch[-1]
    else:
        return False
    return isinstance(target, int | float) or (isinstance(target, Tensor) and not target.dim())


def same_tensors(one: Any, other: Any) -> bool:
    """True if two batches have equal tensors, as far as they are numbers."""
    pairs = zip(list_tensors(one), list_tensors(other), strict=True)
    return all(a.shape == b.shape and torch.equal(a.cpu().nan_to_num(), b.cpu().nan_to_num()) for a, b in pairs)


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ExperimentError(f"the task's optimizer= returned {describe(optimizer)}, and a torch optimizer is needed")
    of_model = {id(p) for p in model.parameters()}
    trained = [id(p) in of_model for group in optimizer.param_groups for p in group["params"]]
    if not any(trained):
        raise ExperimentError(
            "the task's optimizer= returned an optimizer of other parameters than the model's, so nothing would be "
            "trained: use those of the model that it gets, lambda model: torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    if not all(trained):
        raise ExperimentError(
            "the task's optimizer= returned an optimizer with parameters that the model does not have, as those of a "
            "loss: they are not made anew for each run, so it would go on from those of the last one. Make them in "
            "model=, as a part of the model, and let predict= hand what the loss needs of them to it with the outputs"
        )


def _outputs(task: Task, model: nn.Module, batch: Any) -> tuple[Any, Any]:
    what, function = ("predict=", task.predict) if task.predict else ("the model", None)
    with explained(what, f"raised an error on a batch {describe(batch)}", function):
        found = task.outputs(model, batch)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ExperimentError(
            f"the task's predict= returned {describe(found)}, and a pair is needed: (outputs, targets)"
        )
    return found


def _check_loss(task: Task, model: nn.Module, outputs: Any, targets: Any) -> None:
    shapes = f"outputs {describe(logits_of(outputs))} and targets {describe(targets)}"
    with explained("loss=", f"raised an error on {shapes}", task.loss), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = task.mean_loss(outputs, targets)
    # mse_loss, l1_loss and their like warn of it
    warned = any("target size" in str(warning.message) for warning in caught)
    if warned or (task.loss and _broadcasts(task.loss, logits_of(outputs), targets)):
        raise ExperimentError(f"the task's loss= {_BROADCASTS.format(shapes)}{place_of(task.loss)}")
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
    with explained("the backward pass", f"raised an error on {shapes}"):
        loss.backward()  # type: ignore[no-untyped-call]
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if all(p.grad is None for p in model.parameters()):
        raise ExperimentError("the loss gives no gradient to any parameter of the model that model= returned")
    if launched() > 1 and without:
        raise ExperimentError(
            f"the loss gives no gradient to {without[0]}, and several processes would wait for it: remove such "
            "parameters, or set their requires_grad=False, or start it without torchrun"
        )
    model.zero_grad()


def _check_metrics(task: Task, model: nn.Module, batch: Any, samples: Samples, world: World) -> None:
    outputs, targets = few = _for_metrics(task, *_outputs(task, model, batch))
    for name, metric in task.all_metrics().items():
        shapes = f"outputs {describe(outputs)} and targets {describe(targets)}"
        with explained(f"the metric {name!r}", f"raised an error on {shapes}", metric.function):
            value = _value(metric, few, partial(_whole, task, model, samples, world))
        with explained(
            f"the metric {name!r}", f"returned {describe(value)} for {shapes}, and a number is needed", metric.function
        ):
            if isinstance(value, str):
                raise TypeError(f"{value!r} is a text")
            float(value.item() if hasattr(value, "item") else value)
        if _broadcasts(metric.function, outputs, targets):
            raise ExperimentError(f"the metric {name!r} {_BROADCASTS.format(shapes)}{place_of(metric.function)}")


def _value(metric: Metric, few: tuple[Any, Any], whole: Callable[[], tuple[Any, Any]]) -> Any:
    """Return a metric of a few samples, or of the whole split where they may be too few for it, as of one class."""
    try:
        return metric.function(*few)
    except _ON_ANY_NUMBER:
        raise
    except Exception as error:
        try:
            return metric.function(*whole())
        except Exception:  # so their number is not the reason
            raise error from None


def _whole(task: Task, model: nn.Module, samples: Samples, world: World) -> tuple[Any, Any]:
    """Return the outputs and targets of a split, as a run's evaluation gives them to metrics."""
    positions = spread_out(samples, task.evaluation_batch_size or task.usual_batch_size(samples))
    batches = share_out(samples.to(world.device), positions, world)
    return in_order([_for_metrics(task, *task.outputs(model, batch.data)) for batch in batches], positions)


def _for_metrics(task: Task, outputs: Any, targets: Any) -> tuple[Any, Any]:
    moved: tuple[Any, Any] = cast((task.for_metrics(outputs), targets), device=torch.device("cpu"))
    return moved


def _broadcasts(function: Any, outputs: Any, targets: Any) -> bool:
    """True if a mean over samples, of (n, 1) and (n,) or the reverse, compares each output with every target.

    Then it returns another number for two equal shapes, which is the mean of the samples one by one. A function that
    gives them the same shape itself fails the second condition, and so does one that is no mean.
    """
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or outputs.shape == targets.shape:
        return False
    if outputs.numel() != targets.numel() or 0 in (outputs.dim(), targets.dim()) or len(outputs) != len(targets):
        return False
    perfect = targets.reshape(outputs.shape).to(outputs.dtype)
    # errors of one sign add up to the same whatever is compared, so those of a new model may tell nothing
    return any(_broadcasts_on(function, given, targets) for given in (outputs, perfect))


def _broadcasts_on(function: Any, outputs: Tensor, targets: Tensor) -> bool:
    equal = (outputs, targets.reshape(outputs.shape)), (outputs.reshape(targets.shape), targets)
    alone = [(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given, *as_equal = (float(function(*pair)) for pair in ((outputs, targets), *equal))
            mean = sum(float(function(*pair)) for pair in alone) / len(alone)
    except Exception:  # it does not take equal shapes, so it expects these ones
        return False
    return all(_close(mean, value) for value in as_equal) and not _close(mean, given)


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-7)


_BROADCASTS = (
    "compares each output with every target, for {}: give both the same shape, for example by targets.unsqueeze(1)"
)
_OWN_NUMBERS = (
    "the data of {}= differ when the same batch is read twice with the same seeds: they draw from a generator of their "
    "own. So the methods of a seed do not get the same batches, and a run that is resumed ends with other bits. Draw "
    "from the global generators of torch, NumPy or Python, which are seeded for each batch"
)
