"""VaSSO: perturb along a running mean of the gradient."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch

from steppe._checks import check_positive_share
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import NEURIPS, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import foreach, norm, reciprocal, where_finite
from steppe.sam import SAM

VASSO_PAPER = Paper(
    "li2023vasso",
    ("Bingcong Li", "Georgios B. Giannakis"),
    "Enhancing Sharpness-Aware Optimization Through Variance Suppression",
    "2309.15639",
    2023,
    NEURIPS,
)


@dataclass(frozen=True)
class VarianceSuppressed:
    """Perturb along a running mean of the gradient (VaSSO): e = rho d / |d|, d <- (1 - theta) d + theta g.

    d starts from the first gradient, as in the authors' code, and is updated at perturbed steps only; d = 0 gives
    e = 0. The memory is one copy of the gradient.

    Example:
        >>> w, memory = torch.zeros(2), {}
        >>> for step, g in enumerate([torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])]):
        ...     point = Point([w], [g], rho=[0.05], base_state=[{}], step=step, memory=memory)
        ...     direction, scale = VarianceSuppressed(theta=0.5)(point)
        ...     print(direction[0])
        tensor([3., 4.])
        tensor([3., 2.])

    References:
        Li and Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, arXiv 2309.15639.
    """

    paper: ClassVar[Paper] = VASSO_PAPER
    averages_memory: ClassVar[bool] = True

    theta: float = 0.9
    """theta, the share of the new gradient: small for a long memory, 1 for SAM; 0.2 in the authors' scripts."""

    def __post_init__(self) -> None:
        check_positive_share("theta", self.theta, "the share of the new gradient in the mean")

    def __call__(self, point: Point) -> ScaledDirection:
        memory = point.memory_of(self)
        g = where_finite(point.gradient_norm, point.gradients, [own.get("d", 0.0) for own in memory])
        d = [own.setdefault("d", first) for own, first in zip(memory, g, strict=True)]
        foreach(torch._foreach_lerp_, d, g, weight=self.theta)
        return ScaledDirection(d, reciprocal(norm(d)))


def vasso(base_optimizer: Base, rho: Rho = 0.05, *, theta: float = 0.9, **options: Unpack[Options]) -> SAM:
    """VaSSO: SAM along a running mean of the gradient. Two passes per step.

    e = rho d / |d|,   d <- (1 - theta) d + theta g.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; 0.05 in the official code.
        theta: theta, the share of the new gradient in d; 0.2 in the official scripts, and 1 is SAM.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: theta is out of range.

    Example:
        >>> vasso(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        VarianceSuppressed(theta=0.9)

    References:
        Li and Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, arXiv 2309.15639.
    """
    return SAM(base_optimizer, rho, **options, perturbation=VarianceSuppressed(theta))


CARD = MethodCard(
    name="vasso",
    function=vasso,
    label="VaSSO",
    paper=VASSO_PAPER,
    summary="Perturb along a running mean of the gradient. The mean varies less from batch to batch than the gradient "
    "does.",
    equation="d <- (1 - theta) d + theta g,   from the first g\ne = rho d / |d|",
    cost="2",
    passes=2,
    memory=f"{COPY}; from step to step, a mean of the gradient",
    when="With small batches, whose noise changes the direction of SAM's perturbation.",
    when_not="With a rare cadence: the mean is updated at perturbed steps only.",
    usual={
        "rho": "0.05 (official code)",
        "theta": "0.2 in the scripts of the official code, 0.9 its default; 1 is SAM",
    },
    verified="official code, read",
    checked="https://github.com/BingcongLi/VaSSO: it adds 1e-7 to the norm.",
    caveats=("theta = 0.9 is a short memory: nine tenths of each mean are the new gradient.",),
    comparison=Comparison(summary="perturbs along a running mean of the gradient, at SAM's rho", capturable=True),
)
