"""Shared by SAF and MESA: the divergence from earlier outputs, and the step with a term added to the loss."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._checks import check_count, check_nonnegative, check_positive
from steppe.methods._step_function import CountedForward, LabeledBatch, StepFunction


def kl_divergence(past: Tensor, now: Tensor, tau: float) -> Tensor:
    """Return KL(softmax(past / tau) || softmax(now / tau)) over dimension 1, in float32 or wider.

    Both have shape (n, classes, ...), and the result has shape (n, ...).
    """
    wide = torch.promote_types(now.dtype, torch.float32)
    p, q = (F.log_softmax(y.to(wide) / tau, dim=1) for y in (past, now))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def broadcastable(flags: Tensor, like: Tensor) -> Tensor:
    """Reshape one flag per sample, (n,), so that it broadcasts to the shape (n, ...) of ``like``."""
    return flags.reshape(-1, *[1] * (like.dim() - 1))


def zero_term(logits: Tensor) -> Tensor:
    """Return a 0-dim zero without a graph, in float32 or wider."""
    return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))


def check_hyperparameters(lmbda: float, tau: float, start: int) -> None:
    """Raise ValueError if lambda, tau or E_start is out of range."""
    check_nonnegative("lmbda", lmbda, "the weight of the term")
    check_positive("tau", tau, "the temperature by which the logits are divided")
    check_count("start", start, "the first epoch with the term", at_least=0)


def check_epoch(epoch: int) -> None:
    """Raise ValueError unless the epoch is a Python int of at least 0."""
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise ValueError(
            f"epoch must be an integer of 0 or more, got {epoch!r}: it decides which outputs are compared. Give the "
            "epoch's number as Python's int, so that nothing has to be read from the device"
        )


class StepWithTerm(StepFunction):
    """Takes steps on a loss with a further term; the term is a module whose state belongs to the checkpoint."""

    def __init__(self, optimizer: Optimizer, module: nn.Module) -> None:
        super().__init__(optimizer)
        self.module = module

    def term(self, forward: CountedForward, logits: Tensor, batch: LabeledBatch) -> Tensor:
        """Return the 0-dim term that is added to the mean loss of the batch."""
        raise NotImplementedError

    def step(self, forward: CountedForward, batch: LabeledBatch) -> Tensor:
        """Take one step; the loss that is returned is without the term, so that methods can be compared by it."""
        self.module.to(batch.inputs.device)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            logits = forward.logits(batch.inputs)
            if logits.dim() < 2 or logits.shape[1] < 2:
                raise ValueError(
                    f"the term compares distributions over classes, and outputs of shape {tuple(logits.shape)} have "
                    "none in dimension 1, so it would always be zero"
                )
            losses = forward.losses_of(logits, batch.targets)
            forward.mean(losses + self.term(forward, logits, batch)).backward()  # type: ignore[no-untyped-call]
            return forward.mean(losses.detach())

        loss: Tensor = self.optimizer.step(closure)  # type: ignore[arg-type, assignment]
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the module's state."""
        return dict(self.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the module's state."""
        self.module.load_state_dict(state)
