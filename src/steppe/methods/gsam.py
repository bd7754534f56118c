"""GSAM: minimize the surrogate gap as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.methods._card import COPY_AND_G, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import ICLR, Paper
from steppe.rules import Point
from steppe.rules.ops import check_weight, foreach, orthogonal
from steppe.sam import SAM

GSAM_PAPER = Paper(
    "zhuang2022gsam",
    (
        "Juntang Zhuang",
        "Boqing Gong",
        "Liangzhe Yuan",
        "Yin Cui",
        "Hartwig Adam",
        "Nicha Dvornek",
        "Sekhar Tatikonda",
        "James Duncan",
        "Ting Liu",
    ),
    "Surrogate Gap Minimization Improves Sharpness-Aware Training",
    "2203.08065",
    2022,
    ICLR,
)


@dataclass(frozen=True)
class SurrogateGap:
    """Go down with g_s, and close the surrogate gap L(w + e) - L(w) as well (GSAM): g_s - alpha g_orth.

    g = g_par + g_orth is g's decomposition along g_s, over all parameters together: going up along g_orth raises L(w)
    towards L(w + e), and leaves L(w + e) as it is to first order. At a step that did not climb, g. The paper makes
    rho proportional to the learning rate: :class:`~steppe.rho_schedule.ProportionalRho`.

    The authors' PyTorch code adds 1e-12 to its denominators, and with several workers decomposes each worker's own
    gradient; here, as in the paper's algorithm, it is the gradient that the base gets. Their JAX code offers the
    decomposition of g_s along g too (``minimize_fp=False``); that is not the paper's.

    >>> at = Point([torch.zeros(2)], [torch.tensor([1.0, 1.0])], rho=[0.05], base_state=[{}], step=0)
    >>> SurrogateGap(alpha=0.5)(at, [torch.tensor([2.0, 0.0])])
    [tensor([ 2.0000, -0.5000])]

    Source: Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065.
    """

    paper: ClassVar[Paper] = GSAM_PAPER
    needs_unperturbed_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    alpha: float = 0.2
    """alpha, the weight of the step up along g_orth; 0 is SAM, and the authors' CIFAR-10 example has 0.2."""

    def __post_init__(self) -> None:
        check_weight("alpha", self.alpha, "it weighs the part of g orthogonal to g_s")

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return point.gradients
        g, g_s = point.gradients, list(perturbed)
        down = orthogonal(g, g_s)
        foreach(torch._foreach_mul_, down, scalar=-self.alpha)
        foreach(torch._foreach_add_, down, g_s)
        return down


def gsam(base_optimizer: Optimizer, rho: Rho = 0.05, *, alpha: float = 0.2, **options: Unpack[Options]) -> SAM:
    """GSAM: go down with g_s - alpha times the part of g orthogonal to it. Two passes a step.

    Source: Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065.
    """
    return SAM(base_optimizer, rho, **options, combination=SurrogateGap(alpha))


CARD = MethodCard(
    name="gsam",
    function=gsam,
    label="GSAM",
    about="That closes the surrogate gap L(w + e) - L(w) as well, and leaves L(w + e) as it is to first order.",
    equation="e = rho g / |g|\ng_orth = g - (g.g_s / |g_s|^2) g_s\nw <- Base(w, g_s - alpha g_orth)",
    cost="2",
    passes=2,
    memory=COPY_AND_G,
    when="To close the gap between L(w + e) and L(w) as well, at no further pass than SAM's.",
    when_not="Where memory for one more gradient is short.",
    usual={
        "rho": "proportional to the learning rate: `steppe.rho_schedule.ProportionalRho`",
        "alpha": "0.2 in the authors' CIFAR-10 example; 0 is SAM",
    },
    checked="The official code was read, PyTorch (https://github.com/juntang-zhuang/GSAM) and JAX. The former "
    "adds 1e-12 to its denominators, and with several workers decomposes each worker's own gradient; here, as in "
    "the paper, it is the gradient that the base gets. The latter also offers to decompose g_s along g, which is "
    "not the paper's.",
    caveats=("This function keeps rho constant: add the schedule.",),
    comparison=Comparison(summary="goes down the surrogate gap too, at SAM's rho", capturable=True),
)
