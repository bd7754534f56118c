"""Shared by SAF and MESA: the divergence from earlier outputs, and the step with a term in the loss."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.methods._step_function import Batch, Forward, StepFunction

_F = TypeVar("_F", bound=Callable[..., Any])


eager: Callable[[_F], _F] = torch.compiler.disable


def kl_divergence(past: Tensor, now: Tensor, tau: float) -> Tensor:
    """KL(softmax(past / tau) || softmax(now / tau)) over dimension 1, in float32 or wider."""
    wide = torch.promote_types(now.dtype, torch.float32)
    p, q = (F.log_softmax(y.to(wide) / tau, dim=1) for y in (past, now))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def beside(like: Tensor, flags: Tensor) -> Tensor:
    """One flag a sample, in a shape that goes with (n, ...)."""
    return flags.reshape(-1, *[1] * (like.dim() - 1))


def zero(logits: Tensor) -> Tensor:
    return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))


def check(lmbda: float, tau: float, start: int) -> None:
    if not 0 <= lmbda < math.inf:
        raise ValueError(f"lmbda must be finite and at least 0, got {lmbda}: it is the weight of the term")
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be finite and more than 0, got {tau}: the logits are divided by it")
    if start < 0:
        raise ValueError(f"start must be 0 or more, got {start}: it is the first epoch with the term")


def check_epoch(epoch: int) -> None:
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise ValueError(
            f"epoch must be an integer of 0 or more, got {epoch!r}: it says how old the outputs are. Give the epoch's "
            "number as Python's int, which needs no look at the device"
        )


class WithTerm(StepFunction):
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
