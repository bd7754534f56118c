"""Several ascent steps: any perturbation, repeated."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe import papers
from steppe.papers import Paper
from steppe.rules.l2 import L2
from steppe.rules.ops import add_scaled_, norm, reciprocal
from steppe.rules.protocols import Perturbation, Point, ScaledDirection, ascent_steps, needs_gradient


@dataclass(frozen=True)
class AscentSteps:
    """Climb K times, each time along the rule at the point reached: e_k = P(e_{k-1} + alpha rho d(g(w + e_{k-1}))).

    d is the rule's climb for rho = 1, and P the projection onto the ball |e| <= rho. A step that climbs costs 1 + K
    passes, and keeps one more copy of the weights' size between them. With the usual alpha = 1/K the sum never leaves
    the ball, in the rule's own norm whichever that is, and nothing is projected. A longer alpha needs the projection,
    which is known for :class:`~steppe.L2`.

    A rule with a memory remembers at each of the K climbs; what it reads of the weights is w.

    >>> import steppe
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    >>> optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.2, perturbation=AscentSteps(steppe.L2(), k=2))
    >>> seen = []
    >>> for sam_pass in optimizer.passes():
    ...     with sam_pass:
    ...         seen.append(round(w[0].item(), 2))
    ...         w.square().sum().backward()
    >>> seen
    [1.0, 1.1, 1.2]

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412, whose
    appendix compares several steps of the inner maximization with one.
    """

    paper: ClassVar[Paper] = papers.SAM

    rule: Perturbation
    """The perturbation to repeat."""
    k: int = 2
    """K, the number of climbs; 1 with the usual alpha is the rule itself."""
    alpha: float | None = None
    """alpha, the length of one climb in units of rho; 1/K if not given."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be 1 or more, got {self.k}: it is the number of climbs in a step")
        if not needs_gradient(self.rule):
            raise ValueError(
                f"{self.rule} does not look at the gradient, so that further passes would change nothing: climb once"
            )
        if ascent_steps(self.rule) > 1:
            raise ValueError(f"{self.rule} climbs {ascent_steps(self.rule)} times a step already: give its k instead")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be finite and more than 0, got {self.alpha}: it is the length of one climb")
        if self._projects and not isinstance(self.rule, L2):
            raise ValueError(
                f"alpha={self.alpha} may leave the ball of radius rho, and the projection back is known for L2 alone, "
                f"not for {self.rule}: take alpha up to 1/k = {1 / self.k:g}"
            )

    @property
    def ascent_steps(self) -> int:
        """How many climbs a step makes."""
        return self.k

    @property
    def _projects(self) -> bool:
        return self.alpha is not None and self.alpha * self.k > 1

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the whole climb from w, in units of rho."""
        direction, scale = self.rule(point)
        before = point.ascent_so_far.direction if point.ascent_so_far is not None else [None] * len(direction)
        e = [
            None if d is None else torch.zeros_like(d) if old is None else old.clone()
            for d, old in zip(direction, before, strict=True)
        ]
        length = (1 / self.k if self.alpha is None else self.alpha) * scale
        members = [(t, d) for t, d in zip(e, direction, strict=True) if t is not None and d is not None]
        moved = [t for t, _ in members]
        alpha = length if isinstance(length, Tensor) else point.gradient_norm.new_full((), length)
        add_scaled_(moved, alpha, [d for _, d in members])
        if self._projects:
            inside = reciprocal(norm(moved)).clamp(max=1.0)
            for t in moved:
                t.mul_(inside.to(t.device))
        return ScaledDirection(e)
