"""SSAM-D: perturb with a mask as in dynamic sparse training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_count, check_seed, check_unit_interval
from steppe.methods._card import COPY, TOTAL_STEPS, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.methods.sparse_sam import SSAM_PAPER
from steppe.papers import Paper
from steppe.rules import Modifier, Perturbation, Point, ScaledDirection
from steppe.rules.l2 import L2
from steppe.rules.masks import apply_masks, check_sparse, is_due, num_kept, store_masks, stored_masks, top_masks
from steppe.rules.ops import uniform
from steppe.sam import SAM


@dataclass(frozen=True)
class DynamicSparse(Modifier):
    """Perturb with a mask that drops its flattest coordinates and grows random ones (SSAM-D): e = m * e(rule).

    m is random at first. When the steps ``interval``, 2 ``interval``, ... are perturbed, the share
    drop (1 + cos(pi t / total_steps)) / 2 of its coordinates, those of the smallest |g|, is exchanged for random other
    ones; m always has the same number of coordinates. As in the authors' code, the rule is masked after its
    normalization: rho is its radius before masking. The memory is one bool per coordinate. The draws depend on the
    seed and the step only.

    The authors' code uses a new mask from the next step on; here the same step already uses it. Theirs also exchanges
    after step 0; here the first exchange is at step ``interval``.

    Example:
        >>> import steppe
        >>> w, g, memory = torch.zeros(6), torch.arange(1.0, 7.0), {}
        >>> rule = DynamicSparse(steppe.L2(), total_steps=100, interval=1, drop=0.4)
        >>> for step in range(3):
        ...     rule(Point([w], [g], rho=[0.05], base_state=[{}], step=step, memory=memory)).direction
        [tensor([1., 0., 0., 4., 5., 0.])]
        [tensor([0., 0., 3., 4., 5., 0.])]
        [tensor([1., 0., 0., 4., 5., 0.])]

    References:
        Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177,
        and its official code.
    """

    paper: ClassVar[Paper] = SSAM_PAPER

    rule: Perturbation
    """The perturbation to mask."""
    total_steps: int
    """The number of optimizer steps in the training; at its end, no more coordinates are exchanged."""
    sparsity: float = 0.5
    """The share of coordinates that are not perturbed; the authors' examples have 0.5."""
    drop: float = 0.5
    """The share of the mask that is exchanged at first; the authors' value."""
    interval: int = 100
    """The number of steps from one exchange to the next."""
    seed: int = 0
    """The seed of the draws."""

    def __post_init__(self) -> None:
        check_sparse(self.rule, self.sparsity, self.interval, type(self).__name__)
        check_unit_interval("drop", self.drop, "the share of the mask that is exchanged at first")
        check_count("total_steps", self.total_steps, TOTAL_STEPS)
        check_seed(self.seed)

    @property
    def averages_memory(self) -> bool:
        """False: the mean of masks is no mask."""
        return False

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's perturbation, masked."""
        memory = point.memory_of(self)
        if any("mask" not in own for own in memory):
            scores = uniform("DynamicSparse", self.seed, point.step, point.gradients)
            store_masks(point, memory, top_masks(scores, num_kept(scores, self.sparsity)))
        elif is_due(point, self.interval):
            store_masks(point, memory, self._exchanged(point, stored_masks(memory)))
        return apply_masks(self.rule(point), stored_masks(memory))

    def _exchanged(self, point: Point, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return masks without the flattest coordinates, and with as many random new ones."""
        kept = num_kept(masks, self.sparsity)
        share = self.drop * (1 + math.cos(math.pi * min(point.step / self.total_steps, 1))) / 2
        number = int(min(share * kept, sum(m.numel() for m in masks) - kept))
        chance = uniform("DynamicSparse", self.seed, point.step, point.gradients)
        steepness = [torch.where(m, g.abs(), -1.0) for m, g in zip(masks, point.gradients, strict=True)]
        remaining = top_masks(steepness, kept - number)
        grown = top_masks([torch.where(m, -1.0, c) for m, c in zip(masks, chance, strict=True)], number)
        return [r | g for r, g in zip(remaining, grown, strict=True)]


def dynamic_sparse_sam(
    base_optimizer: Base,
    rho: Rho = 0.1,
    *,
    total_steps: int,
    sparsity: float = 0.5,
    drop: float = 0.5,
    interval: int = 100,
    seed: int = 0,
    **options: Unpack[Options],
) -> SAM:
    """SSAM-D: SAM with a mask that drops its flattest coordinates and grows random ones. Two passes per step.

    e = m * rho g / |g|; every ``interval`` steps, drop (1 + cos(pi t / total_steps)) / 2 of m is exchanged.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius before masking; 0.1 on CIFAR-10.
        total_steps: The number of optimizer steps in the training, over which the exchange decreases to nothing.
        sparsity: The share of coordinates that are not perturbed; usually 0.5.
        drop: The share of the mask that is exchanged at first; usually 0.5.
        interval: The number of steps from one exchange to the next.
        seed: The seed of the draws.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> dynamic_sparse_sam(base, total_steps=1000).perturbation.sparsity
        0.5

    References:
        Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177.
    """
    rule = DynamicSparse(L2(), total_steps, sparsity, drop, interval, seed)
    return SAM(base_optimizer, rho, **options, perturbation=rule)


CARD = MethodCard(
    name="dynamic_sparse_sam",
    function=dynamic_sparse_sam,
    label="SSAM-D",
    paper=SSAM_PAPER,
    summary="Perturb with a mask that drops its flattest coordinates and grows random ones. The exchange decreases to "
    "nothing over the training.",
    equation="e = m * rho g / |g|,   m random at first; then after each interval the share\n"
    "drop (1 + cos(pi t / total_steps)) / 2 of m, where |g| is smallest, changes to random coordinates",
    cost="2",
    passes=2,
    memory=f"{COPY}; one bool per coordinate",
    when="To perturb fewer weights than SAM does, without a ranking of all coordinates at the start.",
    when_not="To save time: only the perturbation is sparse, both passes are full.",
    usual={
        "rho": "0.1 on CIFAR-10",
        "total_steps": TOTAL_STEPS,
        "sparsity": "0.5",
        "drop": "0.5, by cosine",
        "interval": "5 epochs in the official code",
    },
    verified="official code, read",
    checked="https://github.com/Mi-Peng/Sparse-Sharpness-Aware-Minimization uses a new mask from the next step on; "
    "here the same step already uses it, with the gradient that chose it. It also exchanges after step 0, where the "
    "random mask is still new; here the first exchange is at step `interval`. After 20 steps in float64, with an "
    "exchange at every fifth, both together make the weights differ by 1 %.",
    caveats=(
        "rho is the radius before masking: e is shorter.",
        "A perturbation for each micro-batch (`closures.micro_batches`) is an error: they would exchange one mask.",
    ),
    required={"total_steps": 10_000},
    short_run={"interval": 2},
    comparison=Comparison(
        summary=f"perturbs with a mask that changes over the planned steps, at 2 x rho ({USUAL_RATIO})",
        rho_factor=2.0,
    ),
)
