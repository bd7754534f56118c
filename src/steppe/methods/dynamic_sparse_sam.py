"""SSAM-D: perturb with a mask in dynamic sparse training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe._tensors import random as random_tensors
from steppe.methods._card import COPY, LENGTH, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.methods.sparse_sam import SSAM_PAPER
from steppe.papers import Paper
from steppe.rules import Perturbation, Point, ScaledDirection
from steppe.rules.l2 import L2
from steppe.rules.masks import check_sparse, is_due, largest, masked, masks_of, num_kept, remember
from steppe.rules.subsets import Modifier
from steppe.sam import SAM


@dataclass(frozen=True)
class DynamicSparse(Modifier):
    """Climb with a mask in dynamic training (SSAM-D): drop the flattest of its coordinates, grow as many at random.

    e = m * e(rule), with m random at first. At the climbs of the steps ``every``, 2 ``every``, ..., a share
    drop (1 + cos(pi t / steps)) / 2 of its coordinates, those of the smallest |g|, is exchanged for random ones of the
    others; m always has the same number of coordinates. As in the authors' code, the rule is masked after its
    normalization: rho is its radius before the masking. A bool a coordinate is kept; the draws depend on the seed and
    the step alone.

    The authors' code climbs with the new mask from the next step on, and here this one does already.

    >>> import steppe
    >>> w, g, memory = torch.zeros(6), torch.arange(1.0, 7.0), {}
    >>> rule = DynamicSparse(steppe.L2(), steps=100, every=1, drop=0.4)
    >>> for step in range(3):
    ...     rule(Point([w], [g], rho=[0.05], base_state=[{}], step=step, memory=memory)).direction
    [tensor([1., 0., 0., 4., 5., 0.])]
    [tensor([0., 0., 3., 4., 5., 0.])]
    [tensor([1., 0., 0., 4., 5., 0.])]

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177,
    and its official code.
    """

    paper: ClassVar[Paper] = SSAM_PAPER

    rule: Perturbation
    """The perturbation to mask."""
    steps: int
    """How many steps the training has: at its end, no more coordinates are exchanged."""
    sparsity: float = 0.5
    """The share of the coordinates that stay; the authors' examples have 0.5."""
    drop: float = 0.5
    """The share of the mask that is exchanged at first; the authors' value."""
    every: int = 100
    """After how many steps coordinates are exchanged."""
    seed: int = 0
    """What makes the draws of two runs differ."""

    def __post_init__(self) -> None:
        check_sparse(self.rule, self.sparsity, self.every, type(self).__name__)
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be between 0 and 1, got {self.drop}: it is a share of the mask")
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}: it is the length of the training in steps")

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's climb, masked."""
        memory = point.memory_of(self)
        if any("mask" not in own for own in memory):
            scores = random_tensors.uniform("DynamicSparse", self.seed, point.step, point.gradients)
            remember(point, memory, largest(scores, num_kept(scores, self.sparsity)))
        elif is_due(point, self.every):
            remember(point, memory, self._exchanged(point, masks_of(memory)))
        return masked(self.rule(point), masks_of(memory))

    def _exchanged(self, point: Point, masks: Sequence[Tensor]) -> list[Tensor]:
        kept = num_kept(masks, self.sparsity)
        share = self.drop * (1 + math.cos(math.pi * min(point.step / self.steps, 1))) / 2
        number = int(min(share * kept, sum(m.numel() for m in masks) - kept))
        chance = random_tensors.uniform("DynamicSparse", self.seed, point.step, point.gradients)
        flatness = [torch.where(m, g.abs(), -1.0) for m, g in zip(masks, point.gradients, strict=True)]
        stay = largest(flatness, kept - number)
        come = largest([torch.where(m, -1.0, c) for m, c in zip(masks, chance, strict=True)], number)
        return [s | c for s, c in zip(stay, come, strict=True)]


def dynamic_sparse_sam(
    base_optimizer: Optimizer,
    rho: Rho = 0.1,
    *,
    steps: int,
    sparsity: float = 0.5,
    drop: float = 0.5,
    every: int = 100,
    seed: int = 0,
    **options: Unpack[Options],
) -> SAM:
    """SSAM-D: climb with a mask that drops its flattest coordinates and grows random ones. Two passes a step.

    ``steps`` is the length of the training, over which the exchange dies away.

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177.
    """
    rule = DynamicSparse(L2(), steps, sparsity, drop, every, seed)
    return SAM(base_optimizer, rho, **options, perturbation=rule)


CARD = MethodCard(
    name="dynamic_sparse_sam",
    function=dynamic_sparse_sam,
    label="SSAM-D",
    about="The exchange dies away over the training.",
    equation="e = m * rho g / |g|,   m random at first; then every so many steps a share\n"
    "drop (1 + cos(pi t / steps)) / 2 of m, where g is smallest, changes to random coordinates",
    cost="2",
    passes=2,
    memory=f"{COPY}; a bool a coordinate",
    when="To perturb fewer weights than SAM does, without a ranking of all coordinates at the start.",
    when_not="To save time: the passes are whole, and only the climb is sparse.",
    usual={
        "rho": "0.1 on CIFAR-10",
        "steps": LENGTH,
        "sparsity": "0.5",
        "drop": "0.5, by cosine",
        "every": "unverified",
    },
    checked="The official code, https://github.com/Mi-Peng/Sparse-Sharpness-Aware-Minimization, was read. It "
    "climbs with a new mask from the next step on; here this step does already.",
    caveats=("rho is the radius before the masking: the length of e is less.",),
    required={"steps": 10_000},
    comparison=Comparison(
        summary=f"climbs with a mask that changes over the planned steps, at 2 x rho ({USUAL_RATIO})", rho_factor=2.0
    ),
)
