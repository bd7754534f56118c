"""How a method turns a batch into one optimizer step in a comparison; most methods need only the plain closure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.optim import Optimizer


class LabeledBatch(Protocol):
    """One process's share of a batch of samples with targets."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the batch, of shape (n, ...) each."""

    @property
    def inputs(self) -> Any:
        """The inputs of the model, a tensor of shape (n, ...)."""

    @property
    def targets(self) -> Any:
        """The targets, of shape (n,): class indices."""

    @property
    def indices(self) -> Tensor:
        """Positions of the samples in the data set, of shape (n,)."""

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0."""

    def __len__(self) -> int: ...


class CountedForward(Protocol):
    """The network and its loss for one step; every sample that it evaluates is counted."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the mean loss."""

    def losses(self, *tensors: Tensor) -> Tensor:
        """Return the loss of each sample, of shape (n,)."""

    def backward(self, *tensors: Tensor) -> Tensor:
        """Add the gradient of the mean loss to that of the weights, and return the loss, detached."""

    def losses_of(self, logits: Tensor, targets: Any) -> Tensor:
        """Return the loss of each sample, of shape (n,), for outputs that `logits` returned."""

    def wrap_loss(self, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        """Replace the loss, a function of the outputs and further arguments, by ``wrap(loss)`` in this step."""

    def mean(self, losses: Tensor) -> Tensor:
        """Return the mean of losses of shape (n,)."""

    def logits(self, inputs: Any) -> Tensor:
        """Return the logits."""

    def count(self, samples: int, *, recorded: bool) -> None:
        """Count samples that another network of the same size evaluates."""


class StepFunction:
    """Takes the optimizer steps of one run; this base class passes the plain closure to ``optimizer.step``.

    A subclass for another way to take a step overrides :meth:`step`. The parameters of its constructor after the first
    are filled by their names: from the run context where it has them, else from the method spec.
    """

    remembers_samples: ClassVar[bool] = False
    """True if it keeps something of each sample for later epochs, and needs to know which samples a batch has."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, forward: CountedForward, batch: LabeledBatch) -> Tensor:
        """Take one step on this process's share of a batch, and return its mean loss at w."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            return forward.backward(*batch.tensors)

        loss: Tensor = self.optimizer.step(closure)  # type: ignore[arg-type, assignment]
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return what the following steps depend on beside network and optimizer: tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; its tensors are on the CPU."""
