"""The loss around a solution, and on the straight line to another one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steppe.flatness.directions import Other, Solution, here, solution
from steppe.flatness.objective import Objective


@dataclass(frozen=True, eq=False)
class Landscape:
    """The loss on a grid in one or two directions; what is not finite stays as it is."""

    axis: Tensor
    """(p,), float64: how far along a direction, in units of its length; the same for both."""
    losses: Tensor
    """(p,) or (p, p), float64: losses[i][j] = L(center + axis[i] d_1 + axis[j] d_2)."""
    center: float
    """L in the middle, where both steps are 0."""
    statistics: bool
    """Whether BatchNorm's statistics were estimated anew at each point."""
    what: str
    """What the directions are."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``json`` can write; infinite losses and NaN become null, as JSON has neither.

        >>> Landscape(torch.tensor([0.0, 1.0]), torch.tensor([2.0, torch.nan]), 2.0, False, "d").to_json()["losses"]
        [2.0, None]
        """
        return {
            "axis": self.axis.tolist(),
            "losses": plain(self.losses),
            "center": plain(torch.tensor(self.center, dtype=torch.float64)),
            "statistics": self.statistics,
            "what": self.what,
        }

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "Landscape":
        """Read what :meth:`to_json` gave; null becomes NaN."""
        center = float(unplain(written["center"]))
        return cls(unplain(written["axis"]), unplain(written["losses"]), center, written["statistics"], written["what"])


@dataclass(frozen=True, eq=False)
class Line:
    """The loss on a way between two solutions, from t = 0 to t = 1; what is not finite stays as it is."""

    axis: Tensor
    """t, (p,), float64; 0 and 1 are among them."""
    losses: Tensor
    """L at each t, (p,), float64."""
    statistics: bool
    """Whether BatchNorm's statistics were estimated anew at each point."""

    @property
    def barrier(self) -> float:
        """How far the loss climbs above the line between its ends: max over t in [0, 1] of L(t) - (1-t) L(0) - t L(1).

        0 where it never does; NaN where a loss on the way is.

        >>> Line(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 4.0, 3.0]), False).barrier
        2.0
        """
        inside = (self.axis >= 0) & (self.axis <= 1)
        t, losses = self.axis[inside], self.losses[inside]
        return float((losses - ((1 - t) * losses[0] + t * losses[-1])).max())

    def to_json(self) -> dict[str, Any]:
        """Return what ``json`` can write; infinite losses and NaN become null, as JSON has neither."""
        return {"axis": self.axis.tolist(), "losses": plain(self.losses), "statistics": self.statistics}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "Line":
        """Read what :meth:`to_json` gave; null becomes NaN."""
        return cls(unplain(written["axis"]), unplain(written["losses"]), written["statistics"])


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
    """Measure the loss around w on a grid, losses[i][j] = L(w + center + axis[i] d_1 + axis[j] d_2).

    One pass over the data a point, two with ``statistics``. With an odd number of points the middle one is exactly 0.
    Two models are compared on the same axis, with directions of the same seed.

    Args:
        objective: the loss.
        directions: (1, n) for a profile, (2, n) for a surface, such as :func:`random_directions` or eigenvectors.
        radius: the axis goes from -radius to radius, in units of the directions' lengths.
        points: p, how many points it has.
        axis: in place of both, any numbers, such as a range that lies to one side.
        center: (n,), where the middle is, from w; None is w itself.
        statistics: estimate BatchNorm's statistics anew at each point, with :meth:`Objective.statistics`, instead of
            taking the model's. The middle is then L with its own estimate, too.
        what: what the directions are, for the reader of the result: "random, by filter, seed 0".

    Raises:
        ValueError: directions of another shape, or not finite; a radius that is not a positive number, fewer than two
            points.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> objective = Objective(model, (torch.eye(2), torch.zeros(2, 1)), loss=torch.nn.functional.mse_loss)
    >>> landscape(objective, torch.eye(2), radius=2.0, points=3).losses
    tensor([[4., 2., 4.],
            [2., 0., 2.],
            [4., 2., 4.]], dtype=torch.float64)

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, arXiv 1712.09913.
    """
    ds = _checked(objective, directions)
    ts = _axis(radius, points) if axis is None else torch.as_tensor(axis, dtype=torch.float64, device="cpu").clone()
    if ts.dim() != 1 or not len(ts) or not ts.isfinite().all():
        raise ValueError("axis: finite numbers are needed, in one dimension")
    origin = torch.zeros_like(ds[0]) if center is None else objective.flatten(objective.unflatten(center))
    statistics, objective.stage = statistics and estimable(objective), "landscape"

    def loss(*steps: float) -> float:
        e = origin + sum(t * d for t, d in zip(steps, ds, strict=True))
        return float(objective.loss(e, buffers=objective.statistics(e) if statistics else None))

    middle = loss(*(0.0 for _ in ds))

    def at(*steps: float) -> float:
        return loss(*steps) if any(steps) else middle

    numbers = ts.tolist()
    losses = [at(a) if len(ds) == 1 else [at(a, b) for b in numbers] for a in numbers]
    return Landscape(ts, torch.tensor(losses, dtype=torch.float64), middle, statistics, what)


def interpolation(
    objective: Objective, other: Other, *, points: int = 21, extend: float = 0.0, statistics: bool = False
) -> Line:
    """Measure the loss on the straight line to another solution, L((1 - t) w + t w').

    At the ends it is their own loss, bit for bit. One pass over the data a point, two with ``statistics``.

    Without ``statistics``, BatchNorm's running statistics, like all buffers, are those on the line between the two
    models' (beyond the ends, the end's; whole numbers, the nearer end's). They are not right there: the activations'
    variance is not linear in the weights. With it they are estimated anew at each point, the ends included.

    Args:
        objective: the loss, at w.
        other: w', a model of the same shapes, its state dict, or a vector (n,).
        points: how many from t = 0 to t = 1.
        extend: how far to go on beyond both ends, at the same distance of points: 0.25 is t from -0.25 to 1.25.
        statistics: estimate BatchNorm's statistics anew at each point, with :meth:`Objective.statistics`.

    Raises:
        TypeError: ``other`` is none of these.
        ValueError: other names or shapes; a vector, where the buffers that belong to it are needed.

    >>> model, other = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight), torch.nn.init.constant_(other.weight, -1.0)
    >>> objective = Objective(model, (torch.ones(1, 1), torch.zeros(1, 1)), loss=torch.nn.functional.mse_loss)
    >>> interpolation(objective, other, points=5).losses
    tensor([1.0000, 0.2500, 0.0000, 0.2500, 1.0000], dtype=torch.float64)

    Source: Goodfellow et al., Qualitatively characterizing neural network optimization problems, arXiv 1412.6544.
    """
    if points < 2 or not 0 <= extend < math.inf:
        raise ValueError(f"points={points}, extend={extend}: a line needs its two ends, and goes on by 0 or more")
    start, end = here(objective), solution(objective, other)
    beyond = round(extend * (points - 1))
    ts = torch.arange(-beyond, points + beyond, dtype=torch.float64) / (points - 1)
    objective.stage = "interpolation"
    return along(objective, lambda t: mixed(start, end, t), ts, statistics=estimating(objective, end, statistics))


def along(objective: Objective, way: Callable[[float], Solution], axis: Tensor, *, statistics: bool) -> Line:
    """Measure the loss at each t of a way."""
    losses = []
    for t in axis.tolist():
        at = way(t)
        with objective.seen_from(at.weights) as there:
            losses.append(float(there.loss(buffers=at.buffers | (there.statistics() if statistics else {}))))
    return Line(axis, torch.tensor(losses, dtype=torch.float64), statistics)


def mixed(start: Solution, end: Solution, t: float) -> Solution:
    """Return what lies at t between two solutions; at 0 and 1 they themselves, to the bit."""
    inside = min(max(t, 0.0), 1.0)  # a variance must not go on into the negative

    def one(x: Tensor, y: Tensor) -> Tensor:
        return torch.lerp(x, y, inside) if x.is_floating_point() else (x if t < 0.5 else y).clone()

    buffers = {k: one(b, end.buffers.get(k, b)) for k, b in start.buffers.items()}
    return Solution(torch.lerp(start.weights, end.weights, t), buffers)


def estimable(objective: Objective) -> bool:
    """Whether the loss depends on running statistics, which can be estimated anew."""
    norms = [m for m in objective.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return objective.batch_norm == "eval" and any(m.running_mean is not None for m in norms)


def estimating(objective: Objective, end: Solution, asked: bool) -> bool:
    """Whether statistics are to be estimated on the way to another solution; ValueError where they have to be."""
    if estimable(objective) and not asked and not end.buffers:
        raise ValueError(
            "other is a vector, and without the running statistics that belong to it its loss is another: give the "
            "model or its state dict, or statistics=True"
        )
    return asked and estimable(objective)


def plain(x: Tensor) -> Any:
    """Return numbers in lists, as ``json`` writes them, None where they are not finite."""
    if x.dim() > 0:
        return [plain(row) for row in x]
    return float(x) if x.isfinite() else None


def unplain(numbers: Any) -> Tensor:
    """Return the tensor of numbers in lists, NaN where there is None."""

    def known(x: Any) -> Any:
        return [known(row) for row in x] if isinstance(x, list) else math.nan if x is None else x

    return torch.tensor(known(numbers), dtype=torch.float64)


def _axis(radius: float, points: int) -> Tensor:
    """Points from -radius to radius, symmetric to the bit, so that the middle of an odd number is 0."""
    if not 0 < radius < math.inf or points < 2:
        raise ValueError(f"radius={radius}, points={points}: a positive number, and at least two points are needed")
    return radius * (torch.arange(1 - points, points, 2, dtype=torch.float64) / (points - 1))


def _checked(objective: Objective, directions: Tensor) -> Tensor:
    if directions.dim() != 2 or len(directions) not in (1, 2) or directions.shape[1] != objective.n:
        raise ValueError(
            f"directions of shape {tuple(directions.shape)} were given: one direction is (1, {objective.n}) here, two "
            f"are (2, {objective.n})"
        )
    if not directions.isfinite().all():
        raise ValueError("directions: some entries are not finite, and along them every loss would be NaN")
    return directions.detach().to(objective.device, objective.dtype)
