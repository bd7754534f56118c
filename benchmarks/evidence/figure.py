"""Draw the differences of a recipe: a row for each method and measure, a point with its interval for each control."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from evidence.recipes import EVIDENCE
from evidence.table import label, recipe_of, verdicts
from results import Result
from steppe.experiments.analysis.metric_verdicts import CONTROLS
from steppe.experiments.figures.style import COLORS, GREY, use_style

_HEIGHT = 0.62  # inches of a row


def draw(result: Result, path: Path) -> None:
    """Write the figure of a recipe."""
    measures = EVIDENCE[recipe_of(result)].measures
    rows = [
        (setting, method, measure, by_name[method, measure])
        for setting, found in result.data["settings"].items()
        for by_name in [verdicts(found["summary"])]
        for method in dict.fromkeys(method for method, _ in by_name)
        for measure in measures
        if (method, measure) in by_name
    ]
    with use_style():
        figure = Figure(figsize=(9.0, 1.3 + _HEIGHT * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=GREY, linewidth=1)
        for i, (control, color) in enumerate(zip(CONTROLS.values(), COLORS, strict=False)):
            points = [
                (y + 0.17 * (i - 1.5), each["difference"])
                for y, (*_, verdict) in enumerate(rows)
                for each in verdict["comparisons"]
                if each["control"] == control.name
            ]
            means = [difference["mean"] for _, difference in points]
            halves = [difference["half_width_95"] or 0.0 for _, difference in points]
            heights = [y for y, _ in points]
            axes.errorbar(means, heights, xerr=halves, fmt="o", color=color, markersize=5, label=control.phrase)
        axes.set_yticks(range(len(rows)), _labels(rows))
        axes.invert_yaxis()
        axes.set(xlabel="difference to the base, percentage points; bars are 95 % intervals")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(path)


def _labels(rows: Sequence[tuple[str, str, str, object]]) -> list[str]:
    """Return the labels of rows: what all of them have in common is left out."""
    labels = []
    for setting, method, measure, _ in rows:
        parts = [setting, label(method), measure]
        varies = [len({each[i] for each in rows}) > 1 for i in range(3)]
        labels.append(", ".join(part for part, shown in zip(parts, varies, strict=True) if shown and part) or measure)
    return labels
