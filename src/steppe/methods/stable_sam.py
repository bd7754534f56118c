"""Stable SAM: give the perturbed gradient the length of the gradient at w."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe.methods._card import COPY_AND_G, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import Paper
from steppe.rules import Point
from steppe.rules.ops import add_scaled_, norm
from steppe.sam import SAM

STABLE_SAM_PAPER = Paper(
    "tan2025stable",
    ("Chengli Tan", "Jiangshe Zhang", "Junmin Liu", "Yicheng Wang", "Yunda Hao"),
    "Stabilizing Sharpness-Aware Minimization Through a Simple Renormalization Strategy",
    "2401.07250",
    2025,
    "Journal of Machine Learning Research (JMLR)",
)


@dataclass(frozen=True)
class Renormalized:
    """Update with g_s, rescaled to the length of g (Stable SAM, SSAM): |g| / |g_s| g_s.

    The norms run over all parameters together. At a step without perturbation, the update gradient is g; g_s = 0 gives
    0.

    Example:
        >>> point = Point([torch.zeros(2)], [torch.tensor([5.0, 0.0])], rho=[0.05], base_state=[{}], step=0)
        >>> Renormalized()(point, [torch.tensor([6.0, 8.0])])
        [tensor([3., 4.])]

    References:
        Tan et al., Stabilizing Sharpness-Aware Minimization Through a Simple Renormalization Strategy, arXiv
        2401.07250.
    """

    paper: ClassVar[Paper] = STABLE_SAM_PAPER
    needs_unperturbed_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return point.gradients
        length = norm(perturbed)
        update = [g_s.clone() for g_s in perturbed]
        # a difference, so that equal lengths leave g_s as it is, to the bit
        add_scaled_(update, torch.where(length == 0, 0.0, point.gradient_norm / length - 1), perturbed)
        return update


def stable_sam(base_optimizer: Base, rho: Rho = 0.05, **options: Unpack[Options]) -> SAM:
    """Stable SAM (SSAM): SAM with a perturbed gradient of the length of g. Two passes per step.

    w <- Base(w, |g| / |g_s| g_s).

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; 0.05 in the official code.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Example:
        >>> stable_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).combination
        Renormalized()

    References:
        Tan et al., Stabilizing Sharpness-Aware Minimization Through a Simple Renormalization Strategy, arXiv
        2401.07250.
    """
    return SAM(base_optimizer, rho, **options, combination=Renormalized())


CARD = MethodCard(
    name="stable_sam",
    function=stable_sam,
    label="Stable SAM",
    paper=STABLE_SAM_PAPER,
    summary="Update with the perturbed gradient, rescaled to the length of the gradient at w. The steps of SAM are "
    "then as long as those of the base.",
    equation="e = rho g / |g|\nw <- Base(w, |g| / |g_s| g_s)",
    cost="2",
    passes=2,
    memory=COPY_AND_G,
    when="With a learning rate at which SAM is unstable: g_s is often longer than g.",
    when_not="Around Adam and other bases whose steps do not depend on the length of the gradient.",
    usual={"rho": "0.05 (official code)"},
    verified="official code, same steps",
    checked="https://github.com/cltan023/stablesam2024: 20 steps agree to 1e-11. It adds 1e-12 to both norms. Its "
    "README uses the same rescaling with unnormalized perturbations, e = rho g (those of `unified_sam` with lambda = "
    "0); the combination works with any perturbation.",
    caveats=(
        "Called SSAM in its paper, as is Sparse SAM (`sparse_sam`, `dynamic_sparse_sam`) in its own.",
        "With a perturbation for each micro-batch, each g_s gets the length of the g of its own micro-batch.",
    ),
    comparison=Comparison(summary="rescales g_s to the length of g, at SAM's rho", capturable=True),
)
