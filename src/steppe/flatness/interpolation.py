"""The loss along the straight line between two models, and along any other path."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steppe._checks import check_count, check_nonnegative
from steppe.flatness._checkpoint import Checkpoint, Other, current_checkpoint, read_checkpoint
from steppe.flatness._json import from_lists, to_lists
from steppe.flatness.objective import Objective


@dataclass(frozen=True, eq=False)
class Line:
    """The loss along a path between two models, from t = 0 to t = 1. Values that are not finite are kept."""

    axis: Tensor
    """Positions t, (p,), float64; 0 and 1 are among them."""
    losses: Tensor
    """L at each t, (p,), float64."""
    statistics: bool
    """True if BatchNorm's statistics were re-estimated at each point."""

    @property
    def barrier(self) -> float:
        """The loss barrier, max over t in [0, 1] of L(t) - (1-t) L(0) - t L(1): at least 0; NaN if a loss is NaN.

        Example:
            >>> Line(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 4.0, 3.0]), False).barrier
            2.0
        """
        inside = (self.axis >= 0) & (self.axis <= 1)
        t, losses = self.axis[inside], self.losses[inside]
        return float((losses - ((1 - t) * losses[0] + t * losses[-1])).max())

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary for ``json``, in which losses that are not finite are None."""
        return {"axis": self.axis.tolist(), "losses": to_lists(self.losses), "statistics": self.statistics}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "Line":
        """Read the result of :meth:`to_json`; None becomes NaN."""
        return cls(from_lists(written["axis"]), from_lists(written["losses"]), written["statistics"])


def interpolation(
    objective: Objective, other: Other, *, points: int = 21, extend: float = 0.0, statistics: bool = False
) -> Line:
    """Evaluate the loss on the straight line to the weights w' of another model, L((1 - t) w + t w').

    At both ends it is bitwise the loss of that model. Each point costs one pass over the data, or two with
    ``statistics``.

    Without ``statistics``, all buffers, including BatchNorm's running statistics, are interpolated linearly; beyond the
    ends they stay those of the end, and integer buffers are those of the nearer end. Interpolated running statistics
    are wrong, as the variance of the activations is not linear in the weights. With ``statistics`` they are
    re-estimated at each point, the ends included.

    Args:
        objective: The loss at w.
        other: A model of the same shapes, its state dict, or a vector (n,).
        points: Number of points from t = 0 to t = 1.
        extend: How far to continue beyond both ends, with the same spacing: 0.25 means t from -0.25 to 1.25.
        statistics: Re-estimate BatchNorm's statistics at each point by :meth:`Objective.statistics`.

    Returns:
        A :class:`Line`.

    Raises:
        TypeError: ``other`` is sharded, or not a model, a state dict or a vector.
        ValueError: Other names or shapes, or a vector for a model that needs running statistics.

    Example:
        >>> model, other = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight), torch.nn.init.constant_(other.weight, -1.0)
        >>> objective = Objective(model, (torch.ones(1, 1), torch.zeros(1, 1)), loss=torch.nn.functional.mse_loss)
        >>> interpolation(objective, other, points=5).losses
        tensor([1.0000, 0.2500, 0.0000, 0.2500, 1.0000], dtype=torch.float64)

    References:
        Goodfellow et al. 2015, Qualitatively Characterizing Neural Network Optimization Problems,
        https://arxiv.org/abs/1412.6544.
    """
    check_count("points", points, "the number of points on the line, with its two ends", at_least=2)
    check_nonnegative("extend", extend, "the part of the line by which it goes beyond each end")
    start, end = current_checkpoint(objective), read_checkpoint(objective, other)
    beyond = round(extend * (points - 1))
    ts = torch.arange(-beyond, points + beyond, dtype=torch.float64) / (points - 1)
    statistics = reestimates_statistics(objective, end, statistics)
    objective.stage = "interpolation"
    return path_losses(objective, lambda t: interpolated(start, end, t), ts, statistics=statistics)


def path_losses(objective: Objective, path: Callable[[float], Checkpoint], axis: Tensor, *, statistics: bool) -> Line:
    """Evaluate the loss at each t of a path."""
    losses = []
    for t in axis.tolist():
        point = path(t)
        with objective.at_weights(point.weights) as there:
            losses.append(float(there.loss(buffers=point.buffers | (there.statistics() if statistics else {}))))
    return Line(axis, torch.tensor(losses, dtype=torch.float64), statistics)


def interpolated(start: Checkpoint, end: Checkpoint, t: float) -> Checkpoint:
    """Interpolate two checkpoints linearly; at t = 0 and t = 1 the result is bitwise one of them."""
    inside = min(max(t, 0.0), 1.0)  # an extrapolated variance could be negative

    def buffer(x: Tensor, y: Tensor) -> Tensor:
        return torch.lerp(x, y, inside) if x.is_floating_point() else (x if t < 0.5 else y).clone()

    buffers = {k: buffer(b, end.buffers.get(k, b)) for k, b in start.buffers.items()}
    return Checkpoint(torch.lerp(start.weights, end.weights, t), buffers)


def reestimates_statistics(objective: Objective, end: Checkpoint, requested: bool) -> bool:
    """Return True if statistics are requested and the loss depends on them.

    Raises:
        ValueError: They are not requested, but the loss depends on them and the checkpoint has none.
    """
    if objective.uses_running_statistics and not requested and not end.buffers:
        raise ValueError(
            "other is a vector without the running statistics that belong to it, so its loss would be wrong: pass the "
            "model or its state dict, or statistics=True"
        )
    return requested and objective.uses_running_statistics
