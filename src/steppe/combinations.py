"""Which way down: one short class a rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe import papers
from steppe._tensors.dtensor import foreach
from steppe._tensors.ops import add_scaled_, copy_, dot, norm, reciprocal, where_finite
from steppe.rules import Point


@dataclass(frozen=True)
class Perturbed:
    """Go down with the gradient at w + e, as SAM does: g_s; at a step that did not climb, g.

    >>> import torch
    >>> at = Point([torch.zeros(1)], [torch.tensor([1.0])], rho=[0.05], base_state=[{}], step=0)
    >>> Perturbed()(at, [torch.tensor([2.0])]), Perturbed()(at, None)
    ([tensor([2.])], [tensor([1.])])

    Source: Foret et al., arXiv 2010.01412.
    """

    paper: ClassVar[papers.Paper] = papers.SAM
    needs_clean: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    def __call__(self, at: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return at.gradients if perturbed is None else perturbed


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

    paper: ClassVar[papers.Paper] = papers.GSAM
    needs_clean: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    alpha: float = 0.2
    """alpha, the weight of the step up along g_orth; 0 is SAM, and the authors' CIFAR-10 example has 0.2."""

    def __post_init__(self) -> None:
        _check_weight("alpha", self.alpha, "it weighs the part of g orthogonal to g_s")

    def __call__(self, at: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return at.gradients
        g, g_s = at.gradients, list(perturbed)
        down = _orthogonal(g, g_s)
        foreach(torch._foreach_mul_, down, scalar=-self.alpha)
        foreach(torch._foreach_add_, down, g_s)
        return down


@dataclass(frozen=True)
class Weighted:
    """Weigh the sharpness L(w + e) - L(w) against the loss (WSAM, coupled): g + gamma / (1 - gamma) (g_s - g).

    gamma = 0 is the base, 1/2 is SAM, and more looks further for flatness. At a step that did not climb, g.

    This is the paper's algorithm without its "weight decouple", in which the base sees g alone and the sharpness term
    is subtracted after its step; with plain SGD the two are the same. The authors' code decouples by default, and
    clips both gradients to norm 1 by default, which the paper does not.

    >>> at = Point([torch.zeros(1)], [torch.tensor([1.0])], rho=[0.05], base_state=[{}], step=0)
    >>> Weighted(gamma=0.75)(at, [torch.tensor([2.0])])
    [tensor([4.])]

    Source: Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, arXiv
    2305.15817.
    """

    paper: ClassVar[papers.Paper] = papers.WSAM
    needs_clean: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    gamma: float = 0.9
    """gamma, the share of the sharpness, at least 0 and below 1; 0.8 to 0.95 is usual."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise ValueError(
                f"gamma must be at least 0 and less than 1, got {self.gamma}: the sharpness is weighed by "
                f"gamma / (1 - gamma); 0.5 is SAM"
            )

    def __call__(self, at: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return at.gradients
        g, g_s = list(at.gradients), list(perturbed)
        sharpness = foreach(torch._foreach_sub, g_s, g)
        foreach(torch._foreach_mul_, sharpness, scalar=self.gamma / (1 - self.gamma))
        foreach(torch._foreach_add_, sharpness, g)
        return sharpness


@dataclass(frozen=True)
class PenalizedNorm:
    """Penalise the gradient's norm, L(w) + lambda |g(w)| (PGN): (1 - alpha) g + alpha g_s.

    With the radius rho as the paper's r, alpha = lambda / r; alpha = 1 is SAM. At a step that did not climb, g.

    The authors' code has a flag, on by default, that takes g / |g| in the place of the g of the first term; here, as
    in the paper's formula, it is g.

    >>> at = Point([torch.zeros(1)], [torch.tensor([1.0])], rho=[0.05], base_state=[{}], step=0)
    >>> PenalizedNorm(alpha=0.75)(at, [torch.tensor([2.0])])
    [tensor([1.7500])]

    Source: Zhao et al., Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning, arXiv
    2202.03599.
    """

    paper: ClassVar[papers.Paper] = papers.PGN
    needs_clean: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    alpha: float = 0.8
    """alpha = lambda / r, the share of g_s; the authors train with 0.8 and r = 0.1."""

    def __post_init__(self) -> None:
        _check_weight("alpha", self.alpha, "it is lambda / r, the share of g_s")

    def __call__(self, at: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return at.gradients
        return foreach(torch._foreach_lerp, at.gradients, perturbed, weight=self.alpha)


@dataclass(frozen=True)
class Reuse:
    """Remember where g_s points away from g, and go there between climbs too (LookSAM): g + alpha |g|/|g_v| g_v.

    At a climb, go down with g_s and remember g_v = g_s - (g.g_s / |g|^2) g, its part orthogonal to g; norms and
    products run over all parameters together. Before the first climb, and where g_v = 0, go down with g. Combine it
    with :class:`~steppe.Every`: ``Every(5)`` costs 1.2 passes a step. It keeps one more copy of the gradient.

    A g_v that is not finite is not remembered: the one before it stays. No code of the authors was found to compare
    with. The implementation in pytorch_optimizer projects and scales each tensor on its own.

    >>> w, g = torch.zeros(2), torch.tensor([3.0, 0.0])
    >>> climb = Point([w], [g], rho=[0.05], base_state=[{}], step=0)
    >>> between = Point([w], [g], rho=[0.05], base_state=[{}], step=1, memory=climb.memory)
    >>> Reuse(alpha=0.5)(climb, [torch.tensor([3.0, 0.1])]), Reuse(alpha=0.5)(between, None)
    ([tensor([3.0000, 0.1000])], [tensor([3.0000, 1.5000])])

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """

    paper: ClassVar[papers.Paper] = papers.LOOKSAM
    needs_clean: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    alpha: float = 0.7
    """alpha, the length of the remembered part in units of |g|; 0.7 is usual."""

    def __post_init__(self) -> None:
        _check_weight("alpha", self.alpha, "it is the length of the remembered part in units of |g|")

    def __call__(self, at: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if perturbed is not None:
            self._remember(at, _orthogonal(perturbed, at.gradients))
            return perturbed
        down = [g.clone() for g in at.gradients]
        reused = [(d, own["g_v"]) for d, own in zip(down, at.memory_of(self), strict=True) if "g_v" in own]
        g_v = [v for _, v in reused]
        length = self.alpha * at.gradient_norm
        add_scaled_([d for d, _ in reused], length * reciprocal(norm(g_v)).to(length.device), g_v)
        return down

    def _remember(self, at: Point, g_v: Sequence[Tensor]) -> None:
        memory = at.memory_of(self)
        trusted = where_finite(norm(g_v), g_v, [own.get("g_v", 0.0) for own in memory])
        # in place: a CUDA graph knows tensors, and no dictionaries
        copy_([own.setdefault("g_v", v) for own, v in zip(memory, trusted, strict=True)], trusted)


def _orthogonal(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    """The part of x orthogonal to y, each list seen as one vector: x - (x.y / |y|^2) y; exactly 0 where x = y."""
    square = dot(ys, ys)
    along = torch.where(square == 0, 0.0, dot(xs, ys) / square)
    rest = [x.clone() for x in xs]
    add_scaled_(rest, -along, ys)
    return rest


def _check_weight(name: str, value: float, what: str) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {value}: {what}")
