"""Mode connectivity: a curve of low loss between two models."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steppe._checks import check_count, check_positive
from steppe._tensors import random as random_tensors
from steppe._tensors.reductions import dot
from steppe.flatness._checkpoint import Checkpoint, Other, current_checkpoint, read_checkpoint
from steppe.flatness.interpolation import Line, interpolated, path_losses, reestimates_statistics
from steppe.flatness.objective import Objective


@dataclass(frozen=True, eq=False)
class Curve:
    """The quadratic Bezier curve phi(t) = (1-t)^2 w + 2t(1-t) theta + t^2 w' between the weights of two models."""

    objective: Objective
    """The loss at w."""
    start: Checkpoint
    """w, with its buffers."""
    bend: Tensor
    """The control point theta, (n,)."""
    end: Checkpoint
    """w', with its buffers."""

    def __call__(self, t: float) -> Tensor:
        """Return phi(t), (n,); at t = 0 and t = 1 it is bitwise w and w'."""
        to_bend, from_bend = torch.lerp(self.start.weights, self.bend, t), torch.lerp(self.bend, self.end.weights, t)
        return torch.lerp(to_bend, from_bend, t)

    def losses(self, points: int = 21, *, statistics: bool = True) -> Line:
        """Evaluate the loss along the curve, as :func:`interpolation` does along the straight line.

        Args:
            points: Number of evenly spaced t from 0 to 1.
            statistics: Re-estimate BatchNorm's statistics at each point, the ends included, as in the paper.

        Raises:
            ValueError: ``points`` is below 2, or the running statistics of a vector are needed.
        """
        if points < 2:
            raise ValueError(f"points={points}: a curve needs its two ends")
        axis = torch.arange(points, dtype=torch.float64) / (points - 1)

        def path(t: float) -> Checkpoint:
            return Checkpoint(self(t), interpolated(self.start, self.end, t).buffers)

        self.objective.stage = "curve"
        statistics = reestimates_statistics(self.objective, self.end, statistics)
        return path_losses(self.objective, path, axis, statistics=statistics)

    @cached_property
    def barrier(self) -> float:
        """The loss barrier of :meth:`losses` at 21 points, evaluated at the first access."""
        return self.losses().barrier

    @property
    def length(self) -> float:
        """The length of the curve, the integral of |phi'(t)| from 0 to 1; at least |w' - w|."""
        u, v = self.bend - self.start.weights, self.end.weights - self.bend
        uu, uv, vv = (float(dot([x], [y])) for x, y in ((u, u), (u, v), (v, v)))
        t = torch.linspace(0, 1, 10_001, dtype=torch.float64)
        squared = (1 - t) ** 2 * uu + 2 * t * (1 - t) * uv + t**2 * vv
        return float(torch.trapezoid(2 * squared.clamp_min(0).sqrt(), t))


def connect(objective: Objective, other: Other, *, total_steps: int = 1000, lr: float = 0.01, seed: int = 0) -> Curve:
    """Train a curve of low loss between two models: min over theta of E_t L(phi(t)), t uniform in [0, 1].

    Between independently trained networks the loss is often high on the straight line, and low on such a curve. theta
    starts at the middle of the line and is trained by Adam with a learning rate that decays linearly to 0. Each step
    draws one t and uses the next batch of the data. During this training BatchNorm normalizes with the statistics of
    the batch.

    Args:
        objective: The loss at one end w, with the batches for training theta.
        other: The other end w': a model of the same shapes, its state dict, or a vector (n,).
        total_steps: Number of optimizer steps; 0 returns the straight line.
        lr: Initial learning rate, about the change of an entry of theta per step.
        seed: Seed of the draws of t.

    Returns:
        A :class:`Curve`.

    Raises:
        TypeError: ``other`` is sharded, or not a model, a state dict or a vector.
        ValueError: Other names or shapes, a gradient that is not finite, or ``total_steps`` or ``lr`` out of range.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> _ = torch.nn.init.constant_(model[0].weight, 2.0), torch.nn.init.constant_(model[1].weight, 0.5)
        >>> one = torch.ones(1, 1)
        >>> objective = Objective(model, (one, one), loss=torch.nn.functional.mse_loss)  # (w_1 w_2 - 1)^2
        >>> other = torch.tensor([0.5, 2.0])
        >>> connect(objective, other).barrier < 0.01 < connect(objective, other, total_steps=0).barrier
        True

    References:
        Garipov et al. 2018, Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs,
        https://arxiv.org/abs/1802.10026.
    """
    check_count("total_steps", total_steps, "the number of steps in which the curve is trained", at_least=0)
    check_positive("lr", lr, "the learning rate of the curve's bend")
    start, end = current_checkpoint(objective), read_checkpoint(objective, other)
    bend = torch.lerp(start.weights, end.weights, 0.5)
    curve = Curve(objective, start, bend, end)
    optimizer = torch.optim.Adam([bend], lr)
    objective.stage = "curve"
    for step, batch in zip(range(total_steps), _training_batches(objective), strict=False):
        (draw,) = random_tensors.uniform("connect", seed, step, [torch.empty(())])
        t = float(draw)
        _, gradient = batch.gradient(curve(t) - start.weights)
        gradient = objective.sum_over_ranks(gradient) / objective.world_size
        if not gradient.isfinite().all():
            raise ValueError(
                f"step {step + 1} of {total_steps}: the gradient at t = {t:.3f} is not finite, so theta would become "
                "NaN: take a smaller lr, or ends between which the loss is finite"
            )
        bend.grad = gradient.mul_(2 * t * (1 - t))  # d phi / d theta
        optimizer.param_groups[0]["lr"] = lr * (1 - step / total_steps)
        optimizer.step()
    bend.grad = None
    return curve


def _training_batches(objective: Objective) -> Iterator[Objective]:
    """Yield the loss of each batch of this rank in training mode, in an endless cycle."""
    while True:
        part = None
        for part in objective.split(sys.maxsize):
            part.batch_norm = "train"
            yield part
        if part is None:
            raise ValueError("data: there are no samples, but training the curve needs some")
