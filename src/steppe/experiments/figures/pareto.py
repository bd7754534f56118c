"""The cost of each method against its result, and the Pareto front: the methods that no other one beats in both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from steppe.experiments.analysis.statistics import Estimate, estimate, is_usable
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.task_info import TaskInfo
from steppe.experiments.figures.drawing import freeze, tag
from steppe.experiments.figures.label_placement import Point, add_labels
from steppe.experiments.figures.style import GREY, add_caption, styles
from steppe.experiments.storage.records import Record, record_at
from steppe.experiments.storage.run_folder import Results


def _fields(task: TaskInfo) -> tuple[tuple[str, str, int], ...]:
    """Return the fields of a record that are drawn, each with its label and the sign of what is better."""
    metric = task.deciding
    gap = f"generalization gap, {metric.unit_of_change}".removesuffix(", ")
    return (f"test_{metric.name}", metric.with_unit(f"test {metric.name}"), metric.better), ("gap", gap, -1)


def front(points: Sequence[Point]) -> list[int]:
    """Return the points that no other one beats, that is, is at most as large in both coordinates and smaller in one.

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
class _Cost:
    """One column of panels: the cost of a record, its label, and the records of each method that are compared."""

    title: str
    label: str
    of: Callable[[Record], float]
    records: Mapping[MethodSpec, Sequence[Record]]


def draw(recipe: Recipe, results: Results) -> Figure:
    """Draw costs against test accuracy and gap, one point a method, with the front of the means.

    At equal compute all methods have spent the same gradient evaluations, so their cost shows where they have made
    the same number of epochs: as many as the most expensive one reaches. There, and in the time that equal compute
    took, cheaper is better.
    """
    costs, scheduled = _costs(recipe, results)
    figure = Figure(figsize=(15.0, 8.6), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col")
    labels = []
    for row, (field, label, better) in zip(grid, _fields(recipe.task), strict=True):
        for axes, cost in zip(row, costs, strict=True):
            labels.append(_plot(axes, cost, field, recipe, better=better))
            axes.tick_params(labelbottom=True)  # sharex hides it, but each panel also stands by itself on the page
            axes.set(title=cost.title, xlabel=cost.label)
        row[0].set_ylabel(label)
    front_of_means = (
        "Left is cheaper. Filled and on the gray line: the Pareto front, no method is both cheaper and better (by "
        "the means; bars are standard deviations). Between two measurements values are interpolated."
    )
    only_right = "On the right only, because a schedule spans the whole run: " + ", ".join(m.label for m in scheduled)
    add_caption(
        figure, recipe, front_of_means, *([f"{only_right}."] if scheduled else []), *_about_missing(recipe, costs)
    )
    freeze(figure)
    for axes, (texts, points, lines) in zip(grid.flat, labels, strict=True):
        add_labels(axes, texts, points, lines)
    return figure


def _costs(recipe: Recipe, results: Results) -> tuple[list[_Cost], list[MethodSpec]]:
    """Select what is drawn; also return the methods that are compared at equal compute only."""
    epochs = common_epochs(recipe, results)
    scheduled = [m for m in recipe.comparison.methods if m.definition.follows_plan]
    same_epochs = _select(recipe, results, lambda records: after_epochs(records, epochs))
    same_epochs = {method: records for method, records in same_epochs.items() if method not in scheduled}
    same_compute = _select(recipe, results, lambda records: record_at(records, recipe.comparison.epochs))
    base = next((m for m in same_epochs if m.definition.plain), next(iter(same_epochs), None))
    seconds = max(estimate([r.seconds for r in same_epochs[base]]).mean, 1e-9) if base else 1.0
    relative = f"seconds a step, {base.label if base else 'the first'} = 1"
    by_epochs = f"Same number of epochs ({epochs:.3g})"
    by_compute = f"Same compute ({recipe.comparison.epochs} standardized epochs)"
    return [
        _Cost(by_epochs, "gradient evaluations per sample and epoch (passes)", lambda r: r.passes, same_epochs),
        _Cost(by_epochs, relative, lambda r: r.seconds / seconds, same_epochs),
        _Cost(by_compute, "training time, seconds", lambda r: r.seconds, same_compute),
    ], scheduled


def _about_missing(recipe: Recipe, costs: Sequence[_Cost]) -> Iterator[str]:
    """Yield a sentence with the methods that a panel leaves out, if there are any."""
    missing = [
        method.label
        for method in recipe.comparison.methods
        if not all(
            is_usable(record[field])
            for cost in costs
            for record in cost.records.get(method, ())
            for field, _, _ in _fields(recipe.task)
        )
    ]
    if missing:
        yield f"Not drawn where a number is not finite: {', '.join(missing)}."


def _plot(
    axes: Axes, cost: _Cost, field: str, recipe: Recipe, *, better: int
) -> tuple[list[str], list[Point], list[tuple[Point, Point]]]:
    """Draw one panel without its labels; return these, their points, and the lines that they should not cover."""
    drawn = {m: records for m, records in cost.records.items() if all(is_usable(r[field]) for r in records)}
    costs = [estimate([cost.of(record) for record in records]) for records in drawn.values()]
    values = [estimate([r[field] for r in records]) for records in drawn.values()]
    points = [(x.mean, y.mean) for x, y in zip(costs, values, strict=True)]
    on_front = front([(x, -better * y) for x, y in points])
    lines = []
    for (x, y), (next_x, next_y) in pairwise(points[index] for index in on_front):
        lines += [((x, y), (next_x, y)), ((next_x, y), (next_x, next_y))]
    axes.add_collection(LineCollection(lines, colors="#BBBBBB", linewidths=3, capstyle="round", zorder=1))
    look = [styles(recipe)[method] for method in drawn]
    for index, (style, x_of, y_of) in enumerate(zip(look, costs, values, strict=True)):
        lines += _plot_point(axes, style.label, style.color, x_of, y_of, filled=index in on_front)
    axes.margins(0.14)
    y, alignment, arrow = (0.99, "top", "↖") if better > 0 else (0.01, "bottom", "↙")
    axes.text(0.01, y, f"{arrow} better", va=alignment, transform=axes.transAxes, fontsize=8, color=GREY)
    return [style.label.replace(" (", "\n(") for style in look], points, lines


def _plot_point(
    axes: Axes, label: str, color: str, x: Estimate, y: Estimate, *, filled: bool
) -> list[tuple[Point, Point]]:
    """Draw one method with its standard deviations; return the bars."""
    marker: dict[str, Any] = {"markersize": 8, "markerfacecolor": color if filled else "white", "markeredgewidth": 1.6}
    bars = axes.errorbar(x.mean, y.mean, xerr=x.sd, yerr=y.sd, fmt="o", color=color, elinewidth=0.8, zorder=3, **marker)
    point, _, deviations = bars.lines
    assert point is not None
    tag(point, label, tips=[f"{label}: {x.mean:.4g}, {y.mean:.4g}"])
    for deviation in deviations:
        tag(deviation, label)
    dx, dy = x.sd or 0.0, y.sd or 0.0
    return [((x.mean - dx, y.mean), (x.mean + dx, y.mean)), ((x.mean, y.mean - dy), (x.mean, y.mean + dy))]


def common_epochs(recipe: Recipe, results: Results) -> float:
    """Return the number of its own epochs that every method has made when equal compute is spent."""
    ends = (record_at(records, recipe.comparison.epochs) for records in results.values())
    return min((float(record.epoch) for record in ends if record is not None), default=0.0)


def after_epochs(records: Sequence[Record], epochs: float) -> Record | None:
    """Return a run after `epochs` epochs of its own, interpolated between its measurements.

    None if it has no measurement before or after.
    """
    for record in records:
        if record.epoch == epochs:
            return record
    for before, after in pairwise(records):
        if before.epoch < epochs < after.epoch:
            part = (epochs - before.epoch) / (after.epoch - before.epoch)
            both = before.to_json().keys() & after.to_json().keys()
            mixed = {k: (1 - part) * before[k] + part * after[k] for k in both}
            # gradient evaluations add up and can be interpolated; passes are their average over the run so far
            samples = before.gradient_evaluations / before.passes / before.epoch
            mixed |= {"epoch": epochs, "passes": mixed["gradient_evaluations"] / (epochs * samples)}
            return Record.from_json(mixed)
    return None


def _select(
    recipe: Recipe, results: Results, choose: Callable[[Sequence[Record]], Record | None]
) -> dict[MethodSpec, list[Record]]:
    """Choose one record of each run; methods without one are left out."""
    selected = {
        method: [r for run, records in results.items() if run.method == method and (r := choose(records)) is not None]
        for method in recipe.comparison.methods
    }
    return {method: records for method, records in selected.items() if records}
