"""The drivers of the methods that need more than one mean loss over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe import SAM, closures, variants
from steppe.experiments.data.batches import Batch
from steppe.experiments.training.drivers import Driver, Forward

__all__ = ["AveragedWeights", "MicroBatches", "OnAFraction", "OwnPast", "Sharpest"]


class _AroundSAM(Driver):
    """A driver whose passes are a SAM's."""

    optimizer: SAM

    def __init__(self, optimizer: SAM) -> None:
        super().__init__(optimizer)


class OnAFraction(_AroundSAM):
    """Climb on a fraction of the batch."""

    def __init__(self, optimizer: SAM, fraction: float = 0.25) -> None:
        super().__init__(optimizer)
        self.fraction = fraction

    def step(self, forward: Forward, batch: Batch) -> Tensor:
        """Take one step."""
        closure = closures.fraction(self.optimizer, forward, batch.tensors, fraction=self.fraction)
        loss: Tensor = self.optimizer.step(closure)
        return loss


class Sharpest(_AroundSAM):
    """Go down with the samples whose loss the climb raised most (ESAM)."""

    def __init__(self, optimizer: SAM, gamma: float = 0.5) -> None:
        super().__init__(optimizer)
        self.gamma = gamma

    def step(self, forward: Forward, batch: Batch) -> Tensor:
        """Take one step."""
        closure = closures.selected(self.optimizer, forward.losses, batch.tensors, gamma=self.gamma)
        loss: Tensor = self.optimizer.step(closure)
        return loss


class MicroBatches(_AroundSAM):
    """Climb for every m samples on their own (m-sharpness)."""

    def __init__(self, optimizer: SAM, m: int = 16) -> None:
        super().__init__(optimizer)
        self.m = m

    def step(self, forward: Forward, batch: Batch) -> Tensor:
        """Take one step."""
        return closures.micro_batches(self.optimizer, forward, batch.tensors, m=self.m)


class _WithTerm(Driver):
    """A driver whose loss has a further term, a module with a memory that belongs to the checkpoint."""

    def __init__(self, optimizer: Optimizer, module: nn.Module) -> None:
        super().__init__(optimizer)
        self.module = module

    def term(self, forward: Forward, logits: Tensor, batch: Batch) -> Tensor:
        """Give what is added to the mean loss of the batch."""
        raise NotImplementedError

    def step(self, forward: Forward, batch: Batch) -> Tensor:
        """Take one step; the loss is without the term, as everybody's."""
        self.module.to(batch.images.device)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            logits = forward.logits(batch.images)
            losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
            forward.mean(losses + self.term(forward, logits, batch)).backward()  # type: ignore[no-untyped-call]
            return forward.mean(losses.detach())

        loss: Tensor = self.optimizer.step(closure)  # type: ignore[arg-type, assignment]
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The module's memory."""
        return dict(self.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it over."""
        self.module.load_state_dict(state)


class OwnPast(_WithTerm):
    """Stay near what each image's outputs were some epochs ago (SAF)."""

    def __init__(
        self,
        optimizer: Optimizer,
        images: int,
        classes: int,
        lmbda: float = 0.3,
        tau: float = 5.0,
        epochs_ago: int = 3,
        start: int = 5,
    ) -> None:
        module = variants.saf(images, classes, lmbda=lmbda, tau=tau, epochs_ago=epochs_ago, start=start)
        super().__init__(optimizer, module)

    def term(self, forward: Forward, logits: Tensor, batch: Batch) -> Tensor:
        """Compare with the memory."""
        value: Tensor = self.module(logits, batch.indices, epoch=batch.epoch)
        return value


class AveragedWeights(_WithTerm):
    """Stay near the outputs of averaged weights (MESA)."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        lmbda: float = 0.8,
        tau: float = 5.0,
        beta: float = 0.995,
        start: int = 5,
    ) -> None:
        super().__init__(optimizer, variants.mesa(model, optimizer, lmbda=lmbda, tau=tau, beta=beta, start=start))
        self.start = start

    def term(self, forward: Forward, logits: Tensor, batch: Batch) -> Tensor:
        """Compare with the average's outputs, for which it makes a pass of its own."""
        if batch.epoch >= self.start:
            forward.count(len(batch), recorded=False)
        value: Tensor = self.module(logits, batch.images, epoch=batch.epoch)
        return value
