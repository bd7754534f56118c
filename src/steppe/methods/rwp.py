"""RWP: random weight perturbation, in one pass."""

from dataclasses import dataclass, field
from typing import ClassVar, Unpack

import torch
from torch.optim import Optimizer

from steppe._tensors import random as random_tensors
from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import norm, reciprocal, scaled_by, to_wide
from steppe.sam import SAM

RWP_PAPER = Paper(
    "li2022rwp",
    ("Tao Li", "Wei Yan", "Zehao Lei", "Yingwen Wu", "Kun Fang", "Ming Yang", "Xiaolin Huang"),
    "Efficient Generalization Improvement Guided by Random Weight Perturbation",
    "2211.11489",
    2022,
)


@dataclass(frozen=True)
class GaussianNoise:
    """Climb in a random direction, in one pass a step (RWP): e = rho r / |r|, r Gaussian.

    With ``filterwise``, e = rho |w_f| r: every entry has a standard deviation of rho times the norm of the filter that
    it is in, w[i] for a weight of two dimensions and more, all of w for a bias; so |e_f| is about rho |w_f| sqrt(n_f).

    The draw depends on the seed, the step and the parameter's position alone: a resumed run goes on with the same
    draws, no global generator is touched, and workers draw alike unless each has a seed of its own.

    The authors' code is the filter-wise form, with rho = 0.01 on CIFAR and 0.005 on ImageNet. It goes down with the
    mean of two gradients: at w + e, and at w for another batch on another device (m-RWP). The same on one batch, in two
    passes, is this with :class:`~steppe.PenalizedNorm` (alpha=0.5).

    >>> at = Point([torch.zeros(100)], [], rho=[0.05], base_state=[{}], step=7)
    >>> direction, scale = GaussianNoise()(at)
    >>> (0.05 * scale * direction[0]).norm()
    tensor(0.0500)

    Source: Li et al., Efficient Generalization Improvement Guided by Random Weight Perturbation, arXiv 2211.11489, and
    its official code; and their Revisiting Random Weight Perturbation for Efficiently Improving Generalization, arXiv
    2404.00357.
    """

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    filterwise: bool = False
    """Whether every filter climbs in proportion to its own norm."""
    seed: int = 0
    """What makes the draws of two runs differ."""
    paper: Paper = field(default=RWP_PAPER, repr=False)
    """Whose use of it this is, for :func:`steppe.citation`."""

    def __call__(self, point: Point) -> ScaledDirection:
        r = random_tensors.normal("Random", self.seed, point.step, point.weights)
        if not self.filterwise:
            return ScaledDirection(r, reciprocal(norm(r)))
        filters = [
            torch.linalg.vector_norm(w, dim=list(range(1, w.dim())) if w.dim() > 1 else None, keepdim=True)
            for w in map(to_wide, point.weights)
        ]
        return ScaledDirection([scaled_by(part, lengths) for part, lengths in zip(r, filters, strict=True)])


def rwp(
    base_optimizer: Optimizer,
    rho: Rho = 0.01,
    *,
    filterwise: bool = True,
    seed: int = 0,
    **options: Unpack[Options],
) -> SAM:
    """RWP: climb in a random direction, in each filter in proportion to its norm. One pass a step, at w + e.

    Source: Li et al., Efficient Generalization Improvement Guided by Random Weight Perturbation, arXiv 2211.11489.
    """
    return SAM(base_optimizer, rho, **options, perturbation=GaussianNoise(filterwise, seed))


CARD = MethodCard(
    name="rwp",
    function=rwp,
    label="RWP",
    about="The climb needs no gradient, so it costs what the base costs.",
    equation="e = rho |w_f| r              in each filter f; r Gaussian\n"
    "e = rho r / |r|              with filterwise=False\n"
    "w <- Base(w, gradient at w + e)",
    cost="1",
    passes=1,
    memory=COPY,
    when="Where a second pass is too dear; any base will do.",
    when_not="To seek the worst point nearby: this one looks at an average one.",
    usual={
        "rho": "0.01 on CIFAR, 0.005 on ImageNet (official code)",
        "filterwise": "True (official code)",
    },
    checked="The official code, https://github.com/nblt/RWP and https://github.com/nblt/mARWP, was read: the same "
    "filter-wise Gaussian, never normalized to rho. The form of norm rho (filterwise=False) is ours. The bodies of "
    "the papers were not read.",
    caveats=(
        "Filter-wise, the length of e in a filter of n entries is about rho sqrt(n) times the filter's norm.",
        "Workers draw alike, unless each gets a seed of its own.",
        "The only pass is at w + e: the loss that you see, and BatchNorm's statistics, are those of that point.",
    ),
    comparison=Comparison(summary=f"climbs at random, in one pass, at rho / 5 ({USUAL_RATIO})", rho_factor=0.2),
)
