"""The loss on a grid of one or two directions around the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steppe._checks import check_count, check_positive
from steppe.flatness._json import from_lists, to_lists
from steppe.flatness.objective import Objective


@dataclass(frozen=True, eq=False)
class Landscape:
    """The loss on a grid in one or two directions. Values that are not finite are kept."""

    axis: Tensor
    """Coordinates along each direction, in units of its length, (p,), float64."""
    losses: Tensor
    """losses[i][j] = L(w + center + axis[i] d_1 + axis[j] d_2), (p,) or (p, p), float64."""
    center_loss: float
    """L(w + center), where all coordinates are 0; "center" in JSON."""
    statistics: bool
    """True if BatchNorm's statistics were re-estimated at each point."""
    what: str
    """Description of the directions."""

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary for ``json``, in which losses that are not finite are None.

        Example:
            >>> Landscape(torch.tensor([0.0, 1.0]), torch.tensor([2.0, torch.nan]), 2.0, False, "d").to_json()["losses"]
            [2.0, None]
        """
        return {
            "axis": self.axis.tolist(),
            "losses": to_lists(self.losses),
            "center": to_lists(torch.tensor(self.center_loss, dtype=torch.float64)),
            "statistics": self.statistics,
            "what": self.what,
        }

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "Landscape":
        """Read the result of :meth:`to_json`; None becomes NaN."""
        center_loss = float(from_lists(written["center"]))
        axis, losses = from_lists(written["axis"]), from_lists(written["losses"])
        return cls(axis, losses, center_loss, written["statistics"], written["what"])


def landscape(
    objective: Objective,
    directions: Tensor,
    *,
    radius: float = 1.0,
    points: int = 21,
    axis: Tensor | Sequence[float] | None = None,
    center: Tensor | None = None,
    statistics: bool = False,
    what: str = "",
) -> Landscape:
    """Evaluate the loss on a grid around w, losses[i][j] = L(w + center + axis[i] d_1 + axis[j] d_2).

    Each point costs one pass over the data, or two with ``statistics``. The middle of an odd number of points is
    exactly 0. Compare two models on the same axis, with directions of the same seed.

    Args:
        objective: The loss.
        directions: (1, n) for a line, (2, n) for a surface, such as :func:`random_directions` or eigenvectors.
        radius: The axis runs from -radius to radius, in units of the directions' lengths.
        points: Number p of points of the axis.
        axis: Any finite coordinates, (p,), in place of ``radius`` and ``points``.
        center: The center of the grid relative to w, (n,); None is w itself.
        statistics: Re-estimate BatchNorm's statistics at each point, the center included, by
            :meth:`Objective.statistics`, in place of the model's running statistics.
        what: Description of the directions, stored in the result: "random, by filter, seed 0".

    Returns:
        A :class:`Landscape` of p or p x p losses.

    Raises:
        ValueError: Directions of another shape or not finite, a radius that is not positive, or fewer than two points.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> objective = Objective(model, (torch.eye(2), torch.zeros(2, 1)), loss=torch.nn.functional.mse_loss)
        >>> landscape(objective, torch.eye(2), radius=2.0, points=3).losses
        tensor([[4., 2., 4.],
                [2., 0., 2.],
                [4., 2., 4.]], dtype=torch.float64)

    References:
        Li et al. 2018, Visualizing the Loss Landscape of Neural Nets, https://arxiv.org/abs/1712.09913.
    """
    ds = _checked_directions(objective, directions)
    ts = _axis(radius, points) if axis is None else torch.as_tensor(axis, dtype=torch.float64, device="cpu").clone()
    if ts.dim() != 1 or not len(ts) or not ts.isfinite().all():
        raise ValueError("axis: finite numbers are needed, in one dimension")
    origin = torch.zeros_like(ds[0]) if center is None else objective.flatten(objective.unflatten(center))
    statistics, objective.stage = statistics and objective.uses_running_statistics, "landscape"

    def loss_at(*coordinates: float) -> float:
        e = origin + sum(t * d for t, d in zip(coordinates, ds, strict=True))
        return float(objective.loss(e, buffers=objective.statistics(e) if statistics else None))

    center_loss = loss_at(*(0.0 for _ in ds))

    def grid_loss(*coordinates: float) -> float:
        return loss_at(*coordinates) if any(coordinates) else center_loss

    numbers = ts.tolist()
    losses = [grid_loss(a) if len(ds) == 1 else [grid_loss(a, b) for b in numbers] for a in numbers]
    return Landscape(ts, torch.tensor(losses, dtype=torch.float64), center_loss, statistics, what)


def _axis(radius: float, points: int) -> Tensor:
    """Return points from -radius to radius, bitwise symmetric, so that the middle of an odd number is 0."""
    check_positive("radius", radius, "the distance of the outermost points from the weights")
    check_count("points", points, "the number of points of an axis", at_least=2)
    return radius * (torch.arange(1 - points, points, 2, dtype=torch.float64) / (points - 1))


def _checked_directions(objective: Objective, directions: Tensor) -> Tensor:
    if directions.dim() != 2 or len(directions) not in (1, 2) or directions.shape[1] != objective.n:
        raise ValueError(
            f"directions of shape {tuple(directions.shape)} were given, but one direction is (1, {objective.n}) here, "
            f"and two are (2, {objective.n})"
        )
    if not directions.isfinite().all():
        raise ValueError("directions: some entries are not finite, so every loss along them would be NaN")
    return directions.detach().to(objective.device, objective.dtype)
