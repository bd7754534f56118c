"""Several ascent steps: any perturbation, repeated."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe import papers
from steppe._checks import check_count, check_positive
from steppe.papers import Paper
from steppe.rules.l2 import L2
from steppe.rules.modifier import Modifier
from steppe.rules.ops import add_scaled_, norm, reciprocal
from steppe.rules.protocols import Perturbation, Point, ScaledDirection, ascent_steps, needs_gradient


@dataclass(frozen=True)
class AscentSteps(Modifier):
    """Make K ascent steps, each along the rule at the point reached: e_k = P(e_{k-1} + alpha rho d(g(w + e_{k-1}))).

    d is the rule's perturbation for rho = 1, and P the projection onto the ball |e| <= rho. A perturbed step costs
    1 + K passes, and keeps one more copy of the weights' size between them. With the usual alpha = 1/K the sum never
    leaves the ball, in whatever norm the rule has, and nothing is projected. A longer alpha needs the projection,
    which is implemented for :class:`~steppe.L2`.

    A rule with a memory updates it at each of the K ascent steps; the weights that it reads are those at w.

    Raises:
        ValueError: A hyperparameter out of range, or a rule that does not use the gradient, makes several ascent
            steps itself, or has no known projection.

    Example:
        >>> import steppe
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> rule = AscentSteps(steppe.L2(), ascent_steps=2)
        >>> optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.2, perturbation=rule)
        >>> values = []
        >>> for sam_pass in optimizer.passes():
        ...     with sam_pass:
        ...         values.append(round(w[0].item(), 2))
        ...         w.square().sum().backward()
        >>> values
        [1.0, 1.1, 1.2]

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412; the
        appendix compares several steps of the inner maximization with one.
    """

    paper: ClassVar[Paper] = papers.SAM
    averages_memory: ClassVar[bool] = False  # the rule updates its memory at each ascent step, at points of its own

    rule: Perturbation
    """The perturbation to repeat."""
    ascent_steps: int = 2
    """K, the number of ascent steps; 1 with the usual alpha is the rule itself."""
    alpha: float | None = None
    """alpha, the length of one ascent step in units of rho; None is 1/K."""

    def __post_init__(self) -> None:
        check_count("ascent_steps", self.ascent_steps, "the number of ascent steps in one optimizer step")
        if not needs_gradient(self.rule):
            raise ValueError(
                f"{self.rule} does not use the gradient, so further passes would change nothing: make one ascent step"
            )
        if ascent_steps(self.rule) > 1:
            raise ValueError(
                f"{self.rule} already makes {ascent_steps(self.rule)} ascent steps: set its own ascent_steps instead"
            )
        if self.alpha is not None:
            check_positive("alpha", self.alpha, "the length of one ascent step in units of rho")
        if self._projects and not isinstance(self.rule, L2):
            raise ValueError(
                f"alpha={self.alpha} may leave the ball of radius rho, and the projection is known for L2 only, not "
                f"for {self.rule}: use an alpha of at most 1/ascent_steps = {1 / self.ascent_steps:g}"
            )

    @property
    def _projects(self) -> bool:
        return self.alpha is not None and self.alpha * self.ascent_steps > 1

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the whole perturbation from w, in units of rho."""
        direction, scale = self.rule(point)
        length = (1 / self.ascent_steps if self.alpha is None else self.alpha) * scale
        e = extended_ascent(point, ScaledDirection(direction, length))
        if self._projects:
            moved = [t for t in e if t is not None]
            inside = reciprocal(norm(moved)).clamp(max=1.0)
            for t in moved:
                t.mul_(inside.to(t.device))
        return ScaledDirection(e)


def extended_ascent(point: Point, ascent_step: ScaledDirection) -> list[Tensor | None]:
    """Return the sum of the ascent so far and one more ascent step, in new tensors; None where nothing is perturbed."""
    direction, length = ascent_step
    before = point.ascent_so_far.direction if point.ascent_so_far is not None else [None] * len(direction)
    e = [
        None if d is None else torch.zeros_like(d) if old is None else old.clone()
        for d, old in zip(direction, before, strict=True)
    ]
    alpha = length if isinstance(length, Tensor) else point.gradient_norm.new_full((), length)
    add_scaled_([t for t in e if t is not None], alpha, [d for d in direction if d is not None])
    return e
