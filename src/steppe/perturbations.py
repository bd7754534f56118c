"""Which way up: one short class a rule."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from steppe import papers
from steppe._tensors import random as draws
from steppe._tensors.dtensor import foreach, part_of, whole
from steppe._tensors.ops import as_real, dot, norm, reciprocal, where_finite
from steppe.rules import Ascent, Point


@dataclass(frozen=True)
class L2:
    """Climb along the gradient (SAM): e = rho g / |g|.

    The norm runs over all parameters of the climb together. A zero gradient gives e = 0.

    >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
    >>> direction, scale = L2()(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
    >>> 0.05 * scale * direction[0]
    tensor([0.0300, 0.0400])

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    paper: ClassVar[papers.Paper] = papers.SAM
    scale_free: ClassVar[bool] = True

    def __call__(self, at: Point) -> Ascent:
        return Ascent(at.gradients, reciprocal(at.gradient_norm))


@dataclass(frozen=True)
class Adaptive:
    """Climb in proportion to the weights (ASAM): e = rho T^2 g / |T g|, T = diag(|w| + eta).

    The neighbourhood |T^-1 e| <= rho does not change when a network is rescaled without changing its function, so
    rho is larger than SAM's: the paper uses 0.5 to 2. The authors' code takes T = 1 for parameters that are not called
    "weight"; here, as in the paper's formula, T is the same for all.

    >>> w, g = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    >>> direction, scale = Adaptive(eta=0.0)(Point([w], [g], rho=[0.5], base_state=[{}], step=0))
    >>> 0.5 * scale * direction[0]
    tensor([1., 0.])

    Source: Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
    Networks, arXiv 2102.11600.
    """

    paper: ClassVar[papers.Paper] = papers.ASAM
    scale_free: ClassVar[bool] = True

    eta: float = 0.01
    """eta, which keeps weights at zero movable; the paper's value."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta < float("inf"):
            raise ValueError(
                f"eta must be finite and not negative, got {self.eta}: it is added to |w| in T = |w| + eta"
            )

    def __call__(self, at: Point) -> Ascent:
        T = foreach(torch._foreach_abs, at.weights)
        foreach(torch._foreach_add_, T, scalar=self.eta)
        Tg = foreach(torch._foreach_mul, T, at.gradients)
        foreach(torch._foreach_mul_, T, Tg)  # T^2 g, in the place of T
        return Ascent(T, reciprocal(norm(Tg)))


@dataclass(frozen=True)
class LInf:
    """Climb by the same length in every coordinate (SAM with p = inf): e = rho sign(g).

    |e|_inf = rho, and |e|_2 = rho sqrt(n) for n weights: rho has to be far smaller than :class:`L2`'s. A coordinate
    whose gradient is zero stays. On the one network that the paper tries it on, p = 2 is more accurate.

    >>> w, g = torch.zeros(3), torch.tensor([3.0, -4.0, 0.0])
    >>> direction, scale = LInf()(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
    >>> 0.05 * scale * direction[0]
    tensor([ 0.0500, -0.0500,  0.0000])

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412,
    appendix C.5.
    """

    paper: ClassVar[papers.Paper] = papers.SAM
    scale_free: ClassVar[bool] = True

    def __call__(self, at: Point) -> Ascent:
        return Ascent(foreach(torch._foreach_sign, at.gradients))


@dataclass(frozen=True)
class ZScore:
    """Climb along the gradient's outstanding entries (ZSharp): e = rho g~ / |g~|, g~ = g where |z| > q, else 0.

    In each tensor z = (g - mean(g)) / std(g), and q is the percentile of |z|. Tensors of fewer than two dimensions
    (biases, norm layers) keep all of g, and so does a tensor of which nothing but zeros would be left. A zero gradient
    gives e = 0.

    Which tensors are filtered, and by a percentile of their own, is as in the authors' code. That then climbs by rho
    in each filtered tensor separately; here, as in the paper's formula, rho is the length of the whole e.

    >>> w, g = torch.zeros(2, 2), torch.tensor([[3.0, 0.1], [-0.1, 0.2]])
    >>> direction, scale = ZScore(percentile=0.5)(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
    >>> direction[0]
    tensor([[ 3.0000,  0.0000],
            [-0.1000,  0.0000]])

    Source: Yun, Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks, arXiv 2505.02369.
    """

    paper: ClassVar[papers.Paper] = papers.ZSHARP
    scale_free: ClassVar[bool] = True

    percentile: float = 0.95
    """Q_p, as a fraction: 0.95, the authors' value, keeps the top 5 % of each tensor."""

    def __post_init__(self) -> None:
        if not 0 <= self.percentile < 1:
            raise ValueError(
                f"percentile must be at least 0 and less than 1, got {self.percentile}: it is the fraction of each "
                "tensor that does not climb, 0.95 for the top 5 %"
            )

    def __call__(self, at: Point) -> Ascent:
        filtered = [part_of(self._filter(whole(g)), g) if g.dim() > 1 and g.numel() else g for g in at.gradients]
        return Ascent(filtered, reciprocal(norm(filtered)))

    def _filter(self, g: Tensor) -> Tensor:
        # |z| > q holds for the same entries without std, and with the next |z| below q in place of q: one selection.
        # torch.quantile sorts, and takes no more than 16 M entries; kthvalue is slow on CUDA (pytorch issue 75599).
        z = (g - g.mean()).abs().flatten()
        below = math.floor(self.percentile * (z.numel() - 1))
        q = z.topk(z.numel() - below, sorted=False).values.min()
        left = torch.where(z.view(g.shape) > q, g, 0.0)
        return torch.where(left.any(), left, g)


@dataclass(frozen=True)
class Fisher:
    """Climb in the metric of the Fisher information (Fisher SAM): e = rho F^-1 g / sqrt(g' F^-1 g), F = 1 + eta f.

    f = g^2, entry by entry, is the diagonal of the empirical Fisher information as one batch's gradient gives it: no
    further pass and no memory. A coordinate whose gradient is large beside 1 / sqrt(eta) climbs less; |e| <= rho, and
    eta = 0 is SAM. eta belongs to a scale of the loss: the mean over the batch, and not a loss scaler's multiple of it.
    A zero gradient gives e = 0.

    No code of the authors was found, and of the paper no more than the abstract could be read. Three independent
    implementations agree on g^2 and on 1 / (1 + eta f), but not on the normalisation: one has it as here, one in each
    tensor by itself, and one makes |e| = rho.

    >>> w, g = torch.zeros(2), torch.tensor([1.0, 3.0])
    >>> direction, scale = Fisher(eta=1.0)(Point([w], [g], rho=[0.1], base_state=[{}], step=0))
    >>> direction[0]
    tensor([0.5000, 0.3000])

    Source: Kim et al., Fisher SAM: Information Geometry and Sharpness Aware Minimisation, arXiv 2206.04920.
    """

    paper: ClassVar[papers.Paper] = papers.FISHER_SAM

    eta: float = 1.0
    """eta, the weight of the Fisher information against the Euclidean metric; 1 in the three implementations."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta < float("inf"):
            raise ValueError(
                f"eta must be finite and not negative, got {self.eta}: it weighs the Fisher information in 1 + eta f"
            )

    def __call__(self, at: Point) -> Ascent:
        g = [_wide(part) for part in at.gradients]  # in float16 the squares of gradients from 256 on are infinite
        F = foreach(torch._foreach_mul, g, g)
        foreach(torch._foreach_mul_, F, scalar=self.eta)
        foreach(torch._foreach_add_, F, scalar=1.0)
        d = foreach(torch._foreach_div, g, F)
        direction = [part.to(like.dtype) for part, like in zip(d, at.gradients, strict=True)]
        return Ascent(direction, reciprocal(dot(g, d).sqrt()))


@dataclass(frozen=True)
class LayerWise:
    """Climb in every layer by its own norms (as Look-LayerSAM does): in each e_l = rho |w_l| g_l / |g_l|.

    A layer is one parameter tensor. rho is the length of the climb relative to the layer's weights, so that layers of
    all scales climb alike, as LARS and LAMB let them step; layers at zero stay there, and so do those whose gradient
    is zero. With ``relative=False``, e_l = rho g_l / |g_l|, and for L layers |e| = rho sqrt(L).

    Which of the two the paper means is not settled: no code of the authors was found, of the paper no more than the
    abstract could be read, and of two implementations one has the second form, and one divides twice by the gradient,
    rho |w_l| g_l / |g_l|^2, and so climbs the farther the smaller that is.

    >>> w, g = [torch.tensor([0.0, 2.0]), torch.tensor([4.0])], [torch.tensor([3.0, 4.0]), torch.tensor([-1e-3])]
    >>> LayerWise()(Point(w, g, rho=[0.05] * 2, base_state=[{}, {}], step=0)).direction
    [tensor([1.2000, 1.6000]), tensor([-4.])]

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """

    paper: ClassVar[papers.Paper] = papers.LOOKSAM
    scale_free: ClassVar[bool] = True

    relative: bool = True
    """Whether rho is relative to the norm of each layer's weights."""

    def __call__(self, at: Point) -> Ascent:
        lengths = [reciprocal(norm([g])) for g in at.gradients]
        if self.relative:
            lengths = [norm([w]) * length for w, length in zip(at.weights, lengths, strict=True)]
        return Ascent([_scaled(g, length) for g, length in zip(at.gradients, lengths, strict=True)])


@dataclass(frozen=True)
class Friendly:
    """Climb along the batch's own part of the gradient (F-SAM): e = rho d / |d|, d = g - sigma m.

    m <- lambda m + (1 - lambda) g, from m = 0, stands for the gradient of all data; it moves at the steps that climb.
    With sigma = 1 the first e is SAM's; d = 0 gives e = 0. On full batches d is no more than how g has moved.
    A copy of the gradient is kept.

    The authors' code subtracts the m of the step before, and starts it from the first gradient. For sigma = 1, d has
    the same direction with either m.

    >>> w, memory = torch.zeros(2), {}
    >>> for step, g in enumerate([torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])]):
    ...     point = Point([w], [g], rho=[0.05], base_state=[{}], step=step, memory=memory)
    ...     direction, scale = Friendly()(point)
    ...     print(direction[0])
    tensor([2.7000, 3.6000])
    tensor([ 2.4300, -0.3600])

    Source: Li et al., Friendly Sharpness-Aware Minimization, arXiv 2403.12350.
    """

    paper: ClassVar[papers.Paper] = papers.FRIENDLY_SAM

    sigma: float = 1.0
    """sigma, how much of m is taken away; the authors' value. With 0 this is SAM."""
    lmbda: float = 0.9
    """lambda, the memory of m; the authors' code uses 0.6 to 0.95."""

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(
                f"sigma must be finite and not negative, got {self.sigma}: it is how much of the mean is taken away"
            )
        if not 0 < self.lmbda < 1:
            raise ValueError(
                f"lmbda must be between 0 and 1, got {self.lmbda}: it is the share of the old mean in the new one"
            )

    def __call__(self, at: Point) -> Ascent:
        memory = at.memory_of(self)
        for own, g in zip(memory, at.gradients, strict=True):
            if "m" not in own:
                own["m"] = torch.zeros_like(g)
        m = [own["m"] for own in memory]
        trusted = where_finite(at.gradient_norm, at.gradients, m)
        foreach(torch._foreach_lerp_, m, trusted, weight=1 - self.lmbda)
        d = foreach(torch._foreach_sub, at.gradients, m, alpha=self.sigma)
        return Ascent(d, reciprocal(norm(d)))


@dataclass(frozen=True)
class VarianceSuppressed:
    """Climb along a running mean of the gradient (VaSSO): e = rho d / |d|, d <- (1 - theta) d + theta g.

    d starts from the first gradient, as in the authors' code, and moves at the steps that climb; d = 0 gives e = 0.
    A copy of the gradient is kept.

    >>> w, memory = torch.zeros(2), {}
    >>> for step, g in enumerate([torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])]):
    ...     point = Point([w], [g], rho=[0.05], base_state=[{}], step=step, memory=memory)
    ...     direction, scale = VarianceSuppressed(theta=0.5)(point)
    ...     print(direction[0])
    tensor([3., 4.])
    tensor([3., 2.])

    Source: Li and Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, arXiv 2309.15639.
    """

    paper: ClassVar[papers.Paper] = papers.VASSO

    theta: float = 0.9
    """theta, the share of the new gradient: small for a long memory, 1 for SAM; the authors' code uses 0.9."""

    def __post_init__(self) -> None:
        if not 0 < self.theta <= 1:
            raise ValueError(
                f"theta must be more than 0 and at most 1, got {self.theta}: it is the share of the new gradient in "
                "the mean"
            )

    def __call__(self, at: Point) -> Ascent:
        memory = at.memory_of(self)
        g = where_finite(at.gradient_norm, at.gradients, [own.get("d", 0.0) for own in memory])
        d = [own.setdefault("d", first) for own, first in zip(memory, g, strict=True)]
        foreach(torch._foreach_lerp_, d, g, weight=self.theta)
        return Ascent(d, reciprocal(norm(d)))


@dataclass(frozen=True)
class Momentum:
    """Climb against the base's momentum, in one pass a step (MSAM): e = -rho v / |v|.

    v is the base's running mean of gradients: SGD's ``momentum_buffer``, or ``exp_avg`` of Adam and its kin. The sign
    is that of the authors' code, which climbs in the direction of the next update. The first step has no v and does
    not climb. rho is much larger than SAM's: their examples have 3 where SAM has 0.2. Their code adds weight decay at
    w + e; here the base does, at w.

    >>> w, v = torch.zeros(2), torch.tensor([3.0, 4.0])
    >>> direction, scale = Momentum()(Point([w], [], rho=[3.0], base_state=[{"momentum_buffer": v}], step=1))
    >>> 3.0 * scale * direction[0]
    tensor([-1.8000, -2.4000])

    Source: Becker et al., Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, arXiv 2401.12033,
    and its official code.
    """

    paper: ClassVar[papers.Paper] = papers.MSAM
    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    def __call__(self, at: Point) -> Ascent:
        v = [state.get("momentum_buffer", state.get("exp_avg")) for state in at.base_state]
        known = [as_real(b) for b in v if b is not None]
        if at.step > 0 and not known:
            raise ValueError(
                "the base optimizer keeps no momentum, so there is nothing to climb along, and every step would be a "
                "plain one: give SGD a momentum, or take Adam or AdamW"
            )
        return Ascent([None if b is None else as_real(b) for b in v], -reciprocal(norm(known)))


@dataclass(frozen=True)
class Random:
    """Climb in a random direction, in one pass a step (RWP): e = rho r / |r|, r Gaussian.

    With ``filterwise``, e = rho |w_f| r: every entry has a standard deviation of rho times the norm of the filter that
    it is in, w[i] for a weight of two dimensions and more, all of w for a bias; so |e_f| is about rho |w_f| sqrt(n_f).

    The draw depends on the seed, the step and the parameter's position alone: a resumed run goes on with the same
    draws, no global generator is touched, and workers draw alike unless each has a seed of its own.

    The authors' code is the filter-wise form, with rho = 0.01 on CIFAR and 0.005 on ImageNet. It goes down with the
    mean of two gradients: at w + e, and at w for another batch on another device (m-RWP). The same on one batch, in two
    passes, is this with :class:`~steppe.PenalizedNorm` (alpha=0.5).

    >>> at = Point([torch.zeros(100)], [], rho=[0.05], base_state=[{}], step=7)
    >>> direction, scale = Random()(at)
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
    paper: papers.Paper = field(default=papers.RWP, repr=False)
    """Whose use of it this is, for :func:`steppe.citation`."""

    def __call__(self, at: Point) -> Ascent:
        r = draws.normal("Random", self.seed, at.step, at.weights)
        if not self.filterwise:
            return Ascent(r, reciprocal(norm(r)))
        filters = [
            torch.linalg.vector_norm(w, dim=list(range(1, w.dim())) if w.dim() > 1 else None, keepdim=True)
            for w in map(_wide, at.weights)
        ]
        return Ascent([_scaled(part, lengths) for part, lengths in zip(r, filters, strict=True)])


def _wide(x: Tensor) -> Tensor:
    """Where squares of x fit: float32 for half precision."""
    return x.float() if x.dtype.itemsize <= 2 else x


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a factor that may not fit into x's own dtype."""
    wide = _wide(x)
    return (wide * factor.to(wide)).to(x.dtype)
