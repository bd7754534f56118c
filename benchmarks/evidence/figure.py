"""Draw the differences of a recipe: a row for each setting, method and measure, a point for each control."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evidence.measured import Measured
from evidence.recipes import EVIDENCE
from evidence.table import label, verdicts
from steppe.experiments.analysis.metric_verdicts import CONTROLS
from steppe.experiments.analysis.statistics import estimate
from steppe.experiments.figures.controls import Row, controls_of, draw_rows, improvement, new_figure
from steppe.experiments.figures.drawing import plot_mean
from steppe.experiments.figures.style import styles_of, use_style

_PANEL, _TITLE, _ENTRY, _POINT = 3.2, 0.9, 0.22, 0.11
"""In inches: the width of a panel, and the heights of its title, of an entry of the legend and of a point."""

Place = tuple[str, str, str]
"""Setting, method and measure."""


def draw(measured: Measured, path: Path) -> None:
    """Write the figure of a recipe."""
    evidence = EVIDENCE[measured.recipe]
    measures = evidence.drawn or evidence.measures
    found: dict[Place, Mapping[str, Any]] = {}
    for setting, of in measured.others.items():
        by_name = verdicts(of["summary"])
        for method in dict.fromkeys(method for method, _ in by_name):
            found |= {(setting, method, m): by_name[method, m] for m in measures if (method, m) in by_name}
    with use_style():
        if all(_varies(list(found))):
            figure = _grid(found)
        else:
            figure = new_figure([_row(text, found[place]) for place, text in _labels(list(found)).items()])
        figure.supxlabel("better than the base by, percentage points; bars are 95 % intervals", fontsize="medium")
        figure.savefig(path)


def draw_headline(measured: Measured, path: Path, setting: str) -> None:
    """Write the figure of the README: the accuracy over the compute in one setting, and all settings' differences."""
    curves = measured.settings[setting]["curves"]
    found = {
        (name, method, measure): verdict
        for name, of in measured.settings.items()
        for (method, measure), verdict in verdicts(of["summary"]).items()
        if measure == "accuracy" and method in of["chosen"]
    }
    with use_style():
        rows = [_row(name, verdict) for (name, *_), verdict in found.items()]
        figure = Figure(figsize=(11.0, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.3))
        for style, points in zip(styles_of([label(method) for method in curves]), curves.values(), strict=True):
            estimates = [estimate(runs) for _, *runs in points]
            mean, sd = [one.mean for one in estimates], [one.sd or 0.0 for one in estimates]
            plot_mean(left, style, [epoch for epoch, *_ in points], mean, sd)
        left.set(title=f"{setting} training labels", xlabel="standardized epochs (equal compute)")
        left.set_ylabel("test accuracy, %")
        left.legend()
        draw_rows(right, rows)
        handles, phrases = right.get_legend_handles_labels()
        labels = [f"than SGD {phrase}" for phrase in phrases]
        figure.legend(handles, labels, loc="outside upper right", ncols=2)
        right.set_xlabel("SAM better by, points of test accuracy")
        figure.savefig(path)


def _grid(found: Mapping[Place, Mapping[str, Any]]) -> Figure:
    """Return a figure with a panel for each setting and measure, and in it a row for each method."""
    settings, measures = (list(dict.fromkeys(place[i] for place in found)) for i in (0, 2))
    methods = {setting: list(dict.fromkeys(m for of, m, _ in found if of == setting)) for setting in settings}
    controls = controls_of([_row("", verdict) for verdict in found.values()])
    heights = [_TITLE + _POINT * len(methods[setting]) * (len(controls) + 1) for setting in settings]
    size = (_PANEL * (len(measures) + 1), _ENTRY * len(controls) + sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(settings), len(measures), squeeze=False, height_ratios=heights)
    for of_setting, setting in zip(panels, settings, strict=True):
        for axes, measure in zip(of_setting, measures, strict=True):
            draw_rows(axes, [_row(label(m), found[setting, m, measure]) for m in methods[setting]], controls)
            axes.set_title(f"{setting}\n{measure.replace('_', ' ')}")
            if axes is not of_setting[0]:
                axes.set_yticklabels([])
    entries = (entry for axes in panels.flat for entry in zip(*axes.get_legend_handles_labels(), strict=True))
    points = {phrase: point for point, phrase in entries}
    figure.legend([points[c.phrase] for c in controls], [c.phrase for c in controls], loc="outside upper right")
    return figure


def _varies(places: Sequence[Place]) -> list[bool]:
    """Return for settings, methods and measures if there are several."""
    return [len({place[i] for place in places}) > 1 for i in range(3)]


def _labels(places: Sequence[Place]) -> dict[Place, str]:
    """Return the labels of rows: what all of them have in common is left out."""
    varies = _varies(places)
    labels = {}
    for setting, method, measure in places:
        parts = [part for part, shown in zip((setting, label(method), measure), varies, strict=True) if shown and part]
        labels[setting, method, measure] = ", ".join(parts) or measure
    return labels


def _row(text: str, verdict: Mapping[str, Any]) -> Row:
    better = 1 if verdict["metric"]["higher_is_better"] else -1
    differences = {CONTROLS[each["control"]]: each["difference"] for each in verdict["comparisons"]}
    return Row(text, {c: improvement(better, d["mean"], d["interval_95"]) for c, d in differences.items()})
