"""LE-SAM: a fixed budget of loss instead of a fixed radius."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_positive
from steppe.methods._card import COPY, FIRST_GUESS, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import ICML, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import norm, reciprocal
from steppe.sam import SAM

LE_SAM_PAPER = Paper(
    "wang2026lesam",
    ("Jinping Wang", "Qinhan Liu", "Zhiwu Xie", "Zhiqiang Gao"),
    "Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of Sharpness-Aware Minimization",
    "2605.10183",
    2026,
    ICML,
)


@dataclass(frozen=True)
class LossBudget:
    """Perturb until the loss has risen by rho, to first order (LE-SAM): e = min(rho / |g|, rho_max) g / |g|.

    rho is the paper's sigma, a difference of losses and not a length: e.g = rho, unless the length of e would be above
    rho_max. If groups have their own rho, e = rho g / |g|^2 in each, and all of e is shortened to the length rho_max. A
    zero gradient gives e = 0.

    Example:
        >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
        >>> for rho_max in (1.0, 0.05):
        ...     direction, scale = LossBudget(rho_max)(Point([w], [g], rho=[0.5], base_state=[{}], step=0))
        ...     print(0.5 * scale * direction[0])  # of length 0.5 / 5, then of length 0.05
        tensor([0.0600, 0.0800])
        tensor([0.0300, 0.0400])

    References:
        Wang et al., Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of Sharpness-Aware
        Minimization, arXiv 2605.10183.
    """

    paper: ClassVar[Paper] = LE_SAM_PAPER

    rho_max: float = 0.3
    """rho_max, the largest length of e."""

    def __post_init__(self) -> None:
        check_positive("rho_max", self.rho_max, "the largest length of e")

    def __call__(self, point: Point) -> ScaledDirection:
        inverse = reciprocal(point.gradient_norm)
        # |rho g| / |g|, which is rho itself if all groups have the same
        rho = _weighted_norm(point) * inverse
        return ScaledDirection(point.gradients, torch.minimum(inverse, self.rho_max * reciprocal(rho)) * inverse)


def _weighted_norm(point: Point) -> Tensor:
    """Return |rho g| over all parameters together."""
    gradients: dict[object, list[Tensor]] = {}
    radius: dict[object, float | Tensor] = {}
    for rho, g in zip(point.rho, point.gradients, strict=True):
        key = id(rho) if isinstance(rho, Tensor) else rho  # a tensor is not read
        gradients.setdefault(key, []).append(g)
        radius[key] = rho
    if len(gradients) == 1:
        return point.gradient_norm * next(iter(radius.values()))
    like = point.gradient_norm
    total: Tensor = torch.stack([(norm(g) * radius[key]).to(like) for key, g in gradients.items()]).norm()
    return total


def le_sam(base_optimizer: Base, rho: Rho = 0.35, *, rho_max: float = 0.3, **options: Unpack[Options]) -> SAM:
    """LE-SAM: SAM with a fixed rise of the loss instead of a fixed radius. Two passes per step.

    e = min(rho / |g|, rho_max) g / |g|.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the paper's sigma: the rise of the loss from w to w + e, to first order; 0.35 in the official code.
            The official code anneals it to 0 in the last fifth of the training, as :mod:`steppe.rho_schedule` can.
        rho_max: rho_max, the largest length of e; 0.3 in the official code, whose README has no limit (999).
        **options: ``model`` and the other options of :class:`steppe.SAM`; with a loss scaler, ``scaler`` is required.

    Raises:
        ValueError: rho_max is not positive.

    Example:
        >>> le_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        LossBudget(rho_max=0.3)

    References:
        Wang et al., Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of Sharpness-Aware
        Minimization, arXiv 2605.10183.
    """
    return SAM(base_optimizer, rho, **options, perturbation=LossBudget(rho_max))


CARD = MethodCard(
    name="le_sam",
    function=le_sam,
    label="LE-SAM",
    paper=LE_SAM_PAPER,
    summary="Perturb along the gradient until the loss has risen by a fixed budget, to first order. Where the gradient "
    "is small, the perturbation is longer, up to rho_max.",
    equation="e = min(rho / |g|, rho_max) g / |g|          rho = the paper's sigma, a rise of the loss",
    cost="2",
    passes=2,
    memory=COPY,
    when="To perturb in units of the loss: the first-order rise is the same at every step.",
    when_not="With a loss that is no mean over the batch, or that is scaled: rho has the unit of the loss.",
    usual={
        "rho": "0.35, the paper's sigma (official code): rising in 10 epochs, by a cosine to 0 in the last 40 of 200",
        "rho_max": "0.3 (default of the official training), 999 (its README)",
    },
    verified="official code, same steps",
    checked="https://github.com/smithgun2005/LE-SAM-ICML2026: 20 steps agree to 1e-11. It adds 1e-12 to the norm and "
    "to its square. Its options for a part of the samples (`lesam_topk`) and for g_s - alpha g (`lesam_alpha`) are "
    "off by default, and are not offered here. Of the paper, only the abstract was read.",
    caveats=(
        "In a loop with a loss scaler, give `scaler=`: the length of e depends on |g|.",
        "With `passes(accumulate=True)`, give the share of each micro-batch, `loss_weight=`.",
        "rho is no radius here: near a minimum the length of e is rho_max, whatever rho is.",
    ),
    comparison=Comparison(
        summary=f"perturbs until the loss has risen by 3.5 x rho ({FIRST_GUESS})", rho_factor=3.5, capturable=True
    ),
)
