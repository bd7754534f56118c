"""SSAM-F: perturb where the Fisher information is largest."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch.optim import Optimizer

from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import NEURIPS, Paper
from steppe.rules import Perturbation, Point, ScaledDirection
from steppe.rules.l2 import L2
from steppe.rules.masks import check_sparse, is_due, largest, masked, masks_of, num_kept, remember
from steppe.rules.ops import foreach
from steppe.rules.subsets import Modifier
from steppe.sam import SAM

SSAM_PAPER = Paper(
    "mi2022ssam",
    ("Peng Mi", "Li Shen", "Tianhe Ren", "Yiyi Zhou", "Xiaoshuai Sun", "Rongrong Ji", "Dacheng Tao"),
    "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach",
    "2210.05177",
    2022,
    NEURIPS,
)


@dataclass(frozen=True)
class Sparse(Modifier):
    """Climb where the Fisher information is largest (SSAM-F): e = m * e(rule), m for the top 1 - sparsity of g^2.

    m is chosen over all parameters together, at the first climb and at those of the steps ``every``, 2 ``every``, ...;
    with a cadence, let ``every`` be a multiple of its interval. As in the authors' code, the rule is masked after its
    normalization: rho is its radius before the masking. A bool a coordinate is kept.

    The authors' code sums the squared gradients of single samples (16 to 1024 of them), once an epoch or every five
    epochs, and climbs with no coordinate before its first mask; a rule sees the batch's gradient only, so here it is
    the square of that.

    >>> import steppe
    >>> w, g = torch.zeros(4), torch.tensor([3.0, -4.0, 1.0, 0.0])
    >>> Sparse(steppe.L2(), sparsity=0.5)(Point([w], [g], rho=[0.05], base_state=[{}], step=0)).direction
    [tensor([ 3., -4.,  0.,  0.])]

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177,
    and its official code.
    """

    paper: ClassVar[Paper] = SSAM_PAPER

    rule: Perturbation
    """The perturbation to mask."""
    sparsity: float = 0.5
    """The share of the coordinates that stay; the authors' examples have 0.5."""
    every: int = 100
    """After how many steps the mask is chosen anew."""

    def __post_init__(self) -> None:
        check_sparse(self.rule, self.sparsity, self.every, type(self).__name__)

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's climb, masked."""
        memory = point.memory_of(self)
        if is_due(point, self.every) or any("mask" not in own for own in memory):
            scores = foreach(torch._foreach_abs, point.gradients)
            remember(point, memory, largest(scores, num_kept(scores, self.sparsity)))
        return masked(self.rule(point), masks_of(memory))


def sparse_sam(
    base_optimizer: Optimizer,
    rho: Rho = 0.1,
    *,
    sparsity: float = 0.5,
    every: int = 100,
    **options: Unpack[Options],
) -> SAM:
    """SSAM-F: climb only where the Fisher information is largest. Two passes a step.

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Sparse(L2(), sparsity, every))


CARD = MethodCard(
    name="sparse_sam",
    function=sparse_sam,
    label="SSAM-F",
    about="A mask of the largest squared gradients is chosen anew from time to time.",
    equation="e = m * rho g / |g|,   m = 1 for the top (1 - sparsity) of g^2, over all parameters",
    cost="2",
    passes=2,
    memory=f"{COPY}; a bool a coordinate",
    when="To perturb fewer weights than SAM does.",
    when_not="To save time: the passes are whole, and only the climb is sparse.",
    usual={
        "rho": "0.1 on CIFAR-10",
        "sparsity": "0.5",
        "every": "once an epoch, or every five epochs, in the official code",
    },
    checked="The official code, https://github.com/Mi-Peng/Sparse-Sharpness-Aware-Minimization, was read: it masks "
    "after normalizing, as here. Its scores are summed squared gradients of single samples (16 to 128 in the "
    "examples), and before its first mask it does not climb; here they are the squared gradient of the batch.",
    caveats=(
        "rho is the radius before the masking: the length of e is less.",
        "With a cadence, let `every` be a multiple of its interval.",
    ),
    comparison=Comparison(
        summary=f"climbs where the Fisher information is largest, at 2 x rho ({USUAL_RATIO})", rho_factor=2.0
    ),
)
