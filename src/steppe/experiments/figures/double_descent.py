"""Errors and sharpness over the number of parameters, with each method's interpolation threshold."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from steppe.experiments.analysis.double_descent import INTERPOLATES, DoubleDescent, Point
from steppe.experiments.analysis.statistics import Estimate
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures.drawing import Drawing, plot_mean, save_all
from steppe.experiments.figures.style import GREY, Style, add_caption, set_log_scale, styles


def draw(recipe: Recipe, summary: DoubleDescent, folder: Path) -> list[Path]:
    """Draw `double_descent` as PNG and SVG into `folder`; return the files.

    Test and training error, and below them S(w) and the Hessian's largest eigenvalue where they were measured: the
    mean over the runs, its band one standard deviation to either side; on a logarithmic axis it ends at a tenth of it.
    """
    return save_all([Drawing("double_descent", partial(_plot, recipe, summary))], folder)


def _plot(recipe: Recipe, summary: DoubleDescent) -> Figure:
    sharp = any(point.sharpness is not None for point in summary.points)
    figure = Figure(figsize=(7.6, 9.6 if sharp else 5.4), layout="constrained")
    heights = [2, 1, 1] if sharp else [1]
    errors, *below = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _errors(errors, recipe, summary)
    if sharp:
        title = f"Sharpness S(w), rho {recipe.training.rho:g}"
        _curves(below[0], recipe, summary, "sharpness", title)
        _curves(below[1], recipe, summary, "lambda_max", "Largest eigenvalue of the Hessian")
    _widths([errors, *below], summary.points)
    _thresholds([errors, *below], recipe, summary)
    add_caption(figure, recipe, f"threshold: the smallest width with a mean training error below {INTERPOLATES:g} %")
    return figure


def _errors(axes: Axes, recipe: Recipe, summary: DoubleDescent) -> None:
    for method, style in styles(recipe).items():
        points = [point for point in summary.points if point.method == method]
        _line(axes, points, "test_error", replace(style, label=f"{style.label}, test"))
        training = Style(f"{style.label}, training", ":", style.color)
        _line(axes, points, "train_error", training, linewidth=1.2)
    axes.set(title="Test and training error", ylabel="%")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend()


def _curves(axes: Axes, recipe: Recipe, summary: DoubleDescent, field: str, title: str) -> None:
    for method, style in styles(recipe).items():
        points = [point for point in summary.points if point.method == method]
        _line(axes, points, field, style, lowest_share=0.1)
    axes.set(title=title)
    set_log_scale(axes)
    low, high = axes.get_ylim()
    set_log_scale(axes, (1, 2, 5) if high < 100 * low else (1,))


def _line(
    axes: Axes, points: Sequence[Point], field: str, style: Style, *, lowest_share: float = 0.0, linewidth: float = 2.0
) -> None:
    """Draw the points that have the field; the band ends at `lowest_share` of the mean."""
    known: list[tuple[int, Estimate]] = [(p.parameters, v) for p in points if (v := getattr(p, field)) is not None]
    if known:
        x, mean, sd = zip(*((x, v.mean, v.sd) for x, v in known), strict=True)
        band = None if set(sd) == {None} else [deviation or 0.0 for deviation in sd]
        lowest = [lowest_share * m for m in mean]
        plot_mean(axes, style, x, mean, band, lowest, linewidth=linewidth, marker="o", markersize=3)


def _widths(rows: Sequence[Axes], points: Sequence[Point]) -> None:
    """Label the axis with numbers of parameters, and its top with the widths that they belong to."""
    sizes = {point.parameters: point.width for point in points}
    for axes in rows:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    rows[-1].set_xlabel("parameters (above: width, channels of the first stage)")
    if not sizes:
        return
    top = rows[0].secondary_xaxis("top")
    top.xaxis.set_major_locator(FixedLocator(list(sizes)))
    top.xaxis.set_minor_locator(NullLocator())
    top.xaxis.set_major_formatter(lambda x, _: str(sizes.get(round(x), "")))
    top.spines["top"].set_visible(False)
    top.tick_params(length=0, pad=1)


def _thresholds(rows: Sequence[Axes], recipe: Recipe, summary: DoubleDescent) -> None:
    """Draw a line at each method's interpolation threshold; two at the same width stand beside each other."""
    sizes = {point.width: point.parameters for point in summary.points}
    taken: dict[int, int] = {}
    for method, width in summary.thresholds.items():
        if width is None:
            continue
        shift = taken[width] = taken.get(width, -1) + 1
        style = styles(recipe)[method]
        position = sizes[width] * math.exp(0.02 * shift)
        for axes in rows:
            axes.axvline(position, color=style.color, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        right = position > math.sqrt(min(sizes.values()) * max(sizes.values()))
        rows[0].annotate(
            f" {style.label}'s threshold ",
            (position, 1.0 - 0.055 * list(summary.thresholds).index(method)),
            xycoords=rows[0].get_xaxis_transform(),
            va="top",
            ha="right" if right else "left",
            fontsize=8,
            color=style.color,
        )
    if any(width is not None for width in summary.thresholds.values()):
        rows[0].axhline(INTERPOLATES, color=GREY, linewidth=0.6)
