"""Fisher SAM: perturb in the metric of the Fisher information."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch.optim import Optimizer

from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import ICML, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import dot, foreach, reciprocal, to_wide
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
    """Climb in the metric of the Fisher information (Fisher SAM): e = rho F^-1 g / sqrt(g' F^-1 g), F = 1 + eta f.

    f = g^2, entry by entry, is the diagonal of the empirical Fisher information as one batch's gradient gives it: no
    further pass and no memory. A coordinate whose gradient is large beside 1 / sqrt(eta) climbs less; |e| <= rho, and
    eta = 0 is SAM. eta belongs to a scale of the loss: the mean over the batch, and not a loss scaler's multiple of it.
    A zero gradient gives e = 0.

    No code of the authors was found, and of the paper no more than the abstract could be read. Three independent
    implementations agree on g^2 and on 1 / (1 + eta f), but not on the normalization: one has it as here, one in each
    tensor by itself, and one makes |e| = rho.

    >>> w, g = torch.zeros(2), torch.tensor([1.0, 3.0])
    >>> direction, scale = Fisher(eta=1.0)(Point([w], [g], rho=[0.1], base_state=[{}], step=0))
    >>> direction[0]
    tensor([0.5000, 0.3000])

    Source: Kim et al., Fisher SAM: Information Geometry and Sharpness Aware Minimization, arXiv 2206.04920.
    """

    paper: ClassVar[Paper] = FISHER_SAM_PAPER

    eta: float = 1.0
    """eta, the weight of the Fisher information against the Euclidean metric; 1 in the three implementations."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta < float("inf"):
            raise ValueError(
                f"eta must be finite and not negative, got {self.eta}: it weighs the Fisher information in 1 + eta f"
            )

    def __call__(self, point: Point) -> ScaledDirection:
        g = [to_wide(part) for part in point.gradients]  # in float16 the squares of gradients from 256 on are infinite
        F = foreach(torch._foreach_mul, g, g)
        foreach(torch._foreach_mul_, F, scalar=self.eta)
        foreach(torch._foreach_add_, F, scalar=1.0)
        d = foreach(torch._foreach_div, g, F)
        direction = [part.to(like.dtype) for part, like in zip(d, point.gradients, strict=True)]
        return ScaledDirection(direction, reciprocal(dot(g, d).sqrt()))


def fisher_sam(base_optimizer: Optimizer, rho: Rho = 0.1, *, eta: float = 1.0, **options: Unpack[Options]) -> SAM:
    """Fisher SAM: climb in the metric of the Fisher information's diagonal, 1 + eta g^2. Two passes a step.

    Source: Kim et al., Fisher SAM: Information Geometry and Sharpness Aware Minimization, arXiv 2206.04920.
    """
    return SAM(base_optimizer, rho, **options, perturbation=Fisher(eta))


CARD = MethodCard(
    name="fisher_sam",
    function=fisher_sam,
    label="Fisher SAM",
    about="Coordinates with a large gradient climb less than in SAM.",
    equation="e = rho F^-1 g / sqrt(g' F^-1 g),   F = diag(1 + eta g^2)",
    cost="2",
    passes=2,
    memory=COPY,
    when="To measure the radius in the metric of the Fisher information; unverified.",
    when_not="With a loss scaler, or a loss that is not a mean over the batch: eta belongs to a scale of the loss.",
    usual={"rho": "unverified", "eta": "1 in three third-party implementations; the paper's unknown"},
    checked="No code of the authors was found, and only the paper's abstract was read: its eta, rho and estimate "
    "of F are unverified. Three third-party implementations agree on g^2 and 1 / (1 + eta g^2), but not on the "
    "normalization: one has it over all parameters, as here, one in each tensor, and one makes the length of e "
    "rho.",
    caveats=("g^2 of a batch's gradient stands for the Fisher information: one batch, no average.",),
    comparison=Comparison(
        summary=f"climbs in the Fisher metric, at 2 x rho ({USUAL_RATIO})", rho_factor=2.0, capturable=True
    ),
)
