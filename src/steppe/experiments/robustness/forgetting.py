"""Forgetting: the accuracy on a first task after training on a second one."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.experiments.data.accuracy import accuracy
from steppe.experiments.data.batches import count, order, start
from steppe.experiments.robustness.isolation import (
    device_of,
    evaluation,
    restored_generators,
    seed_generators_with_device,
)

_Batch = TypeVar("_Batch")
_CHUNK = 500  # samples in one forward pass of an evaluation

Data = tuple[Tensor, Tensor]
"""Inputs as the model takes them, and targets."""


@dataclass(frozen=True)
class Forgetting:
    """The metric of a model on two tasks, before and after training on the second one."""

    old_before: float
    old_after: float
    new_before: float
    new_after: float

    @property
    def forgotten(self) -> float:
        """The loss of the metric on the first task."""
        return self.old_before - self.old_after


def forgetting(
    model: nn.Module,
    old: Data,
    new: Data,
    new_test: Data,
    *,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    metric: Callable[[Tensor, Tensor], float] = accuracy,
    prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
) -> Forgetting:
    """Train a copy of a model on a second task with a plain optimizer, and measure what it forgets of the first.

    The model, the tensors and all global random generators are left unchanged.

    Args:
        model: The model that was trained on the first task.
        old: Test data of the first task.
        new: Training data of the second task.
        new_test: Test data of the second task: forgetting is compared between models that learn it equally well.
        optimizer: Function of the parameters that returns an optimizer, the same for all models of a comparison, for
            example ``lambda parameters: torch.optim.SGD(parameters, lr=0.01)``.
        steps: Steps on the second task.
        batch_size: Samples in a step.
        seed: Seed of the order of the samples and of dropout.
        loss: Function (outputs, targets) -> mean loss.
        metric: Function (outputs, targets) -> number, by default the accuracy in percent.
        prepare: Function of a batch of inputs before the model gets it, such as a normalization.

    Example:
        >>> images, labels = torch.randn(32, 8), torch.arange(32) % 4
        >>> found = forgetting(
        ...     nn.Linear(8, 4),
        ...     old=(images[:16], labels[:16]),
        ...     new=(-images[:16], labels[:16]),
        ...     new_test=(-images[16:], labels[16:]),
        ...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ...     steps=0,
        ... )
        >>> found.forgotten
        0.0
    """
    if steps < 0 or batch_size < 1:
        raise ValueError(f"steps={steps}, batch_size={batch_size}: they must be at least 0 and 1")
    device = device_of(model)
    with restored_generators(device):
        seed_generators_with_device(seed, device)
        trained = copy.deepcopy(model)
        before = [_measure(trained, data, metric, prepare) for data in (old, new_test)]
        inputs, targets = (tensor.to(device) for tensor in new)

        def mean_loss(chosen: Tensor) -> Tensor:
            return loss(_logits(trained(prepare(inputs[chosen]))), targets[chosen])

        batches = _positions(len(targets), batch_size, seed, steps, device)
        train_on(trained, optimizer(trained.parameters()), batches, mean_loss)
        after = [_measure(trained, data, metric, prepare) for data in (old, new_test)]
    return Forgetting(before[0], after[0], before[1], after[1])


def train_on(
    model: nn.Module, optimizer: Optimizer, batches: Iterable[_Batch], mean_loss: Callable[[_Batch], Tensor]
) -> None:
    """Train a model in training mode, with a step for each batch of a second task."""
    model.train()
    with torch.enable_grad():
        for batch in batches:
            optimizer.step(_closure(optimizer, batch, mean_loss))


def _closure(optimizer: Optimizer, batch: _Batch, mean_loss: Callable[[_Batch], Tensor]) -> Callable[[], float]:
    """Return the closure of a step, which some optimizers evaluate several times."""

    def closure() -> float:
        optimizer.zero_grad()
        loss = mean_loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    return closure


def _positions(n: int, batch_size: int, seed: int, steps: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the positions of the samples of each step, of n, in a new random order for each epoch."""
    batches = count(n, batch_size)
    for step in range(steps):
        epoch, batch = divmod(step, batches)
        if batch == 0:
            positions = order(n, seed, epoch).to(device)
        yield positions[start(batch, n, batches) : start(batch + 1, n, batches)]


def _measure(
    model: nn.Module, data: Data, metric: Callable[[Tensor, Tensor], float], prepare: Callable[[Tensor], Tensor]
) -> float:
    device, (inputs, targets) = device_of(model), data
    with evaluation(model):
        outputs = torch.cat([_logits(model(prepare(part.to(device)))) for part in torch.split(inputs, _CHUNK)])
    return float(metric(outputs, targets.to(device)))


def _logits(outputs: Tensor) -> Tensor:
    logits: Tensor = getattr(outputs, "logits", outputs)
    return logits
