"""SSAM-F: perturb where the Fisher information is largest."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch

from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import NEURIPS, Paper
from steppe.rules import Modifier, Perturbation, Point, ScaledDirection
from steppe.rules.l2 import L2
from steppe.rules.masks import apply_masks, check_sparse, is_due, num_kept, store_masks, stored_masks, top_masks
from steppe.rules.ops import foreach
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
    """Perturb where the Fisher information is largest (SSAM-F): e = m * e(rule), m for the top 1 - sparsity of g^2.

    m is chosen over all parameters together, at the first perturbed step and when the steps ``interval``,
    2 ``interval``, ... are perturbed; with a cadence, let ``interval`` be a multiple of its own. As in the authors'
    code, the rule is masked after its normalization: rho is its radius before masking. The memory is one bool per
    coordinate.

    The authors' code sums the squared gradients of single samples (16 to 1024 of them), once per epoch or every five
    epochs, and does not perturb before its first mask; a rule gets the batch's gradient only, so here its square is
    used.

    Example:
        >>> import steppe
        >>> w, g = torch.zeros(4), torch.tensor([3.0, -4.0, 1.0, 0.0])
        >>> Sparse(steppe.L2(), sparsity=0.5)(Point([w], [g], rho=[0.05], base_state=[{}], step=0)).direction
        [tensor([ 3., -4.,  0.,  0.])]

    References:
        Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177,
        and its official code.
    """

    paper: ClassVar[Paper] = SSAM_PAPER

    rule: Perturbation
    """The perturbation to mask."""
    sparsity: float = 0.5
    """The share of coordinates that are not perturbed; the authors' examples have 0.5."""
    interval: int = 100
    """The number of steps from one choice of the mask to the next."""

    def __post_init__(self) -> None:
        check_sparse(self.rule, self.sparsity, self.interval, type(self).__name__)

    @property
    def averages_memory(self) -> bool:
        """False: the mean of masks is no mask."""
        return False

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's perturbation, masked."""
        memory = point.memory_of(self)
        if is_due(point, self.interval) or any("mask" not in own for own in memory):
            scores = foreach(torch._foreach_abs, point.gradients)
            store_masks(point, memory, top_masks(scores, num_kept(scores, self.sparsity)))
        return apply_masks(self.rule(point), stored_masks(memory))


def sparse_sam(
    base_optimizer: Base,
    rho: Rho = 0.1,
    *,
    sparsity: float = 0.5,
    interval: int = 100,
    **options: Unpack[Options],
) -> SAM:
    """SSAM-F: SAM that perturbs only where the Fisher information is largest. Two passes per step.

    e = m * rho g / |g|, with m = 1 for the top 1 - sparsity of g^2 over all parameters.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius before masking; 0.1 on CIFAR-10.
        sparsity: The share of coordinates that are not perturbed; usually 0.5.
        interval: The number of steps from one choice of the mask to the next.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> sparse_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        Sparse(rule=L2(), sparsity=0.5, interval=100)

    References:
        Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, arXiv 2210.05177.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Sparse(L2(), sparsity, interval))


CARD = MethodCard(
    name="sparse_sam",
    function=sparse_sam,
    label="SSAM-F",
    paper=SSAM_PAPER,
    summary="Perturb only where the Fisher information is largest. The mask of the largest squared gradients is chosen "
    "again after each interval.",
    equation="e = m * rho g / |g|,   m = 1 for the top (1 - sparsity) of g^2, over all parameters",
    cost="2",
    passes=2,
    memory=f"{COPY}; one bool per coordinate",
    when="To perturb fewer weights than SAM does.",
    when_not="To save time: only the perturbation is sparse, both passes are full.",
    usual={
        "rho": "0.1 on CIFAR-10",
        "sparsity": "0.5",
        "interval": "once per epoch, or every five epochs, in the official code",
    },
    verified="official code, read",
    checked="https://github.com/Mi-Peng/Sparse-Sharpness-Aware-Minimization: it masks after normalizing, as here. Its "
    "scores are summed squared gradients of single samples (16 to 128 in the examples), and before its first mask it "
    "does not perturb; here they are the squared gradient of the batch.",
    caveats=(
        "rho is the radius before masking: e is shorter.",
        "With the cadence `Periodic`, choose `interval` as a multiple of the cadence's interval.",
        "A perturbation for each micro-batch (`closures.micro_batches`) is an error: they would exchange one mask.",
    ),
    short_run={"interval": 2},
    comparison=Comparison(
        summary=f"perturbs where the Fisher information is largest, at 2 x rho ({USUAL_RATIO})", rho_factor=2.0
    ),
)
