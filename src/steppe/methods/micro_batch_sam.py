"""m-SAM: a perturbation of its own for each micro-batch (m-sharpness)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._closures import Loss, backward, count_samples
from steppe.methods._step_function import Batch, Forward, StepFunction
from steppe.methods.sam import sam
from steppe.papers import ICML, Paper, cites
from steppe.sam import SAM

M_SHARPNESS_PAPER = Paper(
    "andriushchenko2022towards",
    ("Maksym Andriushchenko", "Nicolas Flammarion"),
    "Towards Understanding Sharpness-Aware Minimization",
    "2206.06232",
    2022,
    ICML,
)


@cites(M_SHARPNESS_PAPER)
def micro_batches(optimizer: SAM, loss: Loss, batch: Sequence[Tensor], *, m: int) -> Tensor:
    """Give each micro-batch of m samples its own perturbation (m-sharpness), and take the step.

    What goes down is the mean over the micro-batches B_i of the gradients at w + e(B_i), weighed by their sizes. The
    cost in passes over the samples is the method's own. Unlike a closure, this takes the step itself, because it runs
    a loop over :meth:`~steppe.SAM.passes` for each micro-batch; a cadence that goes by the step's number gives them
    all the same answer.

    Args:
        optimizer: a :class:`steppe.SAM` with any rules.
        loss: takes the tensors of a micro-batch, and returns their mean loss.
        batch: tensors with the samples along their first dimension.
        m: samples in a micro-batch; the last one may be smaller.

    Returns:
        The mean loss of the batch at w.

    >>> w = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
    >>> optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=1.0)
    >>> x = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    >>> micro_batches(optimizer, lambda x: (x @ w + (x @ w) ** 2 / 10).mean(), (x,), m=1)
    tensor(0.)

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412,
    section 4.1; Andriushchenko and Flammarion, Towards Understanding Sharpness-Aware Minimization, arXiv 2206.06232.
    """
    samples = count_samples(batch)
    if m < 1:
        raise ValueError(f"m must be 1 or more, got {m}: it is the number of samples in a micro-batch")
    down: dict[Tensor, Tensor] = {}
    at_w: list[Tensor] = []
    for start in range(0, samples, m):
        part = [t[start : start + m] for t in batch]
        weight = len(part[0]) / samples
        for sam_pass in optimizer.passes():
            with sam_pass, torch.enable_grad():
                value = loss(*part)
                backward(optimizer, value)
                if sam_pass.is_first:
                    at_w.append(weight * value.detach())
        _add(down, weight, optimizer)
    for p, gradient in down.items():
        p.grad = gradient
    if optimizer.scaler is None:
        optimizer.step()
    else:
        optimizer.scaler.step(optimizer)
    return torch.stack(at_w).sum()


@torch.no_grad()
def _add(down: dict[Tensor, Tensor], weight: float, optimizer: SAM) -> None:
    """Add the weighed gradients to what goes down."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                down[p] = p.grad * weight if p not in down else down[p].add_(p.grad, alpha=weight)


class MicroBatches(StepFunction):
    """Climb for every m samples on their own (m-sharpness)."""

    optimizer: SAM

    def __init__(self, optimizer: SAM, m: int = 16) -> None:
        super().__init__(optimizer)
        self.m = m

    def step(self, forward: Forward, batch: Batch) -> Tensor:
        """Take one step."""
        return micro_batches(self.optimizer, forward, batch.tensors, m=self.m)


def _made(base: Optimizer, model: nn.Module, **given: Any) -> tuple[Any, ...]:
    return sam(base, model=model, **given), micro_batches


CARD = MethodCard(
    name="micro_batch_sam",
    function=micro_batches,
    label="m-SAM",
    about="What goes down is the mean of the gradients that the micro-batches have there.",
    equation="e_i = e(B_i)                 in each micro-batch B_i of m samples\n"
    "w <- Base(w, mean over i of the gradients of B_i at w + e_i)",
    cost="2",
    passes=2,
    memory=f"{COPY}, and the sum of the gradients",
    when="For a climb of its own in each part of a large batch; only a part's activations are in memory.",
    when_not="Where the device is filled only by the whole batch: the passes are over small parts.",
    usual={"m": "unverified"},
    checked="Not compared with other code.",
    caveats=(
        "It takes the step itself: there is no closure. BatchNorm sees micro-batches.",
        "The cost is that of the method around which it is; 2 is SAM's.",
    ),
    make=_made,
    use="optimizer = steppe.variants.sam(base, model=model)\n"
    "steppe.closures.micro_batches(optimizer, loss, (x, y), m=16)  # takes the step",
    comparison=Comparison(
        summary="SAM with a climb for every m images, at SAM's rho",
        build=sam,
        passes=lambda steps: 1 + steps,
        step_function=MicroBatches,
    ),
)
