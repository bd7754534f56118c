"""WSAM: the sharpness as a regularizer with a weight, coupled or decoupled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_below_one
from steppe._engine.gradients import skip_unless, smallest
from steppe.methods._base import OwnStepMethod
from steppe.methods._card import COPY_AND_G, SEARCHED, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import Paper
from steppe.rules import Point
from steppe.rules.ops import add_scaled_, as_real, foreach, norm, reciprocal
from steppe.sam import SAM, Pass

WSAM_PAPER = Paper(
    "yue2023wsam",
    ("Yun Yue", "Jiadi Jiang", "Zhiling Ye", "Ning Gao", "Yongchao Liu", "Ke Zhang"),
    "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term",
    "2305.15817",
    2023,
    "ACM SIGKDD Conference on Knowledge Discovery and Data Mining (KDD)",
)


@dataclass(frozen=True)
class WeightedSharpness:
    """Weight the sharpness L(w + e) - L(w) against the loss (WSAM, coupled): g + gamma / (1 - gamma) (g_s - g).

    gamma = 0 is the base, 1/2 is SAM, and more favors flatness. At a step without a perturbation, g.

    This is the paper's algorithm without its "weight decouple", in which the base gets g alone and the sharpness term
    is subtracted after its step; with plain SGD the two are the same. The authors' code decouples by default.

    Args:
        gamma: gamma, the weight of the sharpness, at least 0 and below 1.

    Raises:
        ValueError: gamma out of range.

    Example:
        >>> point = Point([torch.zeros(1)], [torch.tensor([1.0])], rho=[0.05], base_state=[{}], step=0)
        >>> WeightedSharpness(gamma=0.75)(point, [torch.tensor([2.0])])
        [tensor([4.])]

    References:
        Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, arXiv
        2305.15817.
    """

    paper: ClassVar[Paper] = WSAM_PAPER
    needs_unperturbed_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    gamma: float = 0.9
    """gamma, the weight of the sharpness, at least 0 and below 1; 0.8 to 0.95 is usual."""

    def __post_init__(self) -> None:
        meaning = "the weight of the sharpness, whose factor is gamma / (1 - gamma); 0.5 is SAM"
        check_below_one("gamma", self.gamma, meaning)

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return point.gradients
        g, g_s = list(point.gradients), list(perturbed)
        sharpness = foreach(torch._foreach_sub, g_s, g)
        foreach(torch._foreach_mul_, sharpness, scalar=self.gamma / (1 - self.gamma))
        foreach(torch._foreach_add_, sharpness, g)
        return sharpness


@dataclass(frozen=True)
class UnperturbedIfFinite(WeightedSharpness):
    """Return g as the update gradient (WSAM, decoupled), with a NaN in it if g_s is not finite, to skip the step."""

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return point.gradients
        g, g_s = list(point.gradients), list(perturbed)
        index = smallest(g)
        if index is not None:
            g[index] = g[index].clone()
            skip_unless(norm(g_s).isfinite(), [g[index]])
        return g


class DecoupledWSAM(OwnStepMethod):
    """WSAM with weight decouple: w' = Base(w, g) - lr gamma / (1 - gamma) (g_s - g).

    The base steps with g, so that its momentum and its second moments describe the loss alone. Then the gradient of
    the sharpness L(w + e) - L(w) is subtracted, with each group's current learning rate. gamma = 0 is the base; 1/2
    with plain SGD is SAM; and any gamma with plain SGD is the coupled form,
    :class:`~steppe.methods.wsam.WeightedSharpness`. Two passes a step. It keeps a copy of w, and within a step g and
    g_s - g; nothing from step to step.

    Between :meth:`passes` and :meth:`step`, ``.grad`` holds g. A change of its length as a whole, by a loss scaler or
    by clipping by norm, is applied to g_s - g by the same factor.

    Args:
        *args: The base optimizer and rho, or the class form, as for :class:`steppe.SAM`.
        gamma: gamma, the weight of the sharpness, at least 0 and below 1; the paper recommends 0.8 to 0.95, and the
            authors' code has 0.9. The factor gamma / (1 - gamma) grows fast: it is nine for 0.9.
        **kwargs: ``model``, ``perturbation``, ``cadence``, ``replay_rng`` as for :class:`steppe.SAM`.

    Raises:
        ValueError: A gamma out of range; a base without a learning rate.

    Nothing is clipped, as in the paper and the authors' repository; a copy of their code clips g and g_s to norm 1.
    Theirs adds 1e-12 to |g|, and with several workers perturbs along each worker's own gradient. Its option
    ``adaptive`` perturbs along w^2 g; for ASAM's perturbation, use ``perturbation=steppe.Adaptive()`` here.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DecoupledWSAM(torch.optim.SGD([w], lr=0.1), rho=0.5, gamma=0.75)
        >>> for sam_pass in optimizer.passes():
        ...     with sam_pass:
        ...         w.square().sum().backward()
        >>> w.grad
        tensor([2.])
        >>> optimizer.step()
        >>> w  # 1 - 0.1 * 2 - 0.1 * 3 * (3 - 2)
        Parameter containing:
        tensor([0.5000], requires_grad=True)

    References:
        Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, arXiv
        2305.15817.
    """

    combination: UnperturbedIfFinite
    paper: ClassVar[Paper] = WSAM_PAPER

    own_rules: ClassVar[tuple[str, ...]] = ("combination",)

    def __init__(self, *args: Any, gamma: float = 0.9, **kwargs: Any) -> None:
        self.refuse_own_rules(kwargs)
        super().__init__(*args, combination=UnperturbedIfFinite(gamma), **kwargs)
        for index, group in enumerate(self.param_groups):
            if "lr" not in group:
                raise ValueError(
                    f"group {index} of {type(self.base).__name__} has no 'lr', and the sharpness term is subtracted "
                    f"with the group's learning rate. Take the coupled form, combination=WeightedSharpness({gamma})"
                )

    def reset(self) -> None:
        """Discard the sharpness term."""
        self._latest: dict[Tensor, Tensor] = {}
        """g_s - g of the last perturbation, by parameter; empty after a step without one."""
        self._sharpness: dict[Tensor, Tensor] = {}
        """g_s - g of the step, summed over its micro-batches."""
        self._length = torch.zeros(())
        """Norm of .grad when the passes were over, over the parameters of the sharpness term."""

    def step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield SAM's two passes; ``.grad`` is g after them."""
        before = {p: s for p, s in self._sharpness.items() if p.grad is not None} if accumulate else {}
        yield from self.sam_passes(accumulate=accumulate)
        self._keep_sharpness(before)

    def after_classic_passes(self) -> None:
        """Save the sharpness term."""
        self._keep_sharpness({})

    def update_gradient(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Return g, and save g_s - g."""
        self._latest = {}
        if perturbed:
            differences = foreach(torch._foreach_sub, list(perturbed), list(point.gradients))
            self._latest = dict(zip(point.parameters, differences, strict=True))
        return super().update_gradient(point, perturbed)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and the sharpness term."""
        super().zero_grad(set_to_none)
        self._sharpness = {}

    @torch.no_grad()
    def _keep_sharpness(self, before: dict[Tensor, Tensor]) -> None:
        """Add the sharpness term of these passes to that of earlier micro-batches."""
        latest, self._latest = self._latest, {}
        self._sharpness = before | {p: s + before[p] if p in before else s for p, s in latest.items()}
        self._length = norm(self.gradients.views(self._sharpness))

    @torch.no_grad()
    def step_base(self) -> bool:
        """Step the base with g, then subtract the sharpness term."""
        sharpness, self._sharpness = self._sharpness, {}
        sharpness = {p: s for p, s in sharpness.items() if p.grad is not None}
        length = norm(self.gradients.views(sharpness))
        finite = length.isfinite()
        stepped = self.step_base_once()
        if not (stepped and sharpness and self.combination.gamma):
            return stepped
        factor = torch.where(finite, length * reciprocal(self._length), 0.0)
        factor = torch.where((length == self._length), 1.0, factor)  # also where both are 0
        weight = self.combination.gamma / (1 - self.combination.gamma)
        for group in self.param_groups:
            parameters = [p for p in dict.fromkeys(group["params"]) if p in sharpness]
            terms = [sharpness[p] for p in parameters]
            if not finite.is_cpu:  # on an accelerator the host does not know if the base has stepped
                terms = [s.masked_fill(finite.logical_not().to(s.device), 0.0) for s in terms]
            sign = 1 if group.get("maximize", False) else -1
            add_scaled_([as_real(p) for p in parameters], sign * group["lr"] * weight * factor, terms)
        return stepped


def wsam(
    base_optimizer: Base,
    rho: Rho = 0.05,
    *,
    gamma: float = 0.9,
    decoupled: bool = False,
    **options: Unpack[Options],
) -> SAM:
    """WSAM: weight the sharpness against the loss. Two passes per step.

    w <- Base(w, g + gamma / (1 - gamma) (g_s - g)).

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; the paper's values are unverified.
        gamma: gamma, the share of the sharpness; usually 0.8 to 0.95. 0 is the base, and 1/2 is SAM.
        decoupled: True for the paper's weight decouple: the base gets g alone, and the sharpness term acts after its
            step, as AdamW's weight decay does. This differs from the coupled form around a base that does more than
            subtract lr times its gradient.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: gamma is out of range, or ``decoupled`` is used around a base without a learning rate.

    Example:
        >>> wsam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).combination
        WeightedSharpness(gamma=0.9)

    References:
        Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, arXiv
        2305.15817.
    """
    if decoupled:
        return DecoupledWSAM(base_optimizer, rho, gamma=gamma, **options)
    return SAM(base_optimizer, rho, **options, combination=WeightedSharpness(gamma))


CARD = MethodCard(
    name="wsam",
    function=wsam,
    label="WSAM",
    paper=WSAM_PAPER,
    summary="Weight the sharpness L(w + e) - L(w) against the loss. The sharpness becomes a regularizer with a weight: "
    "gamma = 0 is the base, 1/2 is SAM.",
    equation="e = rho g / |g|\n"
    "w <- Base(w, g + gamma / (1 - gamma) (g_s - g))\n"
    "w <- Base(w, g) - lr gamma / (1 - gamma) (g_s - g)        with decoupled=True",
    cost="2",
    passes=2,
    memory=COPY_AND_G,
    when="To weight flatness against the loss; decoupled=True around Adam and AdamW, as for weight decay.",
    when_not="With a large gamma that was not tuned: at 0.9 the sharpness has nine times the weight of the loss.",
    usual={
        "rho": "unverified",
        "gamma": "0.8 to 0.95; 0.9 in the authors' code",
        "decoupled": "True in the authors' code",
    },
    verified="official code, same steps",
    checked="WeightedSAM of https://github.com/intelligent-machine-learning/atorch, which is decoupled: 20 steps in "
    "float64 agree. It adds 1e-12 to the norm, and with several workers perturbs along each worker's own gradient. "
    "One published copy has gamma = 0.88 and clips both gradients to norm 1; the repository and the paper do not.",
    caveats=("Coupled and decoupled differ around a base that does more than subtract lr times its gradient.",),
    comparison=Comparison(
        summary=f"weights the sharpness against the loss, at rho / 10 ({SEARCHED})", rho_factor=0.1, capturable=True
    ),
)
