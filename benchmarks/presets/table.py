"""Render the runs of a stage as a table: means, standard deviations, and differences to SAM paired by seed."""

from typing import Any

from markdown_tables import difference, mean_and_sd, row
from results import Result
from steppe.experiments.analysis.statistics import Estimate, estimate

_HEADS = "| method | passes per step | test % | gap, points | test - SAM | gap - SAM | runs |"
_LINE = "|---|---:|---:|---:|---:|---:|---:|"


def render(result: Result) -> str:
    """Return the table, best test accuracy first; "SAM" in its head is SAM with the radius of best test accuracy."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for run in result.data["runs"]:
        runs.setdefault(run["method"], {})[run["seed"]] = run
    order = sorted(runs, key=lambda method: -_estimate(runs[method], "test_accuracy").mean)
    sam = next((method for method in order if method.partition(":")[0] == "sam"), None)
    lines = [_row(method, runs[method], runs[sam] if sam and method != sam else {}) for method in order]
    title = f"{result.data['epochs']} standardized epochs on {result.data['description']}."
    return "\n".join([title, "", _HEADS, _LINE, *lines, "", result.source]) + "\n"


def _row(method: str, runs: dict[int, dict[str, Any]], sam: dict[int, dict[str, Any]]) -> str:
    passes, test, gap = (_estimate(runs, name) for name in ("passes", "test_accuracy", "gap"))
    cells = [f"`{method}`", f"{passes.mean:.2f}", mean_and_sd(test), mean_and_sd(gap)]
    for name in ("test_accuracy", "gap"):
        pairs = [runs[seed][name] - sam[seed][name] for seed in runs if seed in sam]
        cells.append(difference(estimate(pairs)) if pairs else "")
    return row([*cells, str(len(runs))])


def _estimate(runs: dict[int, dict[str, Any]], name: str) -> Estimate:
    return estimate([run[name] for run in runs.values()])
