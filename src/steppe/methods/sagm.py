"""SAGM: match the gradient at w with the perturbed one."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

from steppe._checks import check_nonnegative
from steppe.methods._card import COPY_AND_G, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import CVPR, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.mixed_gradient import MixedGradient
from steppe.rules.ops import reciprocal
from steppe.sam import SAM

SAGM_PAPER = Paper(
    "wang2023sagm",
    ("Pengfei Wang", "Zhaoxiang Zhang", "Zhen Lei", "Lei Zhang"),
    "Sharpness-Aware Gradient Matching for Domain Generalization",
    "2303.10353",
    2023,
    CVPR,
)


@dataclass(frozen=True)
class GradientMatching:
    """Perturb along the gradient, and step back along it (SAGM): e = rho (1 / |g| - alpha) g.

    The step back, -rho alpha g, is one of gradient descent: to minimize the loss at w + e, the gradients at w and at
    w + e then have to be aligned. alpha is the paper's alpha / rho, so that e vanishes with rho. A zero gradient gives
    e = 0.

    Example:
        >>> import torch
        >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
        >>> direction, scale = GradientMatching(alpha=0.1)(Point([w], [g], rho=[0.1], base_state=[{}], step=0))
        >>> 0.1 * scale * direction[0]  # a half of SAM's
        tensor([0.0300, 0.0400])

    References:
        Wang et al., Sharpness-Aware Gradient Matching for Domain Generalization, arXiv 2303.10353.
    """

    paper: ClassVar[Paper] = SAGM_PAPER

    alpha: float = 0.02
    """alpha, the length of the step back in units of rho |g|; 0.001 / 0.05 in the authors' example. 0 is SAM's e."""

    def __post_init__(self) -> None:
        check_nonnegative("alpha", self.alpha, "the length of the step back along g in units of rho |g|")

    def __call__(self, point: Point) -> ScaledDirection:
        return ScaledDirection(point.gradients, reciprocal(point.gradient_norm) - self.alpha)


def sagm(base_optimizer: Base, rho: Rho = 0.05, *, alpha: float = 0.02, **options: Unpack[Options]) -> SAM:
    """SAGM: match the gradient at w with the perturbed one. Two passes per step.

    w <- Base(w, (g + g_s) / 2), with e = rho (1 / |g| - alpha) g.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; 0.05 in the official code.
        alpha: alpha, the paper's alpha / rho; 0.001 / 0.05 in the official code's example.
        **options: ``model`` and the other options of :class:`steppe.SAM`; with a loss scaler, ``scaler`` is required.

    Raises:
        ValueError: alpha is negative or not finite.

    Example:
        >>> import torch
        >>> sagm(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        GradientMatching(alpha=0.02)

    References:
        Wang et al., Sharpness-Aware Gradient Matching for Domain Generalization, arXiv 2303.10353.
    """
    return SAM(base_optimizer, rho, **options, perturbation=GradientMatching(alpha), combination=MixedGradient(0.5))


CARD = MethodCard(
    name="sagm",
    function=sagm,
    label="SAGM",
    paper=SAGM_PAPER,
    summary="Update with the mean of the gradient at w and the perturbed one, whose perturbation is shortened by a "
    "step of gradient descent. This aligns the two gradients, so that both losses and the gap between them decrease.",
    equation="e = rho (1 / |g| - alpha) g\nw <- Base(w, (g + g_s) / 2)",
    cost="2",
    passes=2,
    memory=COPY_AND_G,
    when="For domain generalization, the paper's task: training data of several domains, tests on another one.",
    when_not="When there is no memory for one more gradient.",
    usual={
        "rho": "0.05 (official code)",
        "alpha": "0.001 / 0.05 = 0.02 (official code): the paper's alpha is rho alpha here",
    },
    verified="official code, same steps",
    checked="https://github.com/Wang-pengfei/SAGM: 20 steps agree to 1e-11. It adds 1e-12 to the norm, and with "
    "several workers each has a perturbation of its own (`per_rank=True`). The body of the paper was not read.",
    caveats=(
        "In a loop with a loss scaler, give `scaler=`: the length of e depends on |g|.",
        "Where |g| is above 1 / alpha, e points down the gradient.",
        "At a step without perturbation, the update gradient is g.",
    ),
    comparison=Comparison(
        summary="mean of g and g_s, whose perturbation is shortened in proportion to |g|, at SAM's rho", capturable=True
    ),
)
