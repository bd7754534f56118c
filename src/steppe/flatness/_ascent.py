"""Maximize the loss over a ball around the weights by projected gradient ascent."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from steppe._checks import check_nonnegative, check_positive
from steppe._tensors import reductions
from steppe.flatness.objective import Objective

Norm: TypeAlias = Literal["l2", "linf"]

_LONGEST = 1e6  # longest step, in radii; the projection of a longer step is that of an infinite one
_SHRINKAGE = (0.01, 0.5)  # bounds of the factor by which a step to a lower loss is shortened


def perturbation_scale(objective: Objective, adaptive: bool, eta: float) -> Tensor | float:
    """Return the diagonal T of the metric: 1, or |w| + eta, (n,), if adaptive.

    Raises:
        ValueError: eta is negative or not finite, or nonzero without ``adaptive``.
    """
    check_nonnegative("eta", eta, "added to |w| in T = |w| + eta")
    if eta and not adaptive:
        raise ValueError(
            f"eta={eta} has no effect with adaptive=False, where T = 1: leave it out, or pass adaptive=True"
        )
    return objective.weights.abs() + eta if adaptive else 1.0


def finite_loss(loss: Tensor) -> float:
    """Return L(w) as a float.

    Raises:
        FloatingPointError: It is not finite.
    """
    value = float(loss)
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The loss at the weights themselves is {value}, so an increase over it is undefined: the run has "
            "diverged, the data contain values that are not finite, or the loss ignores all labels"
        )
    return value


def loss_increase(loss: Tensor, reference: float) -> float:
    """Return L(w + e) - L(w); it may be infinite.

    Raises:
        FloatingPointError: L(w + e) is NaN.
    """
    value = float(loss)
    if math.isnan(value):
        raise FloatingPointError(
            "The loss is NaN at a perturbed point, so no maximum or mean over the neighborhood exists: take a smaller "
            "rho or sigma, or compute in Objective(dtype=torch.float64) if the loss only overflows"
        )
    return value - reference


@contextmanager
def naming_part(part: Objective) -> Iterator[None]:
    """Say in the error for a loss that is not finite which part of the data it is that of."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"In a part of {part.rows} samples: {error}. A loss that ignores some labels (-100 in F.cross_entropy) is "
            "NaN for a part without others: choose a larger m, or pass size=, batch -> number of labels that count, "
            "which leaves such parts out"
        ) from error


@dataclass(frozen=True)
class Ball:
    """The ball |z| <= rho in the L2 or L-infinity norm."""

    rho: float
    norm: Norm

    def __post_init__(self) -> None:
        check_positive("rho", self.rho, "the radius of the ball")
        if self.norm not in ("l2", "linf"):
            raise ValueError(f"norm={self.norm!r}: choose 'l2' or 'linf'")

    def length(self, z: Tensor) -> float:
        """Return |z|."""
        return float(reductions.norm([z]) if self.norm == "l2" else z.abs().max())

    def dual_norm(self, g: Tensor) -> float:
        """Return the maximum of g'z over |z| <= 1."""
        return float(reductions.norm([g]) if self.norm == "l2" else g.abs().sum(dtype=reductions.accumulator(g.device)))

    def linear_maximizer(self, g: Tensor) -> Tensor:
        """Return the point of the ball that maximizes g'z; 0 for g = 0."""
        if self.norm == "linf":
            return g.sign() * self.rho
        length = self.length(g)
        return g * (self.rho / length) if length > 0 else torch.zeros_like(g)

    def project(self, z: Tensor) -> Tensor:
        """Return the nearest point of the ball."""
        if self.norm == "linf":
            return z.clamp(-self.rho, self.rho)
        length = self.length(z)
        return z * (self.rho / length) if length > self.rho else z


class Candidate(NamedTuple):
    """A perturbation z = T^-1 e, (n,), with the loss increase L(w + T z) - L(w)."""

    increase: float
    z: Tensor


def best(candidates: Iterable[Candidate]) -> Candidate:
    """Return the candidate with the largest loss increase; the first of equal ones."""
    return max(candidates, key=lambda candidate: candidate.increase)


class PerturbedLoss:
    """The loss increase L(w + T z) - L(w) as a function of z, (n,); ``loss`` is L(w)."""

    def __init__(self, objective: Objective, T: Tensor | float, loss: float) -> None:
        self._objective, self._T, self.loss = objective, T, loss

    def evaluate(self, z: Tensor) -> Candidate:
        """Return z with its loss increase, in one pass without a gradient."""
        return Candidate(loss_increase(self._objective.loss(self._T * z), self.loss), z)

    def evaluate_with_gradient(self, z: Tensor) -> tuple[Candidate, Tensor]:
        """Return z with its loss increase, and the gradient T g of the increase at z, (n,)."""
        loss, gradient = self._objective.gradient(self._T * z)
        candidate = Candidate(loss_increase(loss, self.loss), z)
        return candidate, self.checked_gradient(self._T * gradient, candidate.increase)

    def checked_gradient(self, g: Tensor, increase: float) -> Tensor:
        """Return the gradient.

        Raises:
            FloatingPointError: The gradient is not finite at a finite loss. At an infinite loss the ascent ends, so
                that no gradient is needed.
        """
        if increase < math.inf and not g.isfinite().all():
            raise FloatingPointError(
                "The gradient is not finite where the loss is finite, so there is no direction of ascent: compute in "
                "Objective(dtype=torch.float64) if it only overflows, or else look for an operation that has no "
                "derivative there, such as sqrt or norm at 0"
            )
        return g


def ascend(
    perturbed: PerturbedLoss, ball: Ball, current: Candidate, g: Tensor, ascent_steps: int
) -> Iterator[Candidate]:
    """Ascend from a candidate with gradient g by projected gradient steps, and yield each candidate as it is evaluated.

    The step length is that of Barzilai and Borwein, for which single steps must be allowed to lower the loss. So a step
    is shortened only if its loss is below that at the start of the ascent, to the maximum of the parabola through both
    ends of the step.
    """
    start, d = current.increase, ball.linear_maximizer(g) - current.z
    for steps_left in reversed(range(ascent_steps)):
        slope = _dot(g, d)
        if current.increase == math.inf or not slope > 0:
            return
        if steps_left == 0:
            yield perturbed.evaluate(current.z + d)
            return
        candidate, g_new = perturbed.evaluate_with_gradient(current.z + d)
        yield candidate
        if candidate.increase < start:
            maximum = slope / (2 * (slope - (candidate.increase - current.increase)))
            d = d * min(max(maximum, _SHRINKAGE[0]), _SHRINKAGE[1])
        else:
            curvature = _dot(d, g_new - g)
            current, g = candidate, g_new
            if _dot(d, d) * float(reductions.norm([g])) >= -curvature * _LONGEST * ball.rho:
                d = ball.linear_maximizer(g) - current.z
            else:
                d = ball.project(current.z + g * (_dot(d, d) / -curvature)) - current.z


def _dot(x: Tensor, y: Tensor) -> float:
    return float(reductions.dot([x], [y]))
