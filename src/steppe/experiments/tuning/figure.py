"""Figures of a search: validation accuracy and gap over each number that was searched, such as rho."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from steppe.experiments.analysis.statistics import estimate
from steppe.experiments.figures.drawing import Drawing
from steppe.experiments.figures.style import GREY, Style, add_caption, styles
from steppe.experiments.storage.records import Record
from steppe.experiments.tuning.result import Best, Search, TuningResult
from steppe.experiments.tuning.search_space import Range, Space
from steppe.experiments.tuning.studies import TrialResult

_ACCURACY = ("test_accuracy", "Validation accuracy", "%")
_LOSS = ("test_loss", "Validation loss", "cross-entropy")
_GAP = ("gap", "Gap, training minus validation accuracy", "percentage points")


def draw(search: Search, results: Sequence[TrialResult], result: TuningResult, folder: Path) -> None:
    """Draw a figure for each searched number as PNG and SVG into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(d.name for space in search.spaces for d in space.dimensions):
        points = [r.values[name] for r in results if name in r.values and r.state != "running"]
        if points and not any(isinstance(value, bool | str) for value in points):
            Drawing(name, partial(_figure, search, results, result, name)).save(folder)


def _figure(search: Search, results: Sequence[TrialResult], result: TuningResult, name: str) -> Figure:
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    first = _ACCURACY if search.by_accuracy else _LOSS
    best_of = {str(best.space.spec): best for best in result.best}
    # by position, as in a comparison
    methods = styles(search.recipe.replace(methods=tuple(space.spec for space in search.spaces)))
    log = _is_log(search, results, name)
    for axes, (field, title, unit) in zip(panels, (first, _GAP), strict=True):
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        for space, style in zip(search.spaces, methods.values(), strict=True):
            best = best_of.get(str(space.spec))
            if any(dimension.name == name for dimension in space.dimensions):
                _series(axes, space, style, results, name, field)
                if best is not None:
                    _mark(axes, style, best, name, field)
            elif best is not None:
                _level(axes, style, best, field)
        axes.set_title(title)
        axes.set_xlabel(name)
        axes.set_ylabel(unit)
    handles, labels = panels[0].get_legend_handles_labels()
    # matplotlib puts error bars last; here each method is next to its best trial, the shorter text first
    names = [space.spec.label for space in search.spaces]
    method = {text: names.index(re.sub(r"(, best: .*|: diverged)$", "", text)) for text in labels}
    order = sorted(zip(labels, handles, strict=True), key=lambda entry: (method[entry[0]], len(entry[0])))
    panels[0].legend([handle for _, handle in order], [text for text, _ in order])
    add_caption(figure, search.recipe, f"equal compute; validation: one in {search.hold_out} training images, held out")
    return figure


def _is_log(search: Search, results: Sequence[TrialResult], name: str) -> bool:
    ranges = [d for space in search.spaces for d in space.dimensions if d.name == name and isinstance(d, Range)]
    if ranges:
        return any(dimension.log for dimension in ranges)
    values = [float(r.values[name]) for r in results if name in r.values]
    return min(values) > 0 and max(values) >= 8 * min(values)


def _series(axes: Axes, space: Space, style: Style, results: Sequence[TrialResult], name: str, field: str) -> None:
    """Plot the trials, with a line if only `name` changes from one to the next."""
    trials = [r for r in results if r.method == str(space.spec)]
    complete = sorted((r for r in trials if r.state == "complete"), key=lambda r: float(r.values[name]))
    diverged = [float(r.values[name]) for r in trials if r.state == "diverged"]
    each = [estimate(_values(r.runs, field)) for r in complete]
    axes.errorbar(
        [float(r.values[name]) for r in complete],
        [value.mean for value in each],
        yerr=[value.sd or 0.0 for value in each] if any(value.sd for value in each) else None,
        linestyle="-" if len(space.dimensions) == 1 else "none",
        color=style.color,
        linewidth=1.0,
        elinewidth=0.9,
        capsize=2.5,
        marker="o",
        markersize=4,
        label=space.spec.label,
    )
    if diverged:
        axes.plot(
            diverged,
            [0.03] * len(diverged),
            "x",
            color=style.color,
            transform=axes.get_xaxis_transform(),
            label=f"{space.spec.label}: diverged",
        )


def _mark(axes: Axes, style: Style, best: Best, name: str, field: str) -> None:
    x, mean = float(best.result.values[name]), estimate(_values(best.result.runs, field)).mean
    label = f"{best.space.spec.label}, best: {name} {best.result.values[name]:g}"
    axes.plot([x], [mean], "*", color=style.color, markersize=15, markeredgecolor="white", zorder=5, label=label)


def _level(axes: Axes, style: Style, best: Best, field: str) -> None:
    value = estimate(_values(best.result.runs, field))
    axes.axhline(value.mean, color=GREY, linewidth=1.2, linestyle="--", label=style.label)
    if value.sd is not None:
        axes.axhspan(value.mean - value.sd, value.mean + value.sd, color=GREY, alpha=0.15, linewidth=0)


def _values(runs: Sequence[Record], field: str) -> list[float]:
    return [getattr(run, field) for run in runs]
