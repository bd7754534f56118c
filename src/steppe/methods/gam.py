"""GAM: minimize the largest gradient norm in the neighborhood, too."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_finite, check_nonnegative, check_positive
from steppe.methods._base import OwnStepMethod
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import CVPR, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import add_scaled_, as_real, foreach, norm, orthogonal, reciprocal
from steppe.sam import Pass

GAM_PAPER = Paper(
    "zhang2023gam",
    ("Xingxuan Zhang", "Renzhe Xu", "Han Yu", "Hao Zou", "Peng Cui"),
    "Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization",
    "2303.03108",
    2023,
    CVPR,
)


class _AlongGradient(ScaledDirection):
    """The perturbation of the second pass, whose direction is a copy of g_0."""


@dataclass(frozen=True)
class GradientNormAscent:
    """Perturb by e_0 along g_0, then by e_1 along the gradient of the gradient norm, then by e_1 and along g_2.

    e_0 = rho' g_0 / |g_0|,   e_1 = rho h / |h| with h = g_1 - g_0,   e_1 + e_2 with e_2 = rho' g_2 / |g_2|; g_0 is the
    gradient at w, g_1 at w + e_0 and g_2 at w + e_1. h / rho' is, to first order, the Hessian times g_0 / |g_0|: the
    gradient of the gradient norm.
    """

    scale_free: ClassVar[bool] = True
    ascent_steps: ClassVar[int] = 3

    ratio: float
    """rho' / rho."""

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the perturbation of the next pass from w, in units of rho."""
        g, before = point.gradients, point.ascent_so_far
        if before is None:
            return _AlongGradient([t.clone() for t in g], self.ratio * reciprocal(point.gradient_norm))
        past = [t for t in before.direction if t is not None]
        if isinstance(before, _AlongGradient):
            h = foreach(torch._foreach_sub, g, past)
            return ScaledDirection(h, reciprocal(norm(h)))
        e = [torch.zeros_like(t) for t in g]
        add_scaled_(e, torch.as_tensor(before.scale), past)
        add_scaled_(e, self.ratio * reciprocal(point.gradient_norm), g)
        return ScaledDirection(e)


@dataclass(frozen=True)
class _UpdateOfTheMethod:
    """Stands for :meth:`FirstOrderFlatness.update`, which needs g_0 and the gradients of all other passes."""

    needs_unperturbed_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return point.gradients if perturbed is None else perturbed


class FirstOrderFlatness(OwnStepMethod):
    """The step that GAM and C-Flat share: four passes, at w, w + e_0, w + e_1 and w + e_1 + e_2.

    :class:`GradientNormAscent` has the perturbations. A step keeps a copy of w and of three gradients, and the
    perturbation; nothing is kept from step to step. A step without a perturbation is one of the base.
    """

    combination: _UpdateOfTheMethod
    own_rules: ClassVar[tuple[str, ...]] = ("perturbation", "combination")
    why_no_first_step: ClassVar[str] = "it makes four passes"

    def __init__(self, *args: Any, ratio: float, **kwargs: Any) -> None:
        self.refuse_own_rules(kwargs)
        check_positive("ratio", ratio, "rho' / rho, the length of the steps along the gradient by rho")
        perturbation, combination = GradientNormAscent(ratio), _UpdateOfTheMethod()
        super().__init__(*args, perturbation=perturbation, combination=combination, **kwargs)

    @abstractmethod
    def update(self, gradients: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        """Return the update gradient of g_0, g_1, g_2 and g_3, lists of real tensors; they are only read."""

    def reset(self) -> None:
        """Discard the gradients of the step."""
        self._earlier: list[dict[Tensor, Tensor]] = []
        """g_1 and g_2, by parameter."""

    def step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield the four passes of a step."""
        self._earlier = []
        for sam_pass in self.sam_passes(accumulate=accumulate):
            is_final = sam_pass.is_perturbed and sam_pass.is_last
            sam_pass.is_last = True  # the gradient of every pass is in the update
            yield sam_pass
            if sam_pass.is_perturbed and not is_final:
                self._earlier.append(self.gradients.copies())

    def update_gradient(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Return :meth:`update` of the gradients of all passes; g at a step without a perturbation."""
        earlier, self._earlier = self._earlier, []
        if not perturbed:
            return point.gradients
        g_1, g_2 = (
            [
                as_real(by_parameter[p]) if p in by_parameter else torch.zeros_like(g)
                for p, g in zip(point.parameters, perturbed, strict=True)
            ]
            for by_parameter in earlier
        )
        return self.update([point.gradients, g_1, g_2, perturbed])


class GAM(FirstOrderFlatness):
    """GAM: SAM's gradient and the gradient of the largest gradient norm in the neighborhood.

        e_0 = rho' g_0 / |g_0|             g_0 at w,   g_1 at w + e_0
        e_1 = rho h / |h|                  h = g_1 - g_0,   g_2 at w + e_1
        e_2 = rho' g_2 / |g_2|             g_3 at w + e_1 + e_2
        u   = beta1 g_1 + beta3 g_3
        w  <- Base(w, u - gamma v)         v = the part of g_0 + beta2 g_2 orthogonal to u

    A step costs four passes. This is the accelerated form of the authors' code, without Hessian-vector products; the
    step along -v lowers the gradient norms |g_1| - |g_0| and |g_3| - |g_2| as GSAM's does the surrogate gap.

    Args:
        *args: The base optimizer and rho, or the class form, as for :class:`steppe.SAM`; rho is the radius in which
            the largest gradient norm is sought, 0.2 in the authors' code.
        ratio: rho' / rho; rho' = 0.02 in the authors' code.
        beta1: beta1, the weight of g_1.
        beta2: beta2, the weight of g_2 in v.
        beta3: beta3, the weight of g_3.
        gamma: gamma, the weight of v; 0.03 in the authors' code.
        **kwargs: ``model``, ``cadence``, ``replay_rng`` as for :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = GAM(torch.optim.SGD([w], lr=0.1), rho=0.5, ratio=0.2)
        >>> values = []
        >>> for sam_pass in optimizer.passes():
        ...     with sam_pass:
        ...         values.append(round(w.item(), 2))
        ...         w.square().sum().backward()
        >>> values, w.grad  # 2 * 3.1 + 2 * 3.6
        ([3.0, 3.1, 3.5, 3.6], tensor([13.4000]))

    References:
        Zhang et al., Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization, arXiv
        2303.03108.
    """

    paper: ClassVar[Paper] = GAM_PAPER
    beta1: float
    beta2: float
    beta3: float
    gamma: float
    hyperparameters: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "beta3", "gamma")

    def __init__(
        self,
        *args: Any,
        ratio: float = 0.1,
        beta1: float = 1.0,
        beta2: float = 1.0,
        beta3: float = 1.0,
        gamma: float = 0.03,
        **kwargs: Any,
    ) -> None:
        check_nonnegative("beta1", beta1, "the weight of the gradient at w + e_0")
        check_nonnegative("beta2", beta2, "the weight of the gradient at w + e_1")
        check_nonnegative("beta3", beta3, "the weight of the gradient at w + e_1 + e_2")
        check_finite("gamma", gamma, "the weight of the orthogonal part")
        self.beta1, self.beta2, self.beta3, self.gamma = beta1, beta2, beta3, gamma
        super().__init__(*args, ratio=ratio, **kwargs)

    def update(self, gradients: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        """Return u - gamma v."""
        g_0, g_1, g_2, g_3 = gradients
        u = foreach(torch._foreach_mul, g_1, scalar=self.beta1)
        foreach(torch._foreach_add_, u, g_3, alpha=self.beta3)
        v = orthogonal(foreach(torch._foreach_add, g_0, g_2, alpha=self.beta2), u)
        foreach(torch._foreach_add_, u, v, alpha=-self.gamma)
        return u


def gam(
    base_optimizer: Base,
    rho: Rho = 0.2,
    *,
    ratio: float = 0.1,
    beta1: float = 1.0,
    beta2: float = 1.0,
    beta3: float = 1.0,
    gamma: float = 0.03,
    **options: Unpack[Options],
) -> GAM:
    """GAM: minimize the largest gradient norm in the neighborhood, too. Four passes per step.

    w <- Base(w, u - gamma v), u = beta1 g_1 + beta3 g_3, v = the part of g_0 + beta2 g_2 orthogonal to u, with the
    gradients g_0 at w, g_1 at w + rho' g_0 / |g_0|, g_2 at w + e_1, e_1 = rho (g_1 - g_0) / |g_1 - g_0|, and g_3 at
    w + e_1 + rho' g_2 / |g_2|.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius in which the largest gradient norm is sought; 0.2 in the official code.
        ratio: rho' / rho, of the steps along the gradient; rho' = 0.02 in the official code.
        beta1: beta1, the weight of g_1.
        beta2: beta2, the weight of g_2 in v.
        beta3: beta3, the weight of g_3.
        gamma: gamma, the weight of v.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> gam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).gamma
        0.03

    References:
        Zhang et al., Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization, arXiv
        2303.03108.
    """
    weights = {"beta1": beta1, "beta2": beta2, "beta3": beta3, "gamma": gamma}
    return GAM(base_optimizer, rho, ratio=ratio, **weights, **options)


CARD = MethodCard(
    name="gam",
    function=gam,
    label="GAM",
    paper=GAM_PAPER,
    summary="Update with SAM's gradient and the gradient of the largest gradient norm in the neighborhood, first-order "
    "flatness. Both are computed by differences of gradients, in four passes.",
    equation="e_0 = rho' g_0 / |g_0|                        g_0 at w,  g_1 at w + e_0\n"
    "e_1 = rho h / |h|,   h = g_1 - g_0             g_2 at w + e_1\n"
    "e_2 = rho' g_2 / |g_2|                        g_3 at w + e_1 + e_2\n"
    "w <- Base(w, u - gamma v),   u = beta1 g_1 + beta3 g_3,   v = (g_0 + beta2 g_2) orthogonal to u",
    cost="4",
    passes=4,
    memory=f"{COPY}; within a step three gradients and the perturbation",
    when="To measure what first-order flatness adds to SAM.",
    when_not="At equal compute without a measurement: a step costs twice that of SAM.",
    usual={
        "rho": "0.2 (official code)",
        "ratio": "rho' = 0.02 in the official code",
        "beta1": "1 (official code)",
        "beta2": "1 (official code)",
        "beta3": "1 (official code)",
        "gamma": "0.03 (official code)",
    },
    verified="official code, same steps",
    checked="https://github.com/xxgege/GAM: 20 steps in float64 agree. It is the accelerated form, which the authors "
    "released; that with Hessian-vector products is not offered. Its option `adaptive` is not offered, and with "
    "several workers it perturbs each along its own gradient.",
    caveats=(
        "With beta1 = beta3 = 1, the update gradient is about twice as long as SAM's: with SGD, try half the "
        "learning rate.",
        "`first_step()` and `second_step()` are an error.",
    ),
    comparison=Comparison(
        summary="minimizes the largest gradient norm in the neighborhood, too, at 4 times SAM's rho", rho_factor=4.0
    ),
)
