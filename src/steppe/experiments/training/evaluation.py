"""Measure a model: loss and metrics over a whole split, and flatness on a sample of the training data."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from steppe import flatness
from steppe.experiments.data.sampling import FLATNESS_SAMPLE, generator
from steppe.experiments.errors import ExperimentError, explained
from steppe.experiments.storage.records import HALVES
from steppe.experiments.tasks.batches import share_out
from steppe.experiments.tasks.failing import naming_samples
from steppe.experiments.tasks.outputs import concatenated, in_order, spread_out
from steppe.experiments.tasks.samples import Samples
from steppe.experiments.tasks.task import Metric, Task
from steppe.experiments.training.forward import in_float32
from steppe.experiments.world import World
from steppe.flatness._batches import cast

T = TypeVar("T")

_FLATNESS_BATCH = 256  # samples in memory at a time
_TOLERANCE = 1e-2  # of the largest eigenvalue, relative


def evaluate(
    task: Task,
    model: nn.Module,
    samples: Samples,
    batch_size: int,
    world: World,
    autocast: Callable[[], AbstractContextManager[object]],
    raise_if_stopped: Callable[[], None],
) -> dict[str, float]:
    """Measure the loss and the metrics of a split, `batch_size` samples at a time, shared out over the processes.

    Metrics get the samples in their order. The deciding one is measured on two halves of the split as well, under its
    name with each of `HALVES`, so that a moment can be chosen on one and judged on the other; NaN where a half has no
    value. `raise_if_stopped` is called before each batch.
    """
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    kept: list[tuple[Any, Any] | None] = []
    losses: list[tuple[float, int]] = []
    metrics, chunks = task.all_metrics(), spread_out(samples, batch_size)
    with evaluating(model), torch.no_grad():
        for batch in share_out(samples, chunks, world):
            raise_if_stopped()
            if not len(batch):
                kept.append(None)
                losses.append((0.0, 0))
                continue
            with naming_samples(task, model, samples, batch):
                with autocast():
                    outputs, targets = task.outputs(model, batch.data)
                loss = task.total_loss(in_float32(outputs), targets, len(batch)).double()
            total += loss
            if metrics:
                kept.append(cast((in_float32(task.for_metrics(outputs)), targets), device=torch.device("cpu")))
            else:
                losses.append((float(loss), len(batch)))
    found = {"loss": float(world.total(total) / len(samples))}
    batches = _of_all_processes(kept, world)
    whole = in_order(batches, chunks) if metrics else (None, None)
    for i, (name, metric) in enumerate(metrics.items()):
        with explained(f"the metric {name!r}", "raised an error", metric.function):
            value = metric.function(*whole)
        found[name] = as_number(f"the metric {name}", value)
        if i == 0 and len(batches) > 1:
            for suffix, half in _halves(batches).items():
                found[name + suffix] = _of_a_half(name, metric, half)
    if not metrics and len(losses) > 1:
        summed = world.total(torch.tensor(losses, dtype=torch.float64, device=world.device)).tolist()
        for suffix, half in _halves(summed).items():
            found["loss" + suffix] = sum(loss for loss, _ in half) / sum(size for _, size in half)
    return found


def _halves(batches: list[T]) -> dict[str, list[T]]:
    return {suffix: batches[i::2] for i, suffix in enumerate(HALVES)}


def _of_a_half(name: str, metric: Metric, half: list[tuple[Any, Any]]) -> float:
    """Return a metric of a half: NaN where it has none, as with too few positive samples."""
    try:
        return as_number(f"the metric {name}", metric.function(*concatenated(half)))
    except Exception:  # of any kind, from the user's own function, which has a value for the whole
        return math.nan


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode, and each of its modules back to its own.

    Unlike ``steppe.flatness._isolation.evaluation_mode``, which sets the mode of each module itself, it calls
    ``model.eval()``: a model that overrides it or ``train()`` is evaluated as its author evaluates it.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _of_all_processes(kept: list[tuple[Any, Any] | None], world: World) -> list[tuple[Any, Any]]:
    """Return the outputs and targets of all processes, each batch of theirs in one piece."""
    gathered: list[Any] = [kept]
    if world.size > 1:
        gathered *= world.size
        dist.all_gather_object(gathered, kept)
    shares = ([share for share in shares if share is not None] for shares in zip(*gathered, strict=True))
    return [parts[0] if len(parts) == 1 else concatenated(parts) for parts in shares]


def as_number(what: str, value: Any) -> float:
    """Return what a user's function returned as a number; NaN and infinite ones are results."""
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ExperimentError(
            f"{what} returned {type(value).__name__}, and a number is needed: a float, or a tensor of one element"
        ) from error


def flatness_sample(
    samples: Samples, number: int, seed: int, device: torch.device, batch_size: int = _FLATNESS_BATCH
) -> list[Any]:
    """Draw `number` samples, or all where there are fewer, by `seed`: the same batches at every call."""
    if samples.sizes is not None:
        raise ExperimentError(
            "the training data decide which samples make a batch, so no sample can be drawn to measure flatness on: "
            "give a Dataset or tensors"
        )
    drawn = torch.randperm(len(samples), generator=generator(seed, FLATNESS_SAMPLE))[:number].sort().values
    return [batch.data for batch in share_out(samples, list(torch.split(drawn, batch_size)), World(device))]


def objective(task: Task, model: nn.Module, batches: list[Any], **arguments: Any) -> flatness.Objective:
    """Return the task's mean loss of a model on some batches, as the measures of flatness take it."""
    return flatness.Objective(model, batches, evaluate=task.evaluate, **arguments)


def measure_flatness(
    task: Task, model: nn.Module, sample: list[Any], rho: float, raise_if_stopped: Callable[[], None]
) -> dict[str, float]:
    """Measure S(w) at `rho`, the Hessian's largest eigenvalue and the norm of the gradient: fields of `Record`.

    In evaluation mode and in the weights' own precision; the model and all generators are unchanged. All values are
    NaN if the loss is not finite. `raise_if_stopped` is called after every pass over the sample.
    """
    loss = objective(task, model, sample, progress=lambda *_: raise_if_stopped())
    try:
        found = flatness.sharpness(loss, rho=rho, seed=0)
    except FloatingPointError:  # the run itself continues, and checks its loss
        return dict.fromkeys(("sharpness", "lambda_max", "gradient_norm"), math.nan)
    top = flatness.eigenvalues(flatness.Hessian(loss), k=1, tol=_TOLERANCE, seed=0)
    return {"sharpness": found.value, "lambda_max": float(top.values[0]), "gradient_norm": found.gradient_norm}
