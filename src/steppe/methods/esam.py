"""ESAM: perturb a random share of the weights, update with selected samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._tensors import random as random_tensors
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._closures import Loss, backward, check_share, count_samples
from steppe.methods._options import Options, Rho
from steppe.methods._step_function import Batch, Forward, StepFunction
from steppe.methods.sam import sam
from steppe.papers import ICLR, Paper, cites
from steppe.rules import Perturbation, Point, ScaledDirection
from steppe.rules.l2 import L2
from steppe.rules.masks import check_single_ascent_step, masked
from steppe.rules.subsets import Modifier, restricted
from steppe.sam import SAM

ESAM_PAPER = Paper(
    "du2022esam",
    (
        "Jiawei Du",
        "Hanshu Yan",
        "Jiashi Feng",
        "Joey Tianyi Zhou",
        "Liangli Zhen",
        "Rick Siow Mong Goh",
        "Vincent Y. F. Tan",
    ),
    "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks",
    "2110.03141",
    2022,
    ICLR,
)


@dataclass(frozen=True)
class Stochastic(Modifier):
    """Climb with a random share of the weights at each step (ESAM's SWP): e = m * e(rule) / beta, P(m_i = 1) = beta.

    So e is the rule's on average, and longer than rho. The draw depends on the seed and the step alone, as
    :class:`~steppe.Bernoulli`'s.

    The authors' code draws whole tensors, and what makes it cheaper, leaves them out of the next first pass, and so of
    the norm; ``whole=True`` draws so and has the rule see the chosen tensors only, but both passes are whole. ESAM's
    other half, the selection of samples, is a matter of the closure.

    >>> import steppe
    >>> w, g = torch.zeros(6), torch.ones(6)
    >>> rule = Stochastic(steppe.LInf(), beta=0.5)
    >>> direction, scale = rule(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
    >>> scale * direction[0]
    tensor([0., 0., 0., 2., 0., 2.])

    Source: Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv
    2110.03141, and its official code.
    """

    paper: ClassVar[Paper] = ESAM_PAPER

    rule: Perturbation
    """The perturbation to thin out."""
    beta: float = 0.6
    """beta, the probability of each weight to climb; the authors' examples have 0.5 and 0.6."""
    seed: int = 0
    """What makes the draws of two runs differ."""
    whole: bool = False
    """Whether a tensor climbs as a whole or not at all."""

    def __post_init__(self) -> None:
        check_single_ascent_step(self.rule, "Stochastic")
        if not 0 < self.beta <= 1:
            raise ValueError(
                f"beta must be more than 0 and at most 1, got {self.beta}: it is each weight's probability to climb"
            )

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's climb, thinned out."""
        if self.whole:
            chances = [
                random_tensors.key("Stochastic", self.seed, point.step, i) / 2**64 for i in range(len(point.parameters))
            ]
            chosen = [i for i, chance in enumerate(chances) if chance < self.beta]
            climb = restricted(self.rule, point, chosen)
        else:
            chance = random_tensors.uniform("Stochastic", self.seed, point.step, point.weights)
            climb = masked(self.rule(point), [c < self.beta for c in chance])
        return ScaledDirection(climb.direction, climb.scale / self.beta)


@cites(ESAM_PAPER)
def selected(optimizer: SAM, losses: Loss, batch: Sequence[Tensor], *, gamma: float = 0.5) -> Callable[[], Tensor]:
    """Go down with the samples whose loss rises most from w to w + e (ESAM's sharpness-sensitive data selection).

    B+ = the ceil(gamma |B|) samples with the largest l(w + e) - l(w). At w + e all samples are evaluated forward
    only, and B+ forward and backward: with a forward as a third of a pass, a step costs 4/3 + gamma passes. With
    SGD's mean loss over B+, the gradient is no estimate of the batch's any more; that is the method.

    The paper's other half, a climb with a random part of the weights, is a perturbation: ``variants.esam`` has both.

    Args:
        optimizer: a :class:`steppe.SAM` that makes two passes a step.
        losses: takes the tensors of a batch, and returns the loss of each sample, of shape (n,).
        batch: tensors with the samples along their first dimension.
        gamma: gamma, the share of the samples that go down; the paper's value.

    Returns:
        The closure for ``optimizer.step``, which gives back the mean loss of the batch at w.

    Raises:
        ValueError: a gamma out of range, a batch without samples or of unequal lengths, losses that are not one a
            sample.

    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    >>> x = torch.tensor([1.0, 5.0, 2.0, -3.0])
    >>> def losses(x):
    ...     print(x.tolist())
    ...     return w * x
    >>> _ = optimizer.step(selected(optimizer, losses, (x,), gamma=0.5))
    [1.0, 5.0, 2.0, -3.0]
    [1.0, 5.0, 2.0, -3.0]
    [5.0, 2.0]

    Source: Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv
    2110.03141.
    """
    samples = count_samples(batch)
    kept = math.ceil(check_share("gamma", gamma) * samples)
    at_w: list[Tensor] = []

    def evaluate(part: Sequence[Tensor], n: int) -> Tensor:
        values = losses(*part)
        if values.shape != (n,):
            raise ValueError(
                f"losses returned a tensor of shape {tuple(values.shape)} for {n} samples, and the selection needs "
                f'the loss of each: return shape ({n},), for example with reduction="none"'
            )
        return values

    def closure() -> Tensor:
        optimizer.zero_grad()
        if optimizer.current_pass is None or not optimizer.current_pass.is_perturbed:
            values = evaluate(batch, samples)
            at_w[:] = [values.detach()]
        elif not at_w:
            raise RuntimeError(
                f"the step's only pass is at w + e, with {optimizer.perturbation}: there are no losses at w to "
                "compare with. Take a perturbation that makes a pass at w"
            )
        else:
            with torch.no_grad():
                rise = evaluate(batch, samples) - at_w[0]
            chosen = rise.topk(kept).indices
            values = evaluate([t[chosen.to(t.device)] for t in batch], kept)
        value = values.mean()
        backward(optimizer, value)
        return value

    return closure


def esam(
    base_optimizer: Optimizer, rho: Rho = 0.05, *, beta: float = 0.6, seed: int = 0, **options: Unpack[Options]
) -> SAM:
    """ESAM: climb with a random share beta of the weights, go down with selected samples. 4/3 + gamma passes a step.

    This is the climb, which costs two passes as any other. What saves is the selection of samples, which is a matter
    of the closure: give ``step()`` the one that :func:`steppe.closures.selected` makes, with its ``gamma``.

    Source: Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv
    2110.03141.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Stochastic(L2(), beta, seed))


class Sharpest(StepFunction):
    """Go down with the samples whose loss the climb raised most (ESAM)."""

    optimizer: SAM

    def __init__(self, optimizer: SAM, gamma: float = 0.5) -> None:
        super().__init__(optimizer)
        self.gamma = gamma

    def step(self, forward: Forward, batch: Batch) -> Tensor:
        """Take one step."""
        closure = selected(self.optimizer, forward.losses, batch.tensors, gamma=self.gamma)
        loss: Tensor = self.optimizer.step(closure)
        return loss


def _made(base: Optimizer, model: nn.Module, **given: Any) -> tuple[Any, ...]:
    return sam(base, model=model, **given), esam


CARD = MethodCard(
    name="esam",
    function=esam,
    label="ESAM",
    about="Fewer samples in the second backward make it cheaper than SAM.",
    equation="e = m * rho g / |g| / beta,   P(m_i = 1) = beta\n"
    "B+ = the ceil(gamma |B|) samples of the batch B with the largest l(w + e) - l(w)\n"
    "w <- Base(w, gradient at w + e of the mean loss over B+)",
    cost="4/3 + gamma",
    passes=lambda gamma: 4 / 3 + gamma,
    memory=COPY,
    when="To save a part of SAM's second pass, where the loss of each sample is at hand.",
    when_not="With one pass at w + e only (`msam`, `rwp`): there are no losses at w to compare with.",
    usual={"rho": "0.05 to 0.2", "beta": "0.5 to 0.6", "gamma": "0.5"},
    checked="The official code, https://github.com/dydjw9/Efficient_SAM, was read: as here, a forward without "
    "gradients over all samples at w + e, then forward and backward on the selected. It draws whole tensors, and "
    "leaves them out of the next first pass; here each weight is drawn, and both passes are whole "
    "(`steppe.Stochastic(..., whole=True)` draws tensors).",
    caveats=(
        "The gradient that goes down is no estimate of the batch's any more; that is the method.",
        "e is SAM's on average, and longer than rho.",
        "With a plain closure it selects no samples, and costs 2.",
    ),
    make=_made,
    arguments_of=(esam, selected),
    use="optimizer = steppe.variants.esam(base, model=model)\n"
    "optimizer.step(steppe.closures.selected(optimizer, losses, (x, y), gamma=0.5))  # losses: one a sample",
    comparison=Comparison(
        summary="climbs with some weights, goes down with the samples that it raised most, at SAM's rho",
        step_function=Sharpest,
    ),
)
