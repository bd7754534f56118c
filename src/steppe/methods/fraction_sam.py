"""SAM with a perturbation computed on a fraction of the batch."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._closures import Loss, backward, check_share, count_samples, is_last
from steppe.methods._step_function import Batch, Forward, StepFunction
from steppe.methods.sam import sam
from steppe.papers import Paper, cites
from steppe.sam import SAM

LM_SAM_PAPER = Paper(
    "bahri2022lmsam",
    ("Dara Bahri", "Hossein Mobahi", "Yi Tay"),
    "Sharpness-Aware Minimization Improves Language Model Generalization",
    "2110.08529",
    2022,
    "Annual Meeting of the Association for Computational Linguistics (ACL)",
)


@cites(LM_SAM_PAPER)
def fraction(optimizer: SAM, loss: Loss, batch: Sequence[Tensor], *, fraction: float = 0.25) -> Callable[[], Tensor]:
    """Climb along the gradient of a fraction of the batch, and go down with that of the whole batch.

    The first ``fraction`` of the samples, rounded up, make the pass at w; the passes at w + e that are only there to
    climb on see them too. With one climb a step costs 1 + fraction passes. A step that does not climb sees the whole
    batch. Shuffle the data: the first samples stand for all of them, also in BatchNorm's running statistics.

    Args:
        optimizer: a :class:`steppe.SAM` with any rules.
        loss: takes the tensors of a batch, and returns their mean loss.
        batch: tensors with the samples along their first dimension.
        fraction: the share of the samples that climb, more than 0 and at most 1.

    Returns:
        The closure for ``optimizer.step``, which gives back the loss at w, of the samples that made that pass.

    Raises:
        ValueError: a fraction out of range, a batch without samples, or of unequal lengths.
        RuntimeError: (when called) the cadence decides by the gradient at w, so nobody knows what that pass is for.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
    >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
    >>> def loss(x, y):
    ...     print(len(x), "samples")
    ...     return torch.nn.functional.mse_loss(model(x), y)
    >>> _ = optimizer.step(fraction(optimizer, loss, (x, y), fraction=0.25))
    2 samples
    8 samples

    Source: Bahri et al., Sharpness-Aware Minimization Improves Language Model Generalization, arXiv 2110.08529, who
    train with a quarter of the batch.
    """
    n = math.ceil(check_share("fraction", fraction) * count_samples(batch))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*(batch if is_last(optimizer) else [t[:n] for t in batch]))
        backward(optimizer, value)
        return value

    return closure


class OnAFraction(StepFunction):
    """Climb on a fraction of the batch."""

    optimizer: SAM

    def __init__(self, optimizer: SAM, fraction: float = 0.25) -> None:
        super().__init__(optimizer)
        self.fraction = fraction

    def step(self, forward: Forward, batch: Batch) -> Tensor:
        """Take one step."""
        closure = fraction(self.optimizer, forward, batch.tensors, fraction=self.fraction)
        loss: Tensor = self.optimizer.step(closure)
        return loss


def _made(base: Optimizer, model: nn.Module, **given: Any) -> tuple[Any, ...]:
    return sam(base, model=model, **given), fraction


CARD = MethodCard(
    name="fraction_sam",
    function=fraction,
    label="SAM on a fraction",
    about="With one climb, a step costs 1 + fraction passes.",
    equation="g = gradient at w of the first ceil(fraction |B|) samples of the batch B\n"
    "g_s = gradient at w + e of all of B",
    cost="1 + fraction",
    passes=lambda fraction: 1 + fraction,
    memory=COPY,
    when="Where a second pass over the whole batch is too dear, around any perturbation.",
    when_not="With `aesam`, whose cadence needs g first; without shuffled data.",
    usual={"fraction": "0.25 (Bahri et al.)"},
    checked="Not compared with other code.",
    caveats=(
        "BatchNorm's running statistics, and the loss that you see, are those of the fraction.",
        "A step that does not climb sees the whole batch.",
    ),
    make=_made,
    use="optimizer = steppe.variants.sam(base, model=model)\n"
    "optimizer.step(steppe.closures.fraction(optimizer, loss, (x, y), fraction=0.25))",
    comparison=Comparison(
        summary="SAM that climbs on a fraction of the batch, at SAM's rho",
        build=sam,
        passes=lambda fraction, steps: 1 + steps * Fraction(fraction),
        capturable=True,
        step_function=OnAFraction,
    ),
)
