"""Figures of a search: the validation metric and the gap over each number that was searched, such as rho."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steppe.experiments.analysis.statistics import estimate
from steppe.experiments.figures.drawing import Drawing, save_all
from steppe.experiments.figures.style import GREY, Style, add_caption, set_log_scale, styles_of
from steppe.experiments.tuning.options import field_of
from steppe.experiments.tuning.result import TuningResult
from steppe.experiments.tuning.search_space import Range, Space


def draw(result: TuningResult, folder: Path) -> None:
    """Draw a figure for each searched number as PNG and SVG into `folder`."""
    save_all(drawings(result), folder)


def drawings(result: TuningResult) -> Iterator[Drawing]:
    """Yield a figure for each searched number, by its name."""
    names = dict.fromkeys(dimension.name for space in result.spaces for dimension in space.dimensions)
    return (Drawing(name, partial(_figure, result, name)) for name in names if _is_number(result, name))


def _is_number(result: TuningResult, name: str) -> bool:
    values = [trial.values[name] for trial in result.trials if name in trial.values and trial.state != "running"]
    return bool(values) and not any(isinstance(value, bool | str) for value in values)


def _figure(result: TuningResult, name: str) -> Figure:
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    looks = styles_of([space.spec.label for space in result.spaces])  # by position, as in a comparison
    log = _is_log(result, name)
    for axes, (field, title, unit) in zip(panels, _drawn(result), strict=True):
        if log:
            set_log_scale(axes, horizontal=True)
        methods = zip(result.spaces, looks, strict=True)
        # matplotlib's own legend puts error bars last; here each method is next to its best trial
        entries = [entry for space, style in methods for entry in _method(axes, result, space, style, name, field)]
        if axes is panels[0]:
            axes.legend(handles=entries)
        axes.set_title(title)
        axes.set_xlabel(name)
        axes.set_ylabel(unit)
    add_caption(figure, result.recipe, f"equal compute; validation: {result.data_in_short}")
    return figure


def _drawn(result: TuningResult) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """Return the fields of a record that are drawn, each with its title and unit: the metric and the gap."""
    metric, deciding = result.metric, result.recipe.task.deciding
    unit = "cross-entropy" if metric.name == "loss" and not result.recipe.data.task else metric.unit
    order = ("training", "validation") if deciding.higher_is_better else ("validation", "training")
    of_gap = {"points": "percentage points"}.get(deciding.unit_of_change, deciding.unit_of_change)
    return (
        (field_of(metric), f"Validation {metric.name}", unit),
        ("gap", f"Gap, {order[0]} minus {order[1]} {deciding.name}", of_gap),
    )


def _is_log(result: TuningResult, name: str) -> bool:
    ranges = [d for space in result.spaces for d in space.dimensions if d.name == name and isinstance(d, Range)]
    if ranges:
        return any(dimension.log for dimension in ranges)
    values = [float(trial.values[name]) for trial in result.trials if name in trial.values]
    return min(values) > 0 and max(values) >= 8 * min(values)


def _method(axes: Axes, result: TuningResult, space: Space, style: Style, name: str, field: str) -> Iterator[Any]:
    """Plot the trials of a method and mark the best, or its level if `name` is not searched; yield legend entries."""
    best = next((best.result for best in result.best if best.space == space), None)
    if any(dimension.name == name for dimension in space.dimensions):
        trials = [trial for trial in result.trials if trial.method == str(space.spec)]
        complete = [trial for trial in trials if trial.state == "complete"]
        complete.sort(key=lambda trial: float(trial.values[name]))
        each = [estimate(trial.measured(field)) for trial in complete]
        yield axes.errorbar(
            [float(trial.values[name]) for trial in complete],
            [value.mean for value in each],
            yerr=[value.sd or 0.0 for value in each] if any(value.sd for value in each) else None,
            linestyle="-" if len(space.dimensions) == 1 else "none",  # a line if only `name` changes
            color=style.color,
            linewidth=1.0,
            elinewidth=0.9,
            capsize=2.5,
            marker="o",
            markersize=4,
            label=style.label,
        )
        diverged = [float(trial.values[name]) for trial in trials if trial.state == "diverged"]
        if diverged:
            height, label = [0.03] * len(diverged), f"{style.label}: diverged"
            yield from axes.plot(
                diverged, height, "x", color=style.color, transform=axes.get_xaxis_transform(), label=label
            )
        if best is not None:
            x, mean = float(best.values[name]), estimate(best.measured(field)).mean
            label = f"{style.label}, best: {name} {best.values[name]:g}"
            yield from axes.plot(
                [x], [mean], "*", color=style.color, markersize=15, markeredgecolor="white", zorder=5, label=label
            )
    elif best is not None:
        level = estimate(best.measured(field))
        yield axes.axhline(level.mean, color=GREY, linewidth=1.2, linestyle="--", label=style.label)
        if level.sd is not None:
            axes.axhspan(level.mean - level.sd, level.mean + level.sd, color=GREY, alpha=0.15, linewidth=0)
