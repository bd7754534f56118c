"""The results as Markdown."""

from collections.abc import Sequence
from typing import Any

from results import Result

SHOWN = ("SAM", "SAM, a quarter climbs", "MSAM")
"""The methods that are measured at other sizes, too."""

_HEADS = ("method", "images/s", "of its base's time", "passes", "beyond them", "at most", "")


def render(result: Result) -> str:
    """Return the methods' table, and that of three of them at other sizes."""
    methods, failed, problem = result.data["methods"], result.data["failed"], result.data["problem"]
    said = f"{about(problem)} In brackets, where the middle half of the timings lies."
    lines = [said, "", _line(_HEADS), "|---|---:|---:|---:|---:|---:|---|"]
    lines += [_row(name, row) for name, row in methods.items()]
    lines += [_line([name, why, "", "", "", "", ""]) for name, why in failed.items()]
    lines += ["", *_sizes(result.data["points"]), "", result.where]
    return "\n".join(lines) + "\n"


def about(problem: dict[str, Any], *, sizes: bool = True) -> str:
    """Say what was trained and how it was computed; without the sizes, where they vary."""
    precision = "bfloat16 autocast" if problem["amp"] else "float32"
    layout = "channels-last" if problem["channels_last"] else "contiguous"
    how = [precision, layout, *(["compiled"] if problem["compile"] else [])]
    if problem["graphs"]:
        how.append("a CUDA graph a step")
    if problem["device"] == "cpu":
        how.append("1 thread" if problem["threads"] == 1 else f"{problem['threads']} threads")
    of = f" of width {problem['width']}, batches of {problem['batch']} images," if sizes else ","
    return f"PreAct ResNet-18{of} stem of stride {problem['stem_stride']}; {', '.join(how)}."


def _row(name: str, row: dict[str, Any]) -> str:
    target = row.get("target")
    cells = [
        name,
        f"{row['images_per_second']:,.0f}",
        f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
        f"{row['passes']:.4g}",
        f"{row['ratio'] / row['passes'] - 1:+.1%}",
        "" if target is None else f"{target:g}",
        "" if target is None else verdict(row),
    ]
    return _line(cells)


def verdict(row: dict[str, Any]) -> str:
    """Whether the target holds: by the median, and whether the timings are of one mind."""
    if row["ratio_high"] <= row["target"]:
        return "holds"
    if row["ratio_low"] > row["target"]:
        return "**missed**"
    return "holds, by the median" if row["ratio"] <= row["target"] else "**missed**, by the median"


def _sizes(points: list[dict[str, Any]]) -> list[str]:
    lines = [_line(["batch", "width", *SHOWN]), "|---:|---:|" + "---:|" * len(SHOWN)]
    for point in points:
        found = [point["methods"].get(name) for name in SHOWN]
        ratios = [f"{row['ratio']:.2f}" if row else "failed" for row in found]
        lines.append(_line([str(point["batch"]), str(point["width"]), *ratios]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
