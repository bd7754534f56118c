"""The model of a run, and its loss as a step function uses it, with a count of all samples.

A step function is a subclass of `StepFunction`. With a builder of `steppe.closures` its `step` is one line:

    return self.optimizer.step(closures.fraction(self.optimizer, forward, batch.tensors, fraction=0.25))
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.batches import Batch
from steppe.experiments.tasks.task import Task, logits_of
from steppe.experiments.world import World
from steppe.flatness._batches import map_tensors

FORWARD_ONLY = Fraction(1, 3)
"""Cost of a sample without a backward pass, which does about twice the work of the forward pass."""


class Forward:
    """The model and the task's loss for one step; every sample that it evaluates is counted.

    A sample is one gradient evaluation where autograd records, and `FORWARD_ONLY` of one under `torch.no_grad()`.

    Processes average their gradients, and their shares of a batch may differ by one sample. So each mean loss is
    weighted by this process's share of the whole batch; the samples that a step function selects from its share
    represent all of it.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        batch: Batch,
        world: World,
        autocast: Callable[[], AbstractContextManager[object]],
        micro_batches: int = 1,
    ) -> None:
        self._task, self._model, self._batch, self._world, self._autocast = task, model, batch, world, autocast
        self._micro_batches = micro_batches
        self._total_loss: Callable[..., Tensor] = task.total_loss
        self._recorded = self._unrecorded = 0

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Evaluate the mean loss of samples: the tensors of the batch, or of a part of it."""
        outputs, targets, n = self._outputs(tensors)
        return self._total_loss(outputs, targets, n) * self._weight(n)

    def losses(self, *tensors: Tensor) -> Tensor:
        """Evaluate the loss of each sample, (n,), weighted so that their mean is the mean loss."""
        outputs, targets, _ = self._outputs(tensors)
        return self._task.losses(outputs, targets) * self._share

    def backward(self, *tensors: Tensor) -> Tensor:
        """Evaluate the mean loss and its gradient, in micro-batches if the recipe says so; return the loss."""
        n = len(self._batch)
        parts = min(self._micro_batches, n)
        if parts > 1 and not tensors:
            raise ExperimentError(
                f"accumulate={self._micro_batches} cuts a batch into parts, and a batch of this task holds no tensors "
                "in tuples, lists or mappings that could be cut: take a smaller batch_size"
            )
        if parts <= 1:
            loss = self(*tensors)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        total = torch.zeros((), device=self._world.device)
        for i in range(parts):
            begin, end = i * n // parts, (i + 1) * n // parts
            loss = self(*(t[begin:end] for t in tensors)) * ((end - begin) / n)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def losses_of(self, logits: Tensor, targets: Any) -> Tensor:
        """Evaluate the loss of each sample, (n,), of outputs that `logits` returned."""
        return self._task.losses(in_float32(logits), targets)

    def wrap_loss(self, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        """Replace the total loss, a function of the outputs and further arguments, by ``wrap(total loss)``."""
        if self._task.loss is None:
            raise ExperimentError(
                "the model computes its loss itself, and this method needs it as a function of the outputs: give the "
                "task a loss=, (outputs, targets) -> mean loss"
            )
        self._total_loss = wrap(self._total_loss)

    def mean(self, losses: Tensor) -> Tensor:
        """Average losses (n,) that a step function has computed from `logits`."""
        return losses.sum() * self._weight(len(losses))

    def logits(self, inputs: Any) -> Tensor:
        """Evaluate the outputs of inputs."""
        if self._task.predict is not None:
            raise ExperimentError(
                "this method calls the model itself, with the inputs of a pair (inputs, targets), and the task has a "
                "predict= that would not be called"
            )
        self.count(len(inputs), recorded=torch.is_grad_enabled())
        with self._autocast():
            logits: Tensor = logits_of(self._model(inputs))
        return logits

    def count(self, samples: int, *, recorded: bool) -> None:
        """Count samples that another network of the same size evaluates, such as a running mean."""
        if recorded:
            self._recorded += samples
        else:
            self._unrecorded += samples

    def cost(self) -> Fraction:
        """Return the gradient evaluations so far, of all processes together; every process must call it."""
        counts = self._recorded, self._unrecorded
        if self._world.size > 1:
            total = self._world.total(torch.tensor(counts, dtype=torch.int64, device=self._world.device))
            counts = tuple(total.tolist())
        return counts[0] + FORWARD_ONLY * counts[1]

    def _outputs(self, tensors: tuple[Tensor, ...]) -> tuple[Any, Any, int]:
        """Return the outputs in float32, the targets and the number of samples."""
        data, n = self._batch.data, len(self._batch)
        own = self._batch.tensors
        if len(tensors) != len(own) or any(a is not b for a, b in zip(tensors, own, strict=True)):
            n = _rows(tensors, own, n)
            rest = iter(tensors)
            data = map_tensors(data, lambda _: next(rest))
        self.count(n, recorded=torch.is_grad_enabled())
        with self._autocast():
            outputs, targets = self._task.outputs(self._model, data)
        return in_float32(outputs), targets, n

    @property
    def _share(self) -> float:
        return len(self._batch) * self._world.size / self._batch.size

    def _weight(self, n: int) -> float:
        return (self._world.size / self._batch.size) * (len(self._batch) / n)


def in_float32(outputs: Any) -> Any:
    """Return outputs in which a tensor of half precision, as autocast makes it, is float32."""
    return (
        outputs.float() if isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16) else outputs
    )


def _rows(tensors: tuple[Tensor, ...], own: tuple[Tensor, ...], n: int) -> int:
    """Return the number of samples in a part of a batch of `n`."""
    for whole in own:
        if whole.dim() == 0 or len(whole) != n:
            raise ExperimentError(
                f"this method evaluates a part of a batch of {n} samples, and one of its tensors has the shape "
                f"{tuple(whole.shape)}, without a row for each sample: only methods that take whole batches can train "
                "this task"
            )
    return len(tensors[0])
