"""Render the results as Markdown."""

from typing import Any

from markdown_tables import row
from results import Result


def render(result: Result) -> str:
    """Return a table of all loops, and the time of the whole experiment with the fastest configuration."""
    found = result.data
    load = found["workload"]
    lines = [
        f"Seconds of one pass over {load['images']:,} images of 28 x 28 pixels, extrapolated from "
        f"{load['steps_per_timing']} steps at a time; PreAct ResNet-18 of width {load['width']}, batches of "
        f"{load['batch_size']}. In brackets, the speed relative to the article's style, round by round.",
        "",
        "| loop | SGD | SAM | warm-up |",
        "|---|---:|---:|---:|",
        *(_row(name, rows) for name, rows in _by_configuration(found["rows"]).items()),
        "",
        *_conclusion(found),
        "",
        result.source,
    ]
    return "\n".join(lines) + "\n"


def _by_configuration(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for values in rows:
        found.setdefault(values["configuration"], {})[values["method"]] = values
    return found


def _row(name: str, rows: dict[str, dict[str, Any]]) -> str:
    warmup = [values["warmup"] for values in rows.values() if "warmup" in values]
    cells = [_cell(rows.get(method)) for method in ("sgd", "sam")]
    return row([name, *cells, f"{sum(warmup):.0f} s" if warmup else ""])


def _cell(values: dict[str, Any] | None) -> str:
    if values is None:
        return ""
    if "failed" in values:
        return str(values["failed"]).replace("|", "/")
    return f"{values['seconds']:.3g} ({1 / values['ratio']:.2f}x)"


def _conclusion(found: dict[str, Any]) -> list[str]:
    fastest = found.get("fastest_configuration")
    if fastest is None:
        return ["No configuration could be measured."]
    lines = [f"Fastest configuration that a recipe can select: {fastest}."]
    bound = found["lower_bound"]
    best = min(r["seconds"] for r in found["rows"] if r["configuration"] == fastest and "seconds" in r)
    lines.append(
        f"The lower bound for a pass is {bound['seconds']:.3g} s: {bound['operations']:.3g} operations take "
        f"{bound['seconds_of_operations']:.3g} s at the {bound['operations_per_second']:.3g} per second measured for a "
        f"bfloat16 matrix product, {bound['bytes']:.3g} bytes of activations take {bound['seconds_of_bytes']:.3g} s at "
        f"the {bound['bytes_per_second']:.3g} per second measured for a copy. The fastest loop takes "
        f"{best / bound['seconds']:.1f} times that."
    )
    if "experiment_minutes" in found:
        minutes, passes = found["experiment_minutes"], found["experiment_passes"]
        whole = {name: min(times) for name, times in found["whole_passes"].items()}
        lines.append(
            f"A whole pass: SGD {whole['sgd']:.3g} s, SAM {whole['sam']:.3g} s. The article's experiment with one "
            f"seed, {passes['sgd']} passes of SGD and {passes['sam']} of SAM: {minutes['total']:.1f} minutes "
            f"({minutes['training']:.1f} training, {minutes['evaluation']:.1f} evaluation, "
            f"{minutes['checkpoints']:.1f} checkpoints)."
        )
    elif "whole_passes_failed" in found:
        lines.append(f"The whole passes {found['whole_passes_failed']}.")
    return ["  \n".join(lines)]
