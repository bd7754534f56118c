"""The cost of a step, in steps of its base, against batch size and width; one row of panels a device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from epoch.table import SHOWN, about
from results import Result
from steppe.experiments.figures.style import in_turn, look, save, tell


def draw(results: Sequence[Result], path: Path) -> list[Path]:
    """Draw what all devices have measured as PNG and SVG beside `path`; return the files.

    Medians, their bands from the lower to the upper quartile; a dashed line is the planned number of passes.
    """
    with look():
        figure = Figure(figsize=(8.4, 0.9 + 3.2 * len(results)), layout="constrained")
        rows = figure.subplots(len(results), 2, squeeze=False, sharey="row")
        for (by_batch, by_width), result in zip(rows, results, strict=True):
            problem, points = result.data["problem"], result.data["points"]
            _panel(by_batch, [p for p in points if p["width"] == problem["width"]], "batch")
            _panel(by_width, [p for p in points if p["batch"] == problem["batch"]], "width")
            by_batch.set_title(result.device)
            by_batch.set_ylabel("time, of a step of the base")
            by_batch.set_xlabel(f"batch, images (width {problem['width']})")
            by_width.set_xlabel(f"width, channels of the first stage (batches of {problem['batch']})")
        rows[0, 0].legend()
        tell(figure, *dict.fromkeys(about(result.data["problem"], sizes=False) for result in results))
        return save(figure, path.with_suffix(""))


def _panel(axes: Axes, points: Sequence[dict[str, Any]], along: str) -> None:
    points = sorted(points, key=lambda point: point[along])
    for name, style in zip(SHOWN, in_turn(SHOWN), strict=True):
        known = [(point[along], point["methods"][name]) for point in points if name in point["methods"]]
        if not known:
            continue
        x, rows = zip(*known, strict=True)
        axes.plot(x, [row["ratio"] for row in rows], style.line, color=style.color, marker="o", label=style.label)
        low, high = ([row[end] for row in rows] for end in ("ratio_low", "ratio_high"))
        axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
        axes.axhline(rows[0]["passes"], color=style.color, linewidth=0.8, linestyle="--", zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([point[along] for point in points]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
