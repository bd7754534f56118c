"""Render the results as Markdown."""

from typing import Any

_HEADS = {
    "lambda_max": "| tool | settings | error | products | seconds | of Steppe's time |\n|---|---|---:|---:|---:|---:|",
    "density": "| tool | seconds | of Steppe's time |\n|---|---:|---:|",
    "memory": "| tool | 1 batch | 4 batches | 16 batches |\n|---|---:|---:|---:|",
}


def render(results: dict[str, Any]) -> str:
    """Return one section per case."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    lines = [
        "Made by `python benchmarks/flatness/run.py`, which describes the measurement.",
        f"Measured on {results['machine']}, torch {results['torch']}, {results['date']}, in one thread; {versions}.",
    ]
    for case in results["cases"].values():
        lines += ["", _title(case), "", _HEADS[case["kind"]], *(_line(case["kind"], row) for row in case["rows"])]
    return "\n".join(lines) + "\n"


def _title(case: dict[str, Any]) -> str:
    if case["kind"] == "memory":
        return "**Memory** beyond a training step's, MiB, by number of batches (width 8, batches of 128 images)"
    batches = "one batch" if case["batches"] == 1 else f"{case['batches']} batches"
    what = f"width {case['width']}, {case['n']:,} weights, {batches} of 128 images"
    if case["kind"] == "density":
        return f"**Density**, {case['probes']} probes of {case['num_iterations']} iterations: {what}"
    return f"**lambda_max** = {case['exact']:.4f}: {what}"


def _line(kind: str, row: dict[str, Any]) -> str:
    if kind == "memory":
        cells = [row["tool"], *(f"{row[k]:.0f}" for k in ("1", "4", "16"))]
        return "| " + " | ".join(cells) + " |"
    if "failed" in row:
        return f"| {row['tool']} | {row['failed']} | |"
    time = f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})"
    ratio = f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})"
    cells = [row["tool"], time, ratio]
    if kind == "lambda_max":
        settings = row["settings"] + (" (tuned)" if row["tuned"] else "")
        cells[1:1] = [settings, f"{row['error']:.0e}" + ", above 1e-3" * (row["error"] > 1e-3), f"{row['products']:g}"]
    return "| " + " | ".join(cells) + " |"
