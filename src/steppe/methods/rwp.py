"""RWP: random weight perturbation, in a single pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_seed
from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import norm, normal, reciprocal, widen
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
    """Perturb by Gaussian noise, in a single pass per step (RWP): e = rho r / |r|, r Gaussian.

    With ``filterwise``, e = rho |w_f| r: every entry has a standard deviation of rho times the norm of its filter,
    which is w[i] for a weight of two dimensions and more, and all of w for a bias; so |e_f| is about
    rho |w_f| sqrt(n_f).

    The draw depends only on the seed, the step, the micro-batch (where each has a perturbation of its own) and the
    parameter's position: a resumed run continues with the same draws, no global generator is used, and workers draw
    alike unless each has its own seed.

    The authors' code has the filter-wise form, with rho = 0.01 on CIFAR and 0.005 on ImageNet. It updates with the
    mean of two gradients: at w + e, and at w for another batch on another device (m-RWP). The same on one batch, in two
    passes, is this rule with :class:`~steppe.MixedGradient` (alpha=0.5).

    Example:
        >>> point = Point([torch.zeros(100)], [], rho=[0.05], base_state=[{}], step=7)
        >>> direction, scale = GaussianNoise()(point)
        >>> (0.05 * scale * direction[0]).norm()
        tensor(0.0500)

    References:
        Li et al., Efficient Generalization Improvement Guided by Random Weight Perturbation, arXiv 2211.11489, and its
        official code; Li et al., Revisiting Random Weight Perturbation for Efficiently Improving Generalization, arXiv
        2404.00357.
    """

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    filterwise: bool = False
    """True if every filter is perturbed in proportion to its own norm."""
    seed: int = 0
    """The seed of the noise."""
    paper: Paper = field(default=RWP_PAPER, repr=False)
    """The paper of the method that uses the noise, for :func:`steppe.citation`."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def __call__(self, point: Point) -> ScaledDirection:
        if self.filterwise:
            return ScaledDirection(noise(point, self.seed, filter_norms(point.weights)))
        r = noise(point, self.seed)
        return ScaledDirection(r, reciprocal(norm(r)))


def filter_norms(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return |w_f| of the filters of each weight, in a shape that broadcasts to it; of a bias, |w|."""
    return [
        torch.linalg.vector_norm(w, dim=list(range(1, w.dim())) if w.dim() > 1 else None, keepdim=True)
        for w in map(widen, weights)
    ]


def noise(point: Point, seed: int, deviations: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return Gaussian noise for the step of a point, with these deviations, which are broadcast; by default with 1."""
    # "Random" is the name under which the draws of all earlier runs were made.
    r = normal("Random", seed, point.step, point.weights, micro_batch=point.micro_batch)
    if deviations is not None:
        for part, deviation in zip(r, deviations, strict=True):
            part.mul_(deviation)
    return r


def rwp(
    base_optimizer: Base,
    rho: Rho = 0.01,
    *,
    filterwise: bool = True,
    seed: int = 0,
    **options: Unpack[Options],
) -> SAM:
    """RWP: perturb by Gaussian noise, in each filter in proportion to its norm. A single pass per step, at w + e.

    e = rho |w_f| r in each filter f, with Gaussian r. The paper mixes the gradient at w + e with that at w: that is
    :func:`mixed_rwp`, in two passes.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the standard deviation of e relative to the filter's norm; the paper's 0.01 (CIFAR) and 0.005
            (ImageNet) are those of :func:`mixed_rwp`.
        filterwise: False for e = rho r / |r|, whose length is rho.
        seed: The seed of the noise.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Example:
        >>> rwp(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        GaussianNoise(filterwise=True, seed=0)

    References:
        Li et al., Efficient Generalization Improvement Guided by Random Weight Perturbation, arXiv 2211.11489.
    """
    return SAM(base_optimizer, rho, **options, perturbation=GaussianNoise(filterwise, seed))


CARD = MethodCard(
    name="rwp",
    function=rwp,
    label="RWP",
    paper=RWP_PAPER,
    summary="Perturb by Gaussian noise, in each filter in proportion to its norm. The perturbation needs no gradient, "
    "so a step costs what a step of the base costs.",
    equation="e = rho |w_f| r              in each filter f; r Gaussian\n"
    "e = rho r / |r|              with filterwise=False\n"
    "w <- Base(w, gradient at w + e)",
    cost="1",
    passes=1,
    memory=COPY,
    when="When a second pass is too expensive; with any base.",
    when_not="To minimize the loss at the worst point nearby: this perturbation is an average one.",
    usual={
        "rho": "the authors' 0.01 (CIFAR) and 0.005 (ImageNet) are those of the mixture, `mixed_rwp`",
        "filterwise": "True (official code)",
    },
    verified="official code, read",
    checked="https://github.com/nblt/RWP and https://github.com/nblt/mARWP: the same filter-wise Gaussian, never "
    "normalized to rho. The paper and its code mix g_s with the gradient at w (alpha = 0.5), in two passes or on two "
    "devices: that is `mixed_rwp`. This method is the part of it at w + e, in a single pass; the authors' recipe for "
    "a single pass is `arwp`, with a deviation that grows over the training. The form of norm rho (filterwise=False) "
    "is ours. The bodies of the papers were not read.",
    caveats=(
        "Filter-wise, the length of e in a filter of n entries is about rho sqrt(n) times the filter's norm.",
        "All workers draw the same noise, unless each has its own seed.",
        "The only pass is at w + e: the reported loss and BatchNorm's statistics are those of that point.",
    ),
    other_measurements=(
        "[Cosine schedule and momentum](../evidence/family.md), ten seeds: not distinguishable from SGD. With 40 "
        "% wrong labels 22.9 points better, for one pass a step, where SAM is 24.9 better for two.",
    ),
    comparison=Comparison(summary=f"perturbs by noise, in a single pass, at rho / 5 ({USUAL_RATIO})", rho_factor=0.2),
)
