"""Render the results as Markdown."""

from collections.abc import Sequence
from typing import Any

from markdown_tables import row
from results import Result

Rows = Sequence[dict[str, Any]]


def render(result: Result) -> str:
    """Return the tables of steps, of evaluations and of parallel runs."""
    data = result.data
    lines = [
        f"**A training step** of the demo: batches of {data['batch']} images; milliseconds, and the ratio to the "
        "time of the first row. In brackets, the fastest and the slowest round.",
        *("", *_steps(data["steps"])),
        "",
        f"**An evaluation** of {data['images']:,} images at width {data['width']}, by the images per chunk; images per "
        "second.",
        *("", *_evaluations(data["evaluations"])),
        "",
        f"**Parallel runs** at width {data['width']}: steps per second of all runs together.",
        *("", *_parallel_runs(data["parallel_runs"])),
        *("", result.source),
    ]
    return "\n".join(lines) + "\n"


def _steps(rows: Rows) -> list[str]:
    widths = list(dict.fromkeys(values["width"] for values in rows))
    head = ["threads, precision, layout", *(f"width {width}, ms | ratio" for width in widths), "first step, s"]
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for values in rows:
        by_name.setdefault(_name(values), {})[values["width"]] = values
    lines = _head(head, 1 + 2 * len(widths) + 1)
    for name, found in by_name.items():
        cells = [cell for width in widths for cell in _time(found.get(width))]
        first = found[widths[0]]["first_step"] if any(values["compile"] for values in found.values()) else None
        lines.append(row([name, *cells, "" if first is None else f"{first:.0f}"]))
    return lines


def _evaluations(rows: Rows) -> list[str]:
    chunks = list(dict.fromkeys(values["chunk"] for values in rows))
    lines = _head(["threads, precision, layout", *map(str, chunks)], 1 + len(chunks))
    by_name: dict[str, list[str]] = {}
    for values in rows:
        by_name.setdefault(_name(values), []).append(f"{values['images'] / values['seconds']:,.0f}")
    return lines + [row([name, *cells]) for name, cells in by_name.items()]


def _parallel_runs(rows: Rows) -> list[str]:
    lines = _head(["runs", "threads, precision, layout", "steps per second", "relative to the first row"], 4, numbers=2)
    for values in rows:
        speed = f"{1 / values['ratio']:.2f} ({1 / values['ratio_most']:.2f} to {1 / values['ratio_least']:.2f})"
        lines.append(row([str(values["processes"]), _name(values), f"{1 / values['seconds']:.1f}", speed]))
    return lines


def _name(values: dict[str, Any]) -> str:
    words = [
        "1 thread" if values["threads"] == 1 else f"{values['threads']} threads",
        "bfloat16" if values["bf16"] else "float32",
        "channels-last" if values["channels_last"] else "contiguous",
        *(["compiled"] if values["compile"] else []),
    ]
    return ", ".join(words)


def _time(values: dict[str, Any] | None) -> list[str]:
    if values is None:
        return ["", ""]
    ratio = f"{values['ratio']:.2f} ({values['ratio_least']:.2f} to {values['ratio_most']:.2f})"
    return [f"{1e3 * values['seconds']:.1f}", ratio]


def _head(names: Sequence[str], columns: int, *, numbers: int = 1) -> list[str]:
    return [row(names), "|" + "---|" * numbers + "---:|" * (columns - numbers)]
