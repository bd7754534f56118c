"""Figures of a search: validation accuracy and gap over each number that was searched, such as rho."""

import re
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from steppe.experiments.figures.drawing import Drawing
from steppe.experiments.figures.style import GREY, Style, add_caption, styles
from steppe.experiments.storage.records import Record
from steppe.experiments.tuning.result import Best, Search, TuningResult
from steppe.experiments.tuning.search_space import Range, Space
from steppe.experiments.tuning.studies import TrialResult

_ACCURACY = ("test_accuracy", "Validation accuracy", "%")
_LOSS = ("test_loss", "Validation loss", "cross-entropy")
_GAP = ("gap", "Gap, training minus validation accuracy", "percentage points")


def draw(search: Search, results: Sequence[TrialResult], result: TuningResult, folder: Path) -> list[Path]:
    """Draw a figure for each searched number as PNG and SVG into `folder`; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    names = [d.name for space in search.spaces for d in space.dimensions]
    for name in dict.fromkeys(names):
        points = [r.values[name] for r in results if name in r.values and r.state != "running"]
        if points and not any(isinstance(value, bool | str) for value in points):
            files += Drawing(name, partial(_figure, search, results, result, name)).save(folder)
    return files


def _figure(search: Search, results: Sequence[TrialResult], result: TuningResult, name: str) -> Figure:
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    first = _ACCURACY if search.objective == "accuracy" else _LOSS
    names = [space.spec.label for space in search.spaces]
    by_method = {str(space.spec): style for space, style in zip(search.spaces, _styles(search), strict=True)}
    for axes, (field, title, unit) in zip(panels, (first, _GAP), strict=True):
        if _is_log(search, results, name):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        for space in search.spaces:
            style = by_method[str(space.spec)]
            best = next((b for b in result.best if b.space == space), None)
            if any(dimension.name == name for dimension in space.dimensions):
                _series(axes, space, style, results, name, field)
                if best is not None:
                    _mark(axes, style, best, name, field)
            elif best is not None:
                _level(axes, style, _values(best.result.runs, field))
        axes.set_title(title)
        axes.set_xlabel(name)
        axes.set_ylabel(unit)
    handles, labels = panels[0].get_legend_handles_labels()
    # matplotlib puts error bars last; here each method is next to its best trial
    order = sorted(zip(labels, handles, strict=True), key=lambda entry: _rank(entry[0], names))
    panels[0].legend([handle for _, handle in order], [text for text, _ in order])
    add_caption(figure, search.recipe, f"equal compute; validation: one in {search.hold_out} training images, held out")
    return figure


def _rank(text: str, names: Sequence[str]) -> tuple[int, int]:
    """Return the position of a legend entry: that of its method, then the shorter text first."""
    return names.index(re.sub(r"(, best: .*|: diverged)$", "", text)), len(text)


def _styles(search: Search) -> list[Style]:
    """Return the style of each method, by its position, as in a comparison."""
    methods = tuple(space.spec for space in search.spaces)
    return list(styles(search.recipe.replace(methods=methods)).values())


def _is_log(search: Search, results: Sequence[TrialResult], name: str) -> bool:
    dimensions = [d for space in search.spaces for d in space.dimensions if d.name == name]
    if any(isinstance(dimension, Range) for dimension in dimensions):
        return any(isinstance(dimension, Range) and dimension.log for dimension in dimensions)
    values = [float(r.values[name]) for r in results if name in r.values]
    return min(values) > 0 and max(values) >= 8 * min(values)


def _series(axes: Axes, space: Space, style: Style, results: Sequence[TrialResult], name: str, field: str) -> None:
    """Plot the trials, with a line if only `name` changes from one to the next."""
    complete = [r for r in results if r.method == str(space.spec) and r.state == "complete"]
    complete.sort(key=lambda r: float(r.values[name]))
    x = [float(r.values[name]) for r in complete]
    mean = [statistics.fmean(_values(r.runs, field)) for r in complete]
    sd = [statistics.stdev(v) if len(v := _values(r.runs, field)) > 1 else 0.0 for r in complete]
    line = "-" if len(space.dimensions) == 1 else "none"
    axes.errorbar(
        x,
        mean,
        yerr=sd if any(sd) else None,
        linestyle=line,
        color=style.color,
        linewidth=1.0,
        elinewidth=0.9,
        capsize=2.5,
        marker="o",
        markersize=4,
        label=space.spec.label,
    )
    diverged = [float(r.values[name]) for r in results if r.method == str(space.spec) and r.state == "diverged"]
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
    value = best.result.values[name]
    x, y = float(value), statistics.fmean(_values(best.result.runs, field))
    label = f"{best.space.spec.label}, best: {name} {value:g}"
    axes.plot([x], [y], "*", color=style.color, markersize=15, markeredgecolor="white", zorder=5, label=label)


def _level(axes: Axes, style: Style, values: Sequence[float]) -> None:
    mean = statistics.fmean(values)
    axes.axhline(mean, color=GREY, linewidth=1.2, linestyle="--", label=style.label)
    if len(values) > 1:
        sd = statistics.stdev(values)
        axes.axhspan(mean - sd, mean + sd, color=GREY, alpha=0.15, linewidth=0)


def _values(runs: Sequence[Record], field: str) -> list[float]:
    return [getattr(run, field) for run in runs]
