"""The results as Markdown."""

from collections.abc import Sequence
from typing import Any

from results import Result

Rows = Sequence[dict[str, Any]]


def render(result: Result) -> str:
    """Return the tables of steps, of evaluations and of runs at a time."""
    data = result.data
    lines = [
        f"**A training step** of the demo: batches of {data['batch']} images; milliseconds, and the ratio to the first "
        "line's time. In brackets the fastest and the slowest round.",
        *("", *_steps(data["steps"])),
        "",
        f"**An evaluation** of {data['images']:,} images at width {data['width']}, by the images in a chunk; images a "
        "second.",
        *("", *_evaluations(data["evaluations"])),
        "",
        f"**Runs at a time** at width {data['width']}: steps a second of all of them together.",
        *("", *_at_once(data["at_once"])),
        *("", result.where),
    ]
    return "\n".join(lines) + "\n"


def _steps(rows: Rows) -> list[str]:
    widths = list(dict.fromkeys(row["width"] for row in rows))
    head = ["threads, precision, layout", *(f"width {width}, ms | ratio" for width in widths), "its first step, s"]
    by_choice: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_choice.setdefault(_name(row), {})[row["width"]] = row
    lines = _head(head, 1 + 2 * len(widths) + 1)
    for name, found in by_choice.items():
        cells = [cell for width in widths for cell in _time(found.get(width))]
        first = found[widths[0]]["first"] if any(row["compile"] for row in found.values()) else None
        lines.append(_line([name, *cells, "" if first is None else f"{first:.0f}"]))
    return lines


def _evaluations(rows: Rows) -> list[str]:
    chunks = list(dict.fromkeys(row["chunk"] for row in rows))
    lines = _head(["threads, precision, layout", *map(str, chunks)], 1 + len(chunks))
    by_choice: dict[str, list[str]] = {}
    for row in rows:
        by_choice.setdefault(_name(row), []).append(f"{row['images'] / row['seconds']:,.0f}")
    return lines + [_line([name, *cells]) for name, cells in by_choice.items()]


def _at_once(rows: Rows) -> list[str]:
    lines = _head(["runs", "threads, precision, layout", "steps a second", "of the first line's"], 4, numbers=2)
    for row in rows:
        times = f"{1 / row['ratio']:.2f} ({1 / row['ratio_most']:.2f} to {1 / row['ratio_least']:.2f})"
        lines.append(_line([str(row["processes"]), _name(row), f"{1 / row['seconds']:.1f}", times]))
    return lines


def _name(row: dict[str, Any]) -> str:
    words = [
        "1 thread" if row["threads"] == 1 else f"{row['threads']} threads",
        "bfloat16" if row["bf16"] else "float32",
        "channels-last" if row["channels_last"] else "contiguous",
        *(["compiled"] if row["compile"] else []),
    ]
    return ", ".join(words)


def _time(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["", ""]
    return [f"{1e3 * row['seconds']:.1f}", f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})"]


def _head(names: Sequence[str], columns: int, *, numbers: int = 1) -> list[str]:
    return [_line(names), "|" + "---|" * numbers + "---:|" * (columns - numbers)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
