"""Render the results as Markdown."""

from typing import Any

from markdown_tables import row
from results import Result

SIZED = ("SAM", "SAM, quarter batch", "MSAM")
"""The methods that are also measured at other sizes."""

_HEADS = ("method", "images/s", "time / base", "passes", "overhead", "target", "")


def render(result: Result) -> str:
    """Return the table of all methods, and that of three of them at other sizes."""
    methods, failed, problem = result.data["methods"], result.data["failed"], result.data["problem"]
    title = f"{describe(problem)} In brackets, the interquartile range of the timings."
    lines = [title, "", row(_HEADS), "|---|---:|---:|---:|---:|---:|---|"]
    lines += [_method_row(name, values) for name, values in methods.items()]
    lines += [row([name, reason, "", "", "", "", ""]) for name, reason in failed.items()]
    lines += ["", *_sizes(result.data["points"]), "", result.source]
    return "\n".join(lines) + "\n"


def describe(problem: dict[str, Any], *, sizes: bool = True) -> str:
    """Describe the network, the images and the computation; without width and batch size if they vary."""
    precision = "bfloat16 autocast" if problem["amp"] else "float32"
    layout = "channels-last" if problem["channels_last"] else "contiguous"
    details = [precision, layout, *(["compiled"] if problem["compile"] else [])]
    if problem["graphs"]:
        details.append("one CUDA graph per step")
    if problem["device"] == "cpu":
        details.append("1 thread" if problem["threads"] == 1 else f"{problem['threads']} threads")
    of = f" of width {problem['width']}, batches of {problem['batch']} images," if sizes else ","
    return f"PreAct ResNet-18{of} stem of stride {problem['stem_stride']}; {', '.join(details)}."


def _method_row(name: str, values: dict[str, Any]) -> str:
    target = values.get("target")
    cells = [
        name,
        f"{values['images_per_second']:,.0f}",
        f"{values['ratio']:.2f} ({values['ratio_low']:.2f} to {values['ratio_high']:.2f})",
        f"{values['passes']:.4g}",
        f"{values['ratio'] / values['passes'] - 1:+.1%}",
        "" if target is None else f"{target:g}",
        "" if target is None else verdict(values),
    ]
    return row(cells)


def verdict(values: dict[str, Any]) -> str:
    """Return the verdict on the target: by both quartiles of the timings, or by the median if they disagree."""
    if values["ratio_high"] <= values["target"]:
        return "holds"
    if values["ratio_low"] > values["target"]:
        return "**missed**"
    return "holds, by the median" if values["ratio"] <= values["target"] else "**missed**, by the median"


def _sizes(points: list[dict[str, Any]]) -> list[str]:
    lines = [row(["batch", "width", *SIZED]), "|---:|---:|" + "---:|" * len(SIZED)]
    for point in points:
        found = [point["methods"].get(name) for name in SIZED]
        ratios = [f"{values['ratio']:.2f}" if values else "failed" for values in found]
        lines.append(row([str(point["batch"]), str(point["width"]), *ratios]))
    return lines
