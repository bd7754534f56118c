"""Placement of labels next to their points: they cover neither points nor each other, and lines only if they must."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from steppe.experiments.figures.style import CARD, INK

Point = tuple[float, float]
Boxes = NDArray[np.float64]
"""(n, 4): left, bottom, right, top, in pixels."""

_RINGS = (9.0, 16.0, 26.0, 38.0, 52.0, 68.0, 86.0, 106.0)  # pixels from a point to its label's edge
_DIRECTIONS = 24
_NEAR = 12.0  # pixels, from which on a line leads from the label to its point
_LEADER = {"arrowstyle": "-", "color": "#AAAAAA", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
_SWEEPS = 4
_FONT_SIZE = 8


def add_labels(
    axes: Axes, texts: Sequence[str], points: Sequence[Point], lines: Sequence[tuple[Point, Point]] = ()
) -> None:
    """Write each text next to its point, away from level and upright lines, all in data coordinates.

    Call it when limits and layout are final.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    pixels = axes.transData.transform(np.asarray(points, dtype=float).reshape(-1, 2))
    sizes = []
    for text in texts:
        draft = axes.text(0, 0, text, fontsize=_FONT_SIZE)
        extent = draft.get_window_extent(renderer)
        sizes.append((extent.width, extent.height))
        draft.remove()
    ends = axes.transData.transform(np.asarray(lines, dtype=float).reshape(-1, 2)).reshape(-1, 2, 2)
    thin = np.concatenate([ends.min(1) - 1, ends.max(1) + 1], axis=1)
    inside = np.asarray(axes.get_window_extent(renderer).extents)
    centers = place(pixels, sizes, inside, thin)
    for text, point, pixel, center, size in zip(texts, points, pixels, centers, sizes, strict=True):
        gap = np.abs(center - pixel) - np.array(size) / 2
        axes.annotate(
            text,
            point,
            (center - pixel) * 72 / figure.dpi,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_FONT_SIZE,
            color=INK,
            arrowprops=_LEADER if gap.max() > _NEAR else None,
            path_effects=[withStroke(linewidth=2, foreground=CARD)],
        )


def place(points: Boxes, sizes: Sequence[tuple[float, float]], inside: Boxes, thin: Boxes) -> list[Boxes]:
    """Choose centers of boxes of `sizes` near `points`, all in pixels, inside the box `inside`, away from `thin` boxes.

    Each box takes the cheapest of a few hundred positions while the others stay; after a few rounds none moves.
    """
    marks = np.concatenate([points - 5, points + 5], axis=1)
    candidates = [_around(point, size) for point, size in zip(points, sizes, strict=True)]
    halves = np.array(sizes).reshape(-1, 2) / 2 + 2
    boxes = [np.concatenate([c - half, c + half], axis=1) for c, half in zip(candidates, halves, strict=True)]
    nearness = 0.02 * np.repeat(_RINGS, _DIRECTIONS)
    costs = [
        nearness + 8 * _outside(b, inside) + 3 * _overlap(b, marks).sum(1) + 0.5 * (_overlap(b, thin) > 0).sum(1)
        for b in boxes
    ]
    # boxes among many others have the fewest free positions, so they are placed first
    crowd = [np.sort(np.hypot(*(points - point).T))[:4].sum() for point in points]
    order = np.argsort(crowd, kind="stable").tolist()
    chosen: dict[int, int] = {}
    for _ in range(_SWEEPS):
        for index in order:
            others = np.array([boxes[j][k] for j, k in chosen.items() if j != index]).reshape(-1, 4)
            chosen[index] = int((costs[index] + 5 * _overlap(boxes[index], others).sum(1)).argmin())
    return [candidates[index][chosen[index]] for index in range(len(points))]


def _around(point: Boxes, size: tuple[float, float]) -> Boxes:
    """Return centers of a box so that its edge is at each of the distances, in each of the directions."""
    angles = np.arange(_DIRECTIONS) * 2 * math.pi / _DIRECTIONS
    towards = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # the distance from the center to the edge of the box in that direction
    with np.errstate(divide="ignore"):
        reach = np.min(np.array(size) / 2 / np.abs(towards).clip(1e-9), axis=1)
    return np.concatenate([point + towards * (ring + reach)[:, None] for ring in _RINGS])


def _overlap(boxes: Boxes, others: Boxes) -> Boxes:
    """Return how far each of the boxes reaches into each of the others: 0 if it does not, else at least 1."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    depth = (high - low).clip(0).min(axis=2)
    return np.where(depth > 0, 1 + depth / 10, 0.0)


def _outside(boxes: Boxes, inside: Boxes) -> Boxes:
    """Return by how many pixels each of the boxes sticks out."""
    stuck: Boxes = (inside[:2] - boxes[:, :2]).clip(0).sum(1) + (boxes[:, 2:] - inside[2:]).clip(0).sum(1)
    return stuck
