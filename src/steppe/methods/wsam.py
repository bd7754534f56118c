"""WSAM: weighted sharpness, coupled or decoupled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.methods._base import Method
from steppe.methods._card import COPY_AND_G, Comparison, MethodCard
from steppe.methods._options import Options, Rho
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
    """Weigh the sharpness L(w + e) - L(w) against the loss (WSAM, coupled): g + gamma / (1 - gamma) (g_s - g).

    gamma = 0 is the base, 1/2 is SAM, and more looks further for flatness. At a step that did not climb, g.

    This is the paper's algorithm without its "weight decouple", in which the base sees g alone and the sharpness term
    is subtracted after its step; with plain SGD the two are the same. The authors' code decouples by default, and
    clips both gradients to norm 1 by default, which the paper does not.

    >>> at = Point([torch.zeros(1)], [torch.tensor([1.0])], rho=[0.05], base_state=[{}], step=0)
    >>> WeightedSharpness(gamma=0.75)(at, [torch.tensor([2.0])])
    [tensor([4.])]

    Source: Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, arXiv
    2305.15817.
    """

    paper: ClassVar[Paper] = WSAM_PAPER
    needs_unperturbed_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    gamma: float = 0.9
    """gamma, the share of the sharpness, at least 0 and below 1; 0.8 to 0.95 is usual."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise ValueError(
                f"gamma must be at least 0 and less than 1, got {self.gamma}: the sharpness is weighed by "
                f"gamma / (1 - gamma); 0.5 is SAM"
            )

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return point.gradients
        g, g_s = list(point.gradients), list(perturbed)
        sharpness = foreach(torch._foreach_sub, g_s, g)
        foreach(torch._foreach_mul_, sharpness, scalar=self.gamma / (1 - self.gamma))
        foreach(torch._foreach_add_, sharpness, g)
        return sharpness


@dataclass(frozen=True)
class Apart(WeightedSharpness):
    """Give the base g alone, and keep g_s - g apart; a g_s that is not finite is marked in g."""

    sharpness: dict[Tensor, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """g_s - g of the last climb, by parameter; empty after a step that did not climb."""

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Return g."""
        self.sharpness.clear()
        if not perturbed:
            return point.gradients
        g, g_s = list(point.gradients), list(perturbed)
        self.sharpness.update(zip(point.parameters, foreach(torch._foreach_sub, g_s, g), strict=True))
        smallest = min(range(len(g)), key=lambda i: g[i].numel())
        bad = norm(g_s).isfinite().logical_not()
        g[smallest] = g[smallest].masked_fill(bad.to(g[smallest].device), float("nan"))
        return g


class DecoupledWSAM(Method):
    """WSAM with weight decouple: w' = Base(w, g) - lr gamma / (1 - gamma) (g_s - g).

    The base steps with g, so that its momentum and its second moments describe the loss alone; then the gradient of
    the sharpness L(w + e) - L(w) is subtracted, with each group's own current learning rate. gamma = 0 is the base;
    1/2 with plain SGD is SAM, and with plain SGD this is the coupled form, :class:`~steppe.methods.wsam.WeightedSharpness`.
    Two passes a step. It keeps a copy of w, one of g and g_s - g between the passes, and nothing from step to step.

    Between :meth:`passes` and :meth:`step`, ``.grad`` holds g. What changes its length as a whole there, a loss scaler
    or clipping by norm, is done to g_s - g by the same factor.

    Args:
        *args: the base optimizer and rho, or the class form, as :class:`steppe.SAM` takes them.
        gamma: gamma, the share of the sharpness, at least 0 and below 1; the paper recommends 0.8 to 0.95, and the
            authors' code has 0.88. The weight gamma / (1 - gamma) grows fast: 0.9 weighs the sharpness nine times.
        **kwargs: ``model``, ``perturbation``, ``cadence``, ``replay_rng`` as in :class:`steppe.SAM`.

    Raises:
        ValueError: a gamma out of range; a base without a learning rate.

    The authors' code clips g and g_s, each to norm 1, unless told not to; here nothing is clipped, as in the paper.
    It adds 1e-12 to |g|, and with several workers climbs along each worker's own gradient. Its option ``adaptive``
    climbs along w^2 g; ``perturbation=steppe.Adaptive()`` is ASAM's climb.

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

    Source: Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, arXiv
    2305.15817.
    """

    combination: Apart
    paper: ClassVar[Paper] = WSAM_PAPER

    def __init__(self, *args: Any, gamma: float = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, combination=Apart(gamma), **kwargs)
        for index, group in enumerate(self.param_groups):
            if "lr" not in group:
                raise ValueError(
                    f"group {index} of {type(self.base).__name__} has no 'lr', and the sharpness term is subtracted "
                    f"with the group's learning rate: take the coupled form, combination=WeightedSharpness({gamma})"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._sharpness: dict[Tensor, Tensor] = {}
        self._length = torch.zeros(())

    def passes(self, *, accumulate: bool = False) -> Iterator[Pass]:
        """Yield the two passes of a step, as :meth:`steppe.SAM.passes` does; ``.grad`` is g after them."""
        before = {p: s for p, s in self._sharpness.items() if p.grad is not None} if accumulate else {}
        yield from super().passes(accumulate=accumulate)
        self._keep_apart(before)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what was kept apart from them."""
        super().zero_grad(set_to_none)
        self._sharpness = {}

    def _finish_classic(self) -> None:
        super()._finish_classic()
        self._keep_apart({})

    @torch.no_grad()
    def _keep_apart(self, before: dict[Tensor, Tensor]) -> None:
        now = self.combination.sharpness
        self._sharpness = before | {p: s + before[p] if p in before else s for p, s in now.items()}
        self._length = norm(self._engine.gradients.of(self._sharpness))
        now.clear()

    @torch.no_grad()
    def _base_step(self) -> bool:
        sharpness, self._sharpness = self._sharpness, {}
        sharpness = {p: s for p, s in sharpness.items() if p.grad is not None}
        length = norm(self._engine.gradients.of(sharpness))
        finite = length.isfinite()
        went = super()._base_step()
        if not (went and sharpness and self.combination.gamma):
            return went
        factor = torch.where(finite, length * reciprocal(self._length), 0.0)
        factor = torch.where((length == self._length), 1.0, factor)  # also where both are 0
        weight = self.combination.gamma / (1 - self.combination.gamma)
        for group in self.param_groups:
            members = [p for p in dict.fromkeys(group["params"]) if p in sharpness]
            terms = [sharpness[p] for p in members]
            if not finite.is_cpu:  # the host does not know whether the base has stepped
                terms = [s.masked_fill(finite.logical_not().to(s.device), 0.0) for s in terms]
            sign = 1 if group.get("maximize", False) else -1
            add_scaled_([as_real(p) for p in members], sign * group["lr"] * weight * factor, terms)
        return went


def wsam(
    base_optimizer: Optimizer,
    rho: Rho = 0.05,
    *,
    gamma: float = 0.9,
    decoupled: bool = False,
    **options: Unpack[Options],
) -> SAM:
    """WSAM: go down with g + gamma / (1 - gamma) (g_s - g). Two passes a step.

    ``decoupled`` is the paper's weight decouple: the base sees g alone, and the sharpness term acts after its step, as
    AdamW's weight decay does. The two differ around a base that does more than subtract lr times its gradient.

    Source: Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, arXiv
    2305.15817.
    """
    if decoupled:
        return DecoupledWSAM(base_optimizer, rho, gamma=gamma, **options)
    return SAM(base_optimizer, rho, **options, combination=WeightedSharpness(gamma))


CARD = MethodCard(
    name="wsam",
    function=wsam,
    label="WSAM",
    about="The sharpness becomes a regularizer with a weight: gamma = 0 is the base, 1/2 is SAM.",
    equation="e = rho g / |g|\n"
    "w <- Base(w, g + gamma / (1 - gamma) (g_s - g))\n"
    "w <- Base(w, g) - lr gamma / (1 - gamma) (g_s - g)        with decoupled=True",
    cost="2",
    passes=2,
    memory=COPY_AND_G,
    when="To weigh flatness against the loss; decoupled=True around Adam and AdamW, as for weight decay.",
    when_not="With a large gamma untried: 0.9 weighs the sharpness nine times.",
    usual={
        "rho": "unverified",
        "gamma": "0.8 to 0.95; 0.88 in the authors' code",
        "decoupled": "True in the authors' code",
    },
    checked="Decoupled: the official code (WeightedSAM of https://github.com/intelligent-machine-learning/atorch), "
    "20 steps in float64 agree. Theirs clips both gradients to norm 1 by default, which the paper does not; it "
    "adds 1e-12 to the norm, and with several workers climbs along each worker's own gradient.",
    caveats=("Coupled and decoupled differ around a base that does more than subtract lr times its gradient.",),
    comparison=Comparison(summary="goes down SAM's gradient and beyond, at SAM's rho", capturable=True),
)
