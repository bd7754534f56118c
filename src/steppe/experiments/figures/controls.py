"""The differences to the base in each of its forms: at equal compute, and beside every control."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steppe.experiments.analysis.metric_verdicts import CONTROLS, Control, MetricVerdict
from steppe.experiments.analysis.summary import Summary
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures.drawing import Drawing
from steppe.experiments.figures.style import COLORS, GREY, add_caption

_AXIS, _ENTRY, _POINT = 1.1, 0.22, 0.17  # inches: below the rows, of an entry of the legend, and of a point


@dataclass(frozen=True)
class Row:
    """A method in one measure: how much better it is than the base, in the form of each control, with an interval."""

    label: str
    found: Mapping[Control, tuple[float, float, float]]
    """The mean and the ends of its interval; above zero is better, also of measures of which less is better."""


def drawings(recipe: Recipe, summary: Summary) -> Iterator[Drawing]:
    """Yield `controls` where a method was compared with one beside equal compute."""
    verdicts = summary.verdicts_with_controls()
    if verdicts:
        yield Drawing("controls", lambda: plot_controls(recipe, verdicts))


def legend(verdicts: Sequence[MetricVerdict]) -> list[tuple[str, str]]:
    """Return the phrase and the color of each control in the figure of these verdicts."""
    controls = controls_of([_row(verdict, "") for verdict in verdicts])
    return [(control.phrase, color) for control, color in zip(controls, COLORS, strict=False)]


def plot_controls(recipe: Recipe, verdicts: Sequence[MetricVerdict]) -> Figure:
    """Draw a row for each method and measure, and in it a point with its interval for each control."""
    labels = {str(method): method.label for method in recipe.comparison.methods}
    several = len({verdict.method for verdict in verdicts}) > 1
    rows = [_row(verdict, f"{labels[verdict.method]}: " if several else "") for verdict in verdicts]
    figure = new_figure(rows)
    (axes,) = figure.axes
    base, unit = labels[verdicts[0].base], verdicts[0].metric.unit_of_change
    ours = "" if several else f"{labels[verdicts[0].method]} "
    axes.set_xlabel(f"{ours}better than {base} by, {unit}".rstrip(", "))
    add_caption(figure, recipe, "bars are 95 % intervals of differences paired by seed")
    return figure


def new_figure(rows: Sequence[Row], width: float = 9.0) -> Figure:
    """Return a figure of the rows, with a legend of the controls that they have."""
    controls = len(controls_of(rows))
    height = _AXIS + _ENTRY * controls + _POINT * len(rows) * (controls + 1)
    figure = Figure(figsize=(width, height), layout="constrained")
    draw_rows(figure.subplots(), rows)
    figure.legend(loc="outside upper right")  # of the axes, a legend would be cut where the labels of rows are long
    return figure


def draw_rows(axes: Axes, rows: Sequence[Row], controls: Sequence[Control] = ()) -> None:
    """Draw rows from top to bottom, with a color for each control: by default, for those that the rows have."""
    controls = controls or controls_of(rows)
    axes.axvline(0.0, color=GREY, linewidth=1.0, zorder=1)
    for i, (control, color) in enumerate(zip(controls, COLORS, strict=False)):
        place = ((i + 0.5) / len(controls) - 0.5) * len(controls) / (len(controls) + 1)
        points = [(y + place, row.found[control]) for y, row in _having(rows, control)]
        if points:
            _plot_control(axes, control, color, points)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def controls_of(rows: Sequence[Row]) -> list[Control]:
    """Return the controls that some of the rows have."""
    return [control for control in CONTROLS.values() if any(control in row.found for row in rows)]


def _having(rows: Sequence[Row], control: Control) -> list[tuple[int, Row]]:
    return [(y, row) for y, row in enumerate(rows) if control in row.found]


def _plot_control(
    axes: Axes, control: Control, color: str, points: Sequence[tuple[float, tuple[float, float, float]]]
) -> None:
    y, found = zip(*points, strict=True)
    means, lows, highs = zip(*found, strict=True)
    axes.hlines(y, lows, highs, color=color, linewidth=1.4, zorder=2)
    axes.plot(means, y, "o", color=color, markersize=5, label=control.phrase, zorder=3)


def _row(verdict: MetricVerdict, prefix: str) -> Row:
    found = {
        each.control: improvement(verdict.metric.better, each.difference.mean, each.difference.interval)
        for each in verdict.comparisons
    }
    return Row(f"{prefix}{verdict.metric.name}", found)


def improvement(better: int, mean: float, interval: Sequence[float] | None) -> tuple[float, float, float]:
    """Return a difference and the ends of its interval, if it has one, as `Row` has them; `better` is 1 or -1.

    >>> improvement(-1, -3.0, (-4.0, -1.5)), improvement(1, 2.0, None)
    ((3.0, 1.5, 4.0), (2.0, 2.0, 2.0))
    """
    low, high = sorted(better * end for end in interval or (mean, mean))
    return better * mean, low, high
