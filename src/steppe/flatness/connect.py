"""A curve of low loss between two solutions: whether they lie in one valley."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steppe._tensors import random as random_tensors
from steppe._tensors.ops import dot
from steppe.flatness.directions import Other, Solution, here, solution
from steppe.flatness.landscape import Line, along, estimating, mixed
from steppe.flatness.objective import Objective


@dataclass(frozen=True, eq=False)
class Curve:
    """The quadratic Bezier curve phi(t) = (1-t)^2 w + 2t(1-t) theta + t^2 w' between two solutions w and w'."""

    objective: Objective
    start: Solution
    """w, with its buffers."""
    bend: Tensor
    """theta, (n,)."""
    end: Solution
    """w', with its buffers."""

    def __call__(self, t: float) -> Tensor:
        """Return phi(t), (n,); at 0 and 1 the ends, to the bit."""
        to_bend, from_bend = torch.lerp(self.start.weights, self.bend, t), torch.lerp(self.bend, self.end.weights, t)
        return torch.lerp(to_bend, from_bend, t)

    def losses(self, points: int = 21, *, statistics: bool = True) -> Line:
        """Measure the loss along the curve, at evenly spaced t, as :func:`interpolation` does along the line.

        BatchNorm's statistics are estimated anew at each point, the ends included, as in the paper.
        """
        if points < 2:
            raise ValueError(f"points={points}: a curve needs its two ends")
        axis = torch.arange(points, dtype=torch.float64) / (points - 1)

        def way(t: float) -> Solution:
            return Solution(self(t), mixed(self.start, self.end, t).buffers)

        self.objective.stage = "curve"
        return along(self.objective, way, axis, statistics=estimating(self.objective, self.end, statistics))

    @cached_property
    def barrier(self) -> float:
        """That of :meth:`losses` at 21 points, measured when it is first asked for."""
        return self.losses().barrier

    @property
    def length(self) -> float:
        """How long the way is: the integral of |phi'(t)| from 0 to 1, no less than |w' - w|."""
        u, v = self.bend - self.start.weights, self.end.weights - self.bend
        uu, uv, vv = (float(dot([x], [y])) for x, y in ((u, u), (u, v), (v, v)))
        t = torch.linspace(0, 1, 10_001, dtype=torch.float64)
        squared = (1 - t) ** 2 * uu + 2 * t * (1 - t) * uv + t**2 * vv
        return float(torch.trapezoid(2 * squared.clamp_min(0).sqrt(), t))


def connect(objective: Objective, other: Other, *, steps: int = 1000, lr: float = 0.01, seed: int = 0) -> Curve:
    """Bend a curve between two solutions until the loss along it is low: min over theta of E_t L(phi(t)), t uniform.

    Two networks that were trained apart have a high loss between them on the straight line, and often a low one on
    such a curve. The bend starts in the middle of the line, and is trained by Adam, with a learning rate that falls
    linearly to 0; a step draws one t, and takes one batch of the data, in turn. Meanwhile BatchNorm normalizes with the
    batch's own statistics, as in training.

    Args:
        objective: the loss, at one end w. Its batches are those of the training.
        other: the other end w': a model of the same shapes, its state dict, or a vector (n,).
        steps: of the bend; 0 leaves the straight line.
        lr: the first learning rate, about how far a weight of the bend moves in a step.
        seed: of the draws of t.

    Raises:
        TypeError: ``other`` is none of these.
        ValueError: other names or shapes; a gradient that is not finite; steps or lr out of range.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    >>> _ = torch.nn.init.constant_(model[0].weight, 2.0), torch.nn.init.constant_(model[1].weight, 0.5)
    >>> one = torch.ones(1, 1)
    >>> objective = Objective(model, (one, one), loss=torch.nn.functional.mse_loss)  # (w_1 w_2 - 1)^2
    >>> other = torch.tensor([0.5, 2.0])
    >>> connect(objective, other).barrier < 0.01 < connect(objective, other, steps=0).barrier
    True

    Source: Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, arXiv 1802.10026.
    """
    if steps < 0 or not 0 < lr < math.inf:
        raise ValueError(f"steps={steps}, lr={lr}: steps must not be negative, and lr must be positive and finite")
    start, end = here(objective), solution(objective, other)
    bend = torch.lerp(start.weights, end.weights, 0.5)
    curve = Curve(objective, start, bend, end)
    optimizer = torch.optim.Adam([bend], lr)
    objective.stage = "curve"
    for step, part in zip(range(steps), _in_turn(objective), strict=False):
        (draw,) = random_tensors.uniform("connect", seed, step, [torch.empty(())])
        t = float(draw)
        _, gradient = part.gradient(curve(t) - start.weights)
        gradient = objective.total(gradient) / objective.ranks
        if not gradient.isfinite().all():
            raise ValueError(
                f"step {step + 1} of {steps}: the gradient at t = {t:.3f} is not finite, and would spoil the whole "
                "bend: take a lower lr, or ends between which the loss is finite"
            )
        bend.grad = gradient.mul_(2 * t * (1 - t))  # d phi / d theta
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
    bend.grad = None
    return curve


def _in_turn(objective: Objective) -> Iterator[Objective]:
    """The loss over each batch of this rank, again and again, in training's function."""
    while True:
        part = None
        for part in objective.apart(sys.maxsize):
            part.batch_norm = "train"
            yield part
        if part is None:
            raise ValueError("data: there are no samples, and a curve is trained on some")
