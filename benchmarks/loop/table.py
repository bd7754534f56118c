"""The results as Markdown."""

from typing import Any

from results import Result


def render(result: Result) -> str:
    """Return a table of all choices, and what the fastest makes of the experiment."""
    found = result.data
    of = found["setting"]
    lines = [
        f"Seconds of one pass over {of['images']:,} images of 28 x 28 pixels, extrapolated from "
        f"{of['steps_in_a_timing']} steps at a time; PreAct ResNet-18 of width {of['width']}, batches of "
        f"{of['batch_size']}. In brackets, how many times as fast as the article's style, round by round.",
        "",
        "| loop | SGD | SAM | warm-up |",
        "|---|---:|---:|---:|",
        *(_row(name, rows) for name, rows in _by_choice(found["rows"]).items()),
        "",
        *_end(found),
        "",
        result.where,
    ]
    return "\n".join(lines) + "\n"


def _by_choice(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["choice"], {})[row["method"]] = row
    return found


def _row(name: str, rows: dict[str, dict[str, Any]]) -> str:
    warm = [row["warm_up"] for row in rows.values() if "warm_up" in row]
    cells = [name, *(_cell(rows.get(method)) for method in ("sgd", "sam")), f"{sum(warm):.0f} s" if warm else ""]
    return "| " + " | ".join(cells) + " |"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return str(row["failed"]).replace("|", "/")
    return f"{row['seconds']:.3g} ({1 / row['ratio']:.2f}x)"


def _end(found: dict[str, Any]) -> list[str]:
    if found.get("fastest_choice") is None:
        return ["No choice could be measured."]
    lines = [f"Fastest of what a recipe can ask for: {found['fastest_choice']}."]
    at = found["floor"]
    best = min(r["seconds"] for r in found["rows"] if r["choice"] == found["fastest_choice"] and "seconds" in r)
    lines.append(
        f"The floor of a pass is {at['seconds']:.3g} s: {at['operations']:.3g} operations at the measured "
        f"{at['operations_per_second']:.3g} a second of a bfloat16 matrix product take "
        f"{at['seconds_of_operations']:.3g} s, {at['bytes']:.3g} bytes of activations at the measured "
        f"{at['bytes_per_second']:.3g} a second "
        "of a copy take "
        f"{at['seconds_of_bytes']:.3g} s. The fastest is {best / at['seconds']:.1f} times that."
    )
    if "experiment_minutes" in found:
        minutes, passes = found["experiment_minutes"], found["experiment_passes"]
        whole = {name: min(times) for name, times in found["whole_passes"].items()}
        lines.append(
            f"A whole pass: SGD {whole['sgd']:.3g} s, SAM {whole['sam']:.3g} s. The article's experiment with one "
            f"seed, {passes['sgd']} passes of SGD and {passes['sam']} of SAM: {minutes['together']:.1f} minutes "
            f"({minutes['training']:.1f} training, {minutes['evaluation']:.1f} evaluation, "
            f"{minutes['checkpoints']:.1f} checkpoints)."
        )
    elif "whole_passes_failed" in found:
        lines.append(f"The whole passes {found['whole_passes_failed']}.")
    return ["  \n".join(lines)]
