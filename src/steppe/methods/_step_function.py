"""How a method turns a batch into one optimizer step in a comparison. Most need only the plain closure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer


class Batch(Protocol):
    """One process's share of a batch."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""

    @property
    def images(self) -> Tensor:
        """Images, (n, ...)."""

    @property
    def labels(self) -> Tensor:
        """Class indices, (n,)."""

    @property
    def indices(self) -> Tensor:
        """Positions of the samples in the data set, (n,)."""

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0."""

    def __len__(self) -> int: ...


class Forward(Protocol):
    """The network and its loss for one step; counts every sample that it evaluates."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Evaluate the mean loss."""

    def losses(self, *tensors: Tensor) -> Tensor:
        """Evaluate the loss of each sample, (n,)."""

    def mean(self, losses: Tensor) -> Tensor:
        """Average losses (n,)."""

    def logits(self, images: Tensor) -> Tensor:
        """Evaluate the logits."""

    def count(self, images: int, *, recorded: bool) -> None:
        """Count samples that another network of the same size evaluates."""


class StepFunction:
    """Takes the steps of one run; this one with the closure of `torch.optim`, as often as `optimizer` asks for it.

    The parameters of a subclass's constructor after the first are filled by their names: from `Setting`, or else from
    the contender's spec.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, forward: Forward, batch: Batch) -> Tensor:
        """Take one step on this process's share of a batch; return its mean loss at w."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = forward(*batch.tensors)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        loss: Tensor = self.optimizer.step(closure)  # type: ignore[arg-type, assignment]
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What the following steps depend on besides network and optimizer: tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, with its tensors on the CPU."""
