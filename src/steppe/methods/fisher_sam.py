"""Fisher SAM: perturb in the metric of the Fisher information."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch

from steppe._checks import check_nonnegative
from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import ICML, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import dot, foreach, reciprocal, widen
from steppe.sam import SAM

FISHER_SAM_PAPER = Paper(
    "kim2022fisher",
    ("Minyoung Kim", "Da Li", "Shell Xu Hu", "Timothy M. Hospedales"),
    "{Fisher SAM}: Information Geometry and Sharpness Aware Minimization",
    "2206.04920",
    2022,
    ICML,
)


@dataclass(frozen=True)
class Fisher:
    """Perturb in the metric of the Fisher information (Fisher SAM): e = rho F^-1 g / sqrt(g' F^-1 g), F = 1 + eta f.

    f = g^2, entry by entry, is the diagonal of the empirical Fisher information of one batch: it needs no further pass
    and no memory. A coordinate whose gradient is large compared to 1 / sqrt(eta) is perturbed less; |e| <= rho, and
    eta = 0 is SAM. eta depends on the scale of the loss: the mean over the batch, not a loss scaler's multiple of it.
    A zero gradient gives e = 0.

    No code by the authors was found, and only the paper's abstract could be read. Three independent implementations
    agree on g^2 and on 1 / (1 + eta f), but not on the normalization: one has it as here, one in each tensor, and one
    makes |e| = rho.

    Example:
        >>> w, g = torch.zeros(2), torch.tensor([1.0, 3.0])
        >>> direction, scale = Fisher(eta=1.0)(Point([w], [g], rho=[0.1], base_state=[{}], step=0))
        >>> direction[0]
        tensor([0.5000, 0.3000])

    References:
        Kim et al., Fisher SAM: Information Geometry and Sharpness Aware Minimization, arXiv 2206.04920.
    """

    paper: ClassVar[Paper] = FISHER_SAM_PAPER

    eta: float = 1.0
    """eta, the weight of the Fisher information against the Euclidean metric; 1 in the three implementations."""

    def __post_init__(self) -> None:
        check_nonnegative("eta", self.eta, "the weight of the Fisher information in 1 + eta f")

    def __call__(self, point: Point) -> ScaledDirection:
        g = [widen(part) for part in point.gradients]  # in float16 the squares of gradients from 256 on are infinite
        F = foreach(torch._foreach_mul, g, g)
        foreach(torch._foreach_mul_, F, scalar=self.eta)
        foreach(torch._foreach_add_, F, scalar=1.0)
        d = foreach(torch._foreach_div, g, F)
        direction = [part.to(like.dtype) for part, like in zip(d, point.gradients, strict=True)]
        return ScaledDirection(direction, reciprocal(dot(g, d).sqrt()))


def fisher_sam(base_optimizer: Base, rho: Rho = 0.1, *, eta: float = 1.0, **options: Unpack[Options]) -> SAM:
    """Fisher SAM: SAM in the metric of the Fisher information's diagonal. Two passes per step.

    e = rho F^-1 g / sqrt(g' F^-1 g),   F = diag(1 + eta g^2).

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius in the Fisher metric; the paper's values are unverified.
        eta: eta, the weight of the Fisher information; 1 in three third-party implementations, and 0 is SAM.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: eta is negative or not finite.

    Example:
        >>> fisher_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        Fisher(eta=1.0)

    References:
        Kim et al., Fisher SAM: Information Geometry and Sharpness Aware Minimization, arXiv 2206.04920.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Fisher(eta))


CARD = MethodCard(
    name="fisher_sam",
    function=fisher_sam,
    label="Fisher SAM",
    paper=FISHER_SAM_PAPER,
    summary="Perturb in the metric of the Fisher information's diagonal, 1 + eta g^2. Coordinates with a large "
    "gradient are perturbed less than in SAM.",
    equation="e = rho F^-1 g / sqrt(g' F^-1 g),   F = diag(1 + eta g^2)",
    cost="2",
    passes=2,
    memory=COPY,
    when="To measure the radius in the metric of the Fisher information; the formula is unverified.",
    when_not="With a loss scaler, or a loss that is not a mean over the batch: eta depends on the scale of the loss.",
    usual={"rho": "unverified", "eta": "1 in three third-party implementations; the paper's is unknown"},
    verified="other code, read",
    checked="No code by the authors was found, and only the paper's abstract was read: its eta, rho and estimate of F "
    "are unverified. Three third-party implementations agree on g^2 and 1 / (1 + eta g^2), but not on the "
    "normalization: one has it over all parameters, as here, one in each tensor, and one makes the length of e rho.",
    caveats=(
        "g^2 of one batch's gradient is used as the Fisher information: one batch, no average.",
        "With `passes(accumulate=True)`, give the share of each micro-batch, `loss_weight=`.",
    ),
    comparison=Comparison(
        summary=f"perturbs in the Fisher metric, at 2 x rho ({USUAL_RATIO})", rho_factor=2.0, capturable=True
    ),
)
