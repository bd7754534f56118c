"""Draw the cost of a step, in steps of its base, against batch size and width; one row of panels per device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from epoch.table import SIZED, describe
from results import Result
from steppe.experiments.figures.drawing import Drawing
from steppe.experiments.figures.style import add_text, styles_of, use_style


def draw(results: Sequence[Result], path: Path) -> list[Path]:
    """Draw the results of all devices as PNG and SVG beside `path`; return the files.

    Lines are medians, bands reach from the lower to the upper quartile, and dashed lines are the planned passes.
    """
    with use_style():
        figure = Figure(figsize=(8.4, 0.9 + 3.2 * len(results)), layout="constrained")
        rows = figure.subplots(len(results), 2, squeeze=False, sharey="row")
        for (by_batch, by_width), result in zip(rows, results, strict=True):
            problem, points = result.data["problem"], result.data["points"]
            _panel(by_batch, [p for p in points if p["width"] == problem["width"]], "batch")
            _panel(by_width, [p for p in points if p["batch"] == problem["batch"]], "width")
            by_batch.set_title(result.device)
            by_batch.set_ylabel("time, in steps of the base")
            by_batch.set_xlabel(f"batch, images (width {problem['width']})")
            by_width.set_xlabel(f"width, channels of the first stage (batches of {problem['batch']})")
        rows[0, 0].legend()
        add_text(figure, *dict.fromkeys(describe(result.data["problem"], sizes=False) for result in results))
        return Drawing(path.stem, lambda: figure).save(path.parent)


def _panel(axes: Axes, points: Sequence[dict[str, Any]], size: str) -> None:
    points = sorted(points, key=lambda point: point[size])
    for name, style in zip(SIZED, styles_of(SIZED), strict=True):
        known = [(point[size], point["methods"][name]) for point in points if name in point["methods"]]
        if not known:
            continue
        x, rows = zip(*known, strict=True)
        axes.plot(x, [row["ratio"] for row in rows], style.line, color=style.color, marker="o", label=style.label)
        low, high = ([row[end] for row in rows] for end in ("ratio_low", "ratio_high"))
        axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
        axes.axhline(rows[0]["passes"], color=style.color, linewidth=0.8, linestyle="--", zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([point[size] for point in points]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
