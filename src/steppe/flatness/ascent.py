"""The highest place in a ball: projected ascent of the loss, as a function of a displacement."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from steppe._tensors import ops as tensors
from steppe.flatness.objective import Objective

Norm: TypeAlias = Literal["l2", "linf"]

_FAR = 1e6  # radii; a step this long ends where an infinite one does
_SHORTER = (0.01, 0.5)  # what may be left of a step that led down


def metric(objective: Objective, adaptive: bool, eta: float) -> Tensor | float:
    """Return T, what a displacement of length 1 is in each coordinate: 1, or |w| + eta (n,).

    Raises:
        ValueError: eta is negative or not finite, or is given and not used.
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be finite and not negative, got {eta}: it is added to |w| in T = |w| + eta")
    if eta and not adaptive:
        raise ValueError(f"eta={eta} has no effect with adaptive=False, where T = 1: leave it out, or ask for adaptive")
    return objective.weights.abs() + eta if adaptive else 1.0


def finite(loss: Tensor) -> float:
    """Return L(w), where it is finite, so that other losses can be compared with it."""
    value = float(loss)
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The loss at the weights themselves is {value}, so how much higher it is near them has no meaning: the "
            "run has diverged, or the data hold what is not finite"
        )
    return value


def rise(loss: Tensor, over: float) -> float:
    """Return L(w + e) - L(w); it may be infinite, but not NaN."""
    value = float(loss)
    if math.isnan(value):
        raise FloatingPointError(
            "The loss is NaN at a place near the weights, so nobody can say how high it is there: measure nearer to "
            "them (a smaller rho or sigma), or in Objective(dtype=torch.float64) if it only overflows"
        )
    return value - over


@dataclass(frozen=True)
class Ball:
    """|z| <= rho."""

    rho: float
    norm: Norm

    def __post_init__(self) -> None:
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho must be positive and finite, got {self.rho}: it is the radius of the ball")
        if self.norm not in ("l2", "linf"):
            raise ValueError(f"norm={self.norm!r}: choose 'l2' or 'linf'")

    def length(self, z: Tensor) -> float:
        """|z|."""
        return float(tensors.norm([z]) if self.norm == "l2" else z.abs().max())

    def dual(self, g: Tensor) -> float:
        """The largest g'z over all z of length 1."""
        return float(tensors.norm([g]) if self.norm == "l2" else g.abs().sum(dtype=tensors.accumulator(g.device)))

    def furthest(self, g: Tensor) -> Tensor:
        """The point with the largest g'z."""
        if self.norm == "linf":
            return g.sign() * self.rho
        length = self.length(g)
        return g * (self.rho / length) if length > 0 else torch.zeros_like(g)

    def project(self, z: Tensor) -> Tensor:
        """The nearest point of the ball."""
        if self.norm == "linf":
            return z.clamp(-self.rho, self.rho)
        length = self.length(z)
        return z * (self.rho / length) if length > self.rho else z


class Seen(NamedTuple):
    """How much higher the loss is at a place."""

    rise: float
    z: Tensor


def highest(places: Iterable[Seen]) -> Seen:
    """Return the best of them; of equals, the first."""
    return max(places, key=lambda seen: seen.rise)


class Surface:
    """The loss as a function of z = T^-1 e, over what it is at z = 0."""

    def __init__(self, objective: Objective, T: Tensor | float, loss: float) -> None:
        self._objective, self._T, self.loss = objective, T, loss

    def height(self, z: Tensor) -> Seen:
        """How high it is there."""
        return Seen(rise(self._objective.loss(self._T * z), self.loss), z)

    def __call__(self, z: Tensor) -> tuple[Seen, Tensor]:
        """How high it is there, and the gradient by z."""
        loss, gradient = self._objective.gradient(self._T * z)
        seen = Seen(rise(loss, self.loss), z)
        return seen, self.upward(self._T * gradient, seen.rise)

    def upward(self, g: Tensor, height: float) -> Tensor:
        """The gradient, which must say where upward is, unless one can ascend no higher."""
        if height < math.inf and not g.isfinite().all():
            raise FloatingPointError(
                "The gradient has an entry that is not finite where the loss is finite, so no way leads upward: "
                "measure in Objective(dtype=torch.float64) if it only overflows; else look for an operation without "
                "a derivative there, such as sqrt or norm at 0"
            )
        return g


def ascend(surface: Surface, ball: Ball, at: Seen, g: Tensor, steps: int) -> Iterator[Seen]:
    """Climb from a place with gradient g, and yield every place that is looked at, as it comes.

    A step may lead down, which Barzilai and Borwein's length needs, but not below where the ascend began: then it is
    shortened, to the top of the parabola through its ends.
    """
    start, d = at.rise, ball.furthest(g) - at.z
    for left in reversed(range(steps)):
        slope = _dot(g, d)
        if at.rise == math.inf or not slope > 0:
            return
        if left == 0:
            yield surface.height(at.z + d)
            return
        seen, g_there = surface(at.z + d)
        yield seen
        if seen.rise < start:
            top = slope / (2 * (slope - (seen.rise - at.rise)))
            d = d * min(max(top, _SHORTER[0]), _SHORTER[1])
        else:
            bend = _dot(d, g_there - g)
            at, g = seen, g_there
            if _dot(d, d) * float(tensors.norm([g])) >= -bend * _FAR * ball.rho:
                d = ball.furthest(g) - at.z
            else:
                d = ball.project(at.z + g * (_dot(d, d) / -bend)) - at.z


def _dot(x: Tensor, y: Tensor) -> float:
    return float(tensors.dot([x], [y]))
