"""SANER: reduce the entries of the perturbed gradient that SAM has reduced already."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_count, check_unit_interval
from steppe.methods._card import COPY_AND_G, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import Paper
from steppe.rules import Point
from steppe.rules.ops import foreach
from steppe.sam import SAM

SANER_PAPER = Paper(
    "luong2026saner",
    ("Hoang-Chau Luong", "Quang-Thuc Nguyen", "Dat Ba Tran", "Minh-Triet Tran"),
    "Understanding {SAM}'s Robustness to Noisy Labels through Gradient Down-weighting",
    "2411.17132",
    2026,
    "International Conference on Artificial Intelligence and Statistics (AISTATS)",
)


@dataclass(frozen=True)
class DownWeighted:
    """Reduce the entries of g_s that are smaller than those of g (SANER): (1 - alpha m) g_s, m = 1 where 0 < g_s/g < 1.

    m is taken entry by entry: 1 where g_s has the sign of g and is smaller. At a step without perturbation, the update
    gradient is g.

    Example:
        >>> point = Point([torch.zeros(4)], [torch.tensor([1.0, 1.0, 1.0, 0.0])], [0.05], base_state=[{}], step=0)
        >>> DownWeighted(alpha=0.5)(point, [torch.tensor([0.8, 2.0, -0.8, 0.8])])
        [tensor([ 0.4000,  2.0000, -0.8000,  0.8000])]

    References:
        Luong et al., Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting, arXiv 2411.17132.
    """

    paper: ClassVar[Paper] = SANER_PAPER
    needs_unperturbed_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    alpha: float = 0.5
    """alpha, the share by which these entries are reduced; the authors' value. 0 is SAM."""
    warmup_steps: int = 0
    """The number of steps over which alpha grows linearly from 0; the authors' value is a quarter of the training."""

    def __post_init__(self) -> None:
        check_unit_interval("alpha", self.alpha, "the share by which entries of g_s are reduced")
        meaning = "the number of optimizer steps over which alpha grows from 0"
        check_count("warmup_steps", self.warmup_steps, meaning, at_least=0)

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return point.gradients
        g, g_s = point.gradients, perturbed
        alpha = self.alpha * min(point.step / self.warmup_steps, 1.0) if self.warmup_steps else self.alpha
        # 0 < g_s / g < 1 where g_s and g - g_s have one sign; of two small entries the product would vanish
        m = foreach(torch._foreach_sign_, foreach(torch._foreach_sub, g, g_s))
        foreach(torch._foreach_mul_, m, foreach(torch._foreach_sign, g_s))
        foreach(torch._foreach_clamp_min_, m, scalar=0.0)
        foreach(torch._foreach_mul_, m, scalar=-alpha)
        foreach(torch._foreach_add_, m, scalar=1.0)
        return foreach(torch._foreach_mul_, m, g_s)


def saner(
    base_optimizer: Base,
    rho: Rho = 0.1,
    *,
    alpha: float = 0.5,
    warmup_steps: int = 0,
    **options: Unpack[Options],
) -> SAM:
    """SANER: SAM that reduces the entries of g_s which are smaller than those of g. Two passes per step.

    w <- Base(w, (1 - alpha m) g_s), with m = 1 where 0 < g_s / g < 1, entry by entry.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; 0.1 in the official code.
        alpha: alpha, the share by which these entries are reduced; 0.5 in the official code, and 0 is SAM.
        warmup_steps: The number of steps over which alpha grows linearly from 0; 50 of 200 epochs in the official code.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> saner(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).combination
        DownWeighted(alpha=0.5, warmup_steps=0)

    References:
        Luong et al., Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting, arXiv 2411.17132.
    """
    return SAM(base_optimizer, rho, **options, combination=DownWeighted(alpha, warmup_steps))


CARD = MethodCard(
    name="saner",
    function=saner,
    label="SANER",
    paper=SANER_PAPER,
    summary="Reduce the entries of the perturbed gradient that are smaller than those of the gradient at w. According "
    "to the paper, in these entries wrong labels dominate.",
    equation="e = rho g / |g|\nm = 1 where 0 < g_s / g < 1, else 0      entry by entry\n"
    "w <- Base(w, (1 - alpha m) g_s)",
    cost="2",
    passes=2,
    memory=COPY_AND_G,
    when="To learn a part of wrong labels more slowly than SAM does.",
    when_not="With correct labels: the reduced entries are then a part of the signal.",
    usual={
        "rho": "0.1 (official code)",
        "alpha": "0.5 (official code), 0.25 to 0.75 in its scripts; 0 is SAM",
        "warmup_steps": "50 of 200 epochs (official code), 0 to 75 in its scripts",
    },
    verified="official code, same steps",
    checked="https://github.com/lhchau/saner: 20 steps agree to 1e-12. Its argument `alpha` is the factor of the "
    "reduced entries, which is 1 - alpha in its README and here. It adds 1e-8 to g in the quotient, so that m may "
    "differ where g is as small. There alpha grows once an epoch, here at every step.",
    caveats=(
        "m jumps where g_s = g: two runs that differ by a rounding error can part there.",
        "The length of the update gradient is at most that of g_s.",
    ),
    comparison=Comparison(summary="reduces the entries of g_s that are smaller than those of g, at SAM's rho"),
)
