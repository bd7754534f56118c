"""The accuracy on clean and on corrupted images and with rounded weights, and its differences to the first method."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steppe.experiments.analysis.metric_verdicts import with_interval
from steppe.experiments.analysis.robustness import Robustness
from steppe.experiments.analysis.statistics import Decision, Estimate
from steppe.experiments.analysis.summary import Summary
from steppe.experiments.analysis.words import word
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.task_info import MetricInfo
from steppe.experiments.figures.drawing import Drawing, tag, tag_legend
from steppe.experiments.figures.style import CARD, GREY, Style, add_caption, styles

_LEAST, _PER_METHOD = 0.22, 0.09  # inches of a row, and what each method adds
_SHARE = 0.72  # of a row, over which its methods are spread
_LEGEND = 0.28  # inches of a line of the legend, and the methods in it
_IN_A_LINE = 5


@dataclass(frozen=True)
class _Line:
    """One accuracy: its label, and by method its values and its differences to the first method."""

    label: str
    metric: MetricInfo
    values: Mapping[str, Estimate]
    differences: Mapping[str, Decision]


def drawings(recipe: Recipe, summary: Summary) -> Iterator[Drawing]:
    """Yield `robustness` where it was measured: the accuracies and, if there is more than one method, differences."""
    robustness = summary.robustness
    if robustness is not None:
        yield Drawing("robustness", lambda: plot_robustness(recipe, robustness, summary))


def plot_robustness(recipe: Recipe, robustness: Robustness, summary: Summary) -> Figure:
    """Draw one row for each accuracy and in it one point a method, with its standard deviation or its interval."""
    lines, look = _lines(recipe, robustness, summary), {str(m): style for m, style in styles(recipe).items()}
    look = {str(method): look[str(method)] for method in robustness.methods}
    height = len(lines) * (_LEAST + _PER_METHOD * len(look))
    legend = _LEGEND * -(-len(look) // _IN_A_LINE)
    figure = Figure(figsize=(13.0, 1.4 + legend + height), layout="constrained")
    has_differences = any(line.differences for line in lines)
    panels = figure.subplots(1, 1 + has_differences, squeeze=False).flatten()
    _plot(panels[0], lines, look, [line.values for line in lines])
    panels[0].set(title="Accuracy", xlabel="test accuracy, %")
    if has_differences:
        _plot_differences(panels[1], lines, look)
        panels[1].set(title=f"Difference to {recipe.comparison.methods[0].label}", xlabel="percentage points")
    handles = panels[0].get_legend_handles_labels()
    tag_legend(figure.legend(*handles, loc="outside lower left", ncols=_IN_A_LINE))
    intervals = "on the right, differences paired by seed, and bars are 95 % intervals"
    add_caption(figure, recipe, *([intervals] if has_differences and recipe.comparison.seeds > 1 else []))
    return figure


def _lines(recipe: Recipe, robustness: Robustness, summary: Summary) -> list[_Line]:
    """Return the accuracy on clean images, and below it all that were measured."""
    metric, epochs = summary.task.deciding, recipe.comparison.epochs
    rows = {str(row.method): row for row in summary.rows if row.standardized_epoch == epochs}
    clean = {str(m): rows[str(m)].measures[f"test_{metric.name}"] for m in robustness.methods if str(m) in rows}
    paired = {verdict.method: verdict.first.difference for verdict in summary.verdicts if verdict.method in clean}
    lines = [_Line("clean images", metric, clean, paired)]
    for measure in robustness.measures:
        if measure.unit == "%" and measure.higher_is_better:
            values = {
                method: found[measure.name] for method, found in robustness.values.items() if measure.name in found
            }
            verdicts = robustness.verdicts.get(measure.name, ())
            differences = {verdict.method: verdict.first.difference for verdict in verdicts}
            info = MetricInfo(measure.name, unit=measure.unit)
            lines.append(_Line(measure.heading.replace("\n", " "), info, values, differences))
    return lines


def _plot(
    axes: Axes, lines: Sequence[_Line], look: Mapping[str, Style], shown: Sequence[Mapping[str, Estimate]]
) -> None:
    """Draw the means, their standard deviations, and the names of the rows."""
    for place, (method, style) in zip(_places(look), look.items(), strict=True):
        rows = [row for row, values in enumerate(shown) if method in values]
        found = [shown[row][method] for row in rows]
        tips = [
            f"{style.label}, {lines[r].label}: {v.text('.2f', sign=' ± ')} %" for r, v in zip(rows, found, strict=True)
        ]
        bars = [(value.mean - (value.sd or 0.0), value.mean + (value.sd or 0.0)) for value in found]
        _plot_method(axes, style, [row + place for row in rows], [value.mean for value in found], bars, tips)
    _finish(axes, lines)


def _plot_differences(axes: Axes, lines: Sequence[_Line], look: Mapping[str, Style]) -> None:
    """Draw the mean differences, and the intervals where there are some."""
    for place, (method, style) in zip(_places(look), look.items(), strict=True):
        rows = [row for row, line in enumerate(lines) if method in line.differences]
        found = [lines[row].differences[method] for row in rows]
        tips = [
            f"{style.label}, {lines[r].label}: {with_interval(d, lines[r].metric)}, {word(d, better=1)}"
            for r, d in zip(rows, found, strict=True)
        ]
        bars = [difference.interval or (difference.mean,) * 2 for difference in found]
        _plot_method(axes, style, [row + place for row in rows], [value.mean for value in found], bars, tips)
    axes.axvline(0.0, color=GREY, linewidth=1.0, zorder=1)
    axes.text(0.99, 0.005, "better →", ha="right", va="bottom", transform=axes.transAxes, fontsize=8, color=GREY)
    _finish(axes, lines)


def _plot_method(
    axes: Axes,
    style: Style,
    y: Sequence[float],
    means: Sequence[float],
    bars: Sequence[tuple[float, float]],
    tips: Sequence[str],
) -> None:
    if not y:
        return
    low, high = zip(*bars, strict=True)
    tag(axes.hlines(y, low, high, color=style.color, linewidth=1.4, zorder=2), style.label)
    face = style.color if style.line == "-" else CARD
    (points,) = axes.plot(
        means, y, "o", color=style.color, markerfacecolor=face, markersize=6, label=style.label, zorder=3
    )
    tag(points, style.label, tips=tips)


def _places(look: Mapping[str, Style]) -> list[float]:
    """Return the distance of each method's point from the middle of a row."""
    return [_SHARE * ((i + 0.5) / len(look) - 0.5) for i in range(len(look))]


def _finish(axes: Axes, lines: Sequence[_Line]) -> None:
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for row in range(1, len(lines), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=GREY, alpha=0.07, linewidth=0, zorder=0)
