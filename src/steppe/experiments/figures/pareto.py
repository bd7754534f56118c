"""The Pareto picture: what a method costs against what it reaches, and which methods nothing else beats in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.config.method_spec import parse
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures.label_placement import Point, label
from steppe.experiments.figures.style import GREY, caption, freeze, styles
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results

__all__ = ["after_epochs", "common_epochs", "draw", "front"]


def front(points: Sequence[Point]) -> list[int]:
    """The points that no other one beats: none is at most as large in both coordinates and smaller in one.

    Indices in the order of the first coordinate; equal points are on the front together.

    >>> front([(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0)])
    [0, 1]
    """
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not kept or points[index][1] < points[kept[-1]][1] or points[index] == points[kept[-1]]:
            kept.append(index)
    return kept


@dataclass(frozen=True)
class _Panel:
    """One axes: what its points cost, in the words of the axis, and what they reach."""

    title: str
    axis: str
    cost: Callable[[str], Estimate]
    reached: Mapping[str, Sequence[Record]]


def draw(recipe: Recipe, results: Results) -> Figure:
    """Draw costs against test accuracy and gap, one point a method, with the front of the means.

    At equal compute all methods have spent the same gradient evaluations, so their cost shows where they have made
    the same number of epochs: as many as the most expensive one reaches. There, and in the time that equal compute
    took, is cheaper better.
    """
    epochs = common_epochs(recipe, results)
    planned = [m for m in recipe.methods if parse(m).method.follows_plan]
    same_epochs = {
        method: runs
        for method in recipe.methods
        if method not in planned and (runs := _runs(results, method, lambda r: after_epochs(r, epochs)))
    }
    same_compute = {
        method: runs for method in recipe.methods if (runs := _runs(results, method, lambda r: _at(r, recipe.epochs)))
    }
    base = next((m for m in same_epochs if parse(m).method.plain), next(iter(same_epochs), ""))
    base_seconds = estimate([r.seconds for r in same_epochs[base]]).mean if base else 1.0
    panels = (
        _Panel(
            f"Same number of epochs ({epochs:.3g})",
            "gradient evaluations an image and epoch (passes)",
            lambda method: estimate([r.passes for r in same_epochs[method]]),
            same_epochs,
        ),
        _Panel(
            f"Same number of epochs ({epochs:.3g})",
            f"seconds a step, {parse(base).label if base else 'the first'} = 1",
            lambda method: estimate([r.seconds / max(base_seconds, 1e-9) for r in same_epochs[method]]),
            same_epochs,
        ),
        _Panel(
            f"Same compute ({recipe.epochs} standardized epochs)",
            "training time, seconds",
            lambda method: estimate([r.seconds for r in same_compute[method]]),
            same_compute,
        ),
    )
    figure = Figure(figsize=(15.0, 8.6), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col")
    placed = [
        _draw_panel(axes, panel, field, recipe, better=better)
        for row, (field, better) in zip(grid, (("test_accuracy", 1), ("gap", -1)), strict=True)
        for axes, panel in zip(row, panels, strict=True)
    ]
    for axes, panel in zip(grid[0], panels, strict=True):
        axes.set_title(panel.title)
    for axes, panel in zip(grid[1], panels, strict=True):
        axes.set_xlabel(panel.axis)
    grid[0, 0].set_ylabel("test accuracy, %")
    grid[1, 0].set_ylabel("generalization gap, points")
    caption(figure, recipe, *_explain(planned))
    freeze(figure)
    for axes, labels in zip(grid.flat, placed, strict=True):
        label(axes, labels.texts, labels.points, labels.lines)
    return figure


def _explain(planned: Sequence[str]) -> Iterator[str]:
    yield (
        "Left is cheaper. Filled and on the gray line: the Pareto front, no method is both cheaper and better (by "
        "the means; bars are standard deviations). Between two measurements values are interpolated."
    )
    if planned:
        labels = ", ".join(parse(method).label for method in planned)
        yield f"On the right only, because a schedule spans the whole run: {labels}."


@dataclass(frozen=True)
class _Labels:
    """What is written into a panel when its layout is final, and where lines are that it should not cover."""

    texts: list[str]
    points: list[Point]
    lines: list[tuple[Point, Point]]


def _draw_panel(axes: Axes, panel: _Panel, field: str, recipe: Recipe, *, better: int) -> _Labels:
    """Draw one panel without its labels."""
    look = styles(recipe)
    costs = [panel.cost(method) for method in panel.reached]
    values = [estimate([getattr(r, field) for r in runs]) for runs in panel.reached.values()]
    points = [(cost.mean, value.mean) for cost, value in zip(costs, values, strict=True)]
    on_front = front([(cost, -better * value) for cost, value in points])
    lines = []
    for (x, y), (next_x, next_y) in pairwise(points[index] for index in on_front):
        lines += [((x, y), (next_x, y)), ((next_x, y), (next_x, next_y))]
    axes.add_collection(LineCollection(lines, colors="#BBBBBB", linewidths=3, capstyle="round", zorder=1))
    for index, (method, (x, y), cost, value) in enumerate(zip(panel.reached, points, costs, values, strict=True)):
        color = look[method].color
        axes.errorbar(
            x,
            y,
            xerr=cost.sd,
            yerr=value.sd,
            fmt="o",
            markersize=8,
            color=color,
            markerfacecolor=color if index in on_front else "white",
            markeredgewidth=1.6,
            elinewidth=0.8,
            zorder=3,
        )
        lines += [
            ((x - (cost.sd or 0), y), (x + (cost.sd or 0), y)),
            ((x, y - (value.sd or 0)), (x, y + (value.sd or 0))),
        ]
    axes.margins(0.14)
    corner = {1: (0.01, 0.99, "top", "\N{NORTH WEST ARROW}"), -1: (0.01, 0.01, "bottom", "\N{SOUTH WEST ARROW}")}[
        better
    ]
    axes.text(*corner[:2], f"{corner[3]} better", va=corner[2], transform=axes.transAxes, fontsize=8, color=GREY)
    return _Labels([look[method].label.replace(" (", "\n(") for method in panel.reached], points, lines)


def common_epochs(recipe: Recipe, results: Results) -> float:
    """How many epochs of its own every method has made when equal compute is spent."""
    ends = (_at(records, recipe.epochs) for records in results.values())
    return min((float(record.epoch) for record in ends if record is not None), default=0.0)


def after_epochs(records: Sequence[Record], epochs: float) -> Record | None:
    """A run after so many epochs of its own, interpolated between its measurements; None where it has none around."""
    for record in records:
        if record.epoch == epochs:
            return record
    for before, after in pairwise(records):
        if before.epoch < epochs < after.epoch:
            part = (epochs - before.epoch) / (after.epoch - before.epoch)
            both = before.to_json().keys() & after.to_json().keys()
            mixed = {k: (1 - part) * getattr(before, k) + part * getattr(after, k) for k in both}
            # what is paid is added up, so the average over the way is what interpolates, not the passes
            images = before.gradient_evaluations / before.passes / before.epoch
            return Record(**{**mixed, "epoch": epochs, "passes": mixed["gradient_evaluations"] / (epochs * images)})
    return None


def _at(records: Sequence[Record], standardized_epoch: int) -> Record | None:
    return next((r for r in records if r.standardized_epoch == standardized_epoch), None)


def _runs(results: Results, method: str, choose: Callable[[Sequence[Record]], Record | None]) -> list[Record]:
    chosen = (choose(records) for run, records in results.items() if run.method == method)
    return [record for record in chosen if record is not None]
