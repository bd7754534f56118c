"""The article's four figures over compute and time, sharpness, and the Pareto picture: from the measurements alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from steppe import flatness
from steppe.experiments.config.method_spec import parse
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures import pareto
from steppe.experiments.figures.style import GREY, Style, caption, look, save, styles
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results

__all__ = ["EXTENTS", "FLATNESS", "QUANTITIES", "Extent", "Quantity", "draw"]

_BESIDE = 4  # methods, from which on the legend is beside the curves and not among them


@dataclass(frozen=True)
class Quantity:
    """One figure: a field of `Record`, its title, and its unit on the axis."""

    field: str
    title: str
    run: str
    log: bool = False


@dataclass(frozen=True)
class Extent:
    """What a quantity is drawn over: a field of `Record`, the words on the axis, and what is added to a file's name."""

    field: str
    title: str
    suffix: str = ""


QUANTITIES = (
    Quantity("train_loss", "Training loss", "cross-entropy", log=True),
    Quantity("train_accuracy", "Training accuracy", "%"),
    Quantity("test_accuracy", "Test accuracy", "%"),
    Quantity("gap", "Generalization gap", "percentage points"),
)

FLATNESS = (
    Quantity("sharpness", "Sharpness S(w)", "rise of the training loss", log=True),
    Quantity("lambda_max", "Largest eigenvalue of the Hessian", "of the training loss", log=True),
)

EXTENTS = (
    Extent("standardized_epoch", "standardized epochs = gradient evaluations / training images"),
    Extent("seconds", "training time in seconds, without measuring", suffix="_seconds"),
)


def draw(recipe: Recipe, results: Results, folder: Path) -> list[Path]:
    """Draw all figures as PNG and SVG into `folder`; return the files.

    Each quantity over each extent, all quantities over an extent as `overview`, `pareto`, and `sharpness` where it was
    measured. A line is the mean over the runs, its band one standard deviation to either side; one run is a thin line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    with look():
        for extent in EXTENTS:
            for quantity in QUANTITIES:
                figure = Figure(figsize=(6.4 + _beside(recipe), 4.4), layout="constrained")
                axes = figure.add_subplot()
                _plot(axes, quantity, extent, recipe, results)
                _legend(figure, axes, recipe)
                caption(figure, recipe)
                files += save(figure, folder / f"{quantity.field}{extent.suffix}")
            figure = Figure(figsize=(10.5 + _beside(recipe), 7.4), layout="constrained")
            panels = figure.subplots(2, 2, sharex=True)
            for axes, quantity in zip(panels.flat, QUANTITIES, strict=True):
                _plot(axes, quantity, extent, recipe, results)
            for axes in panels[0]:
                axes.set_xlabel("")
            _legend(figure, panels[0, 1], recipe)
            caption(figure, recipe)
            files += save(figure, folder / f"overview{extent.suffix}")
        files += save(pareto.draw(recipe, results), folder / "pareto")
        if any(record.sharpness is not None for records in results.values() for record in records):
            files += save(_sharpness(recipe, results), folder / "sharpness")
    return files


def _sharpness(recipe: Recipe, results: Results) -> Figure:
    """S(w) and the largest eigenvalue over compute, and where it would make a full-batch step unstable."""
    figure = Figure(figsize=(10.5 + _beside(recipe), 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, quantity in zip(panels, FLATNESS, strict=True):
        _plot(axes, quantity, EXTENTS[0], recipe, results)
    edges = False
    if recipe.base == "sgd" and not recipe.base_momentum and not recipe.weight_decay:
        for method, style in styles(recipe).items():
            edges |= _edge(panels[1], method, style, recipe, results)
    _legend(figure, panels[0], recipe)
    stable = (
        ["pale: the edge of stability of full-batch steps, 2/lr for SGD, for SAM by its gradient norm"] if edges else []
    )
    caption(figure, recipe, f"on {recipe.flatness_samples} training images, rho {recipe.rho:g}", *stable)
    return figure


def _edge(axes: Axes, method: str, style: Style, recipe: Recipe, results: Results) -> bool:
    """Draw where a method's edge of stability lies, if it is one whose edge is known."""
    spec = parse(method)
    if spec.name not in ("sgd", "sam"):
        return False
    points: dict[int, list[float]] = {}
    for record in (record for run, records in results.items() if run.method == method for record in records):
        if record.gradient_norm is not None:
            edge = (
                flatness.edge_of_stability(recipe.lr)
                if spec.name == "sgd"
                else flatness.sam_edge_of_stability(recipe.lr, spec.rho(recipe.rho), record.gradient_norm)
            )
            points.setdefault(record.standardized_epoch, []).append(float(edge))
    x = sorted(points)
    axes.plot(x, [statistics.fmean(points[e]) for e in x], style.line, color=style.color, linewidth=3, alpha=0.3)
    return bool(x)


def _plot(axes: Axes, quantity: Quantity, extent: Extent, recipe: Recipe, results: Results) -> None:
    for method, style in styles(recipe).items():
        points: dict[int, list[Record]] = {}
        for record in (record for run, records in results.items() if run.method == method for record in records):
            if getattr(record, quantity.field) is not None:
                points.setdefault(record.standardized_epoch, []).append(record)
        if points:
            _line(axes, quantity, extent, style, [points[epoch] for epoch in sorted(points)])
    axes.set_title(quantity.title)
    axes.set_xlabel(extent.title)
    axes.set_ylabel(quantity.run)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if quantity.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if extent.field == "standardized_epoch" and any(u.standardized_epochs > recipe.epochs for u in results):
        axes.axvline(recipe.epochs, color=GREY, linewidth=0.8, linestyle="--")


def _line(axes: Axes, quantity: Quantity, extent: Extent, style: Style, points: Sequence[Sequence[Record]]) -> None:
    """One method: the records of its runs, together for each point of the grid."""
    x = [statistics.fmean(getattr(record, extent.field) for record in records) for records in points]
    values = [[getattr(record, quantity.field) for record in records] for records in points]
    mean = [statistics.fmean(v) for v in values]
    several = any(len(v) > 1 for v in values)
    width = 2.0 if several else 1.2
    axes.plot(x, mean, style.line, color=style.color, linewidth=width, marker="o", markersize=3, label=style.label)
    if several:
        sd = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        # mean - sd may lie below 0, where a logarithmic axis ends: the band then ends at the smallest value
        low = [max(m - s, min(v)) if quantity.log else m - s for m, s, v in zip(mean, sd, values, strict=True)]
        high = [m + s for m, s in zip(mean, sd, strict=True)]
        axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)


def _beside(recipe: Recipe) -> float:
    """The inches that a legend beside the curves takes."""
    longest = max(len(style.label) for style in styles(recipe).values())
    return 0.8 + 0.09 * longest if len(recipe.methods) >= _BESIDE else 0.0


def _legend(figure: Figure, axes: Axes, recipe: Recipe) -> None:
    if not axes.lines:  # nothing may have been measured yet
        return
    if _beside(recipe):
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    else:
        axes.legend()
