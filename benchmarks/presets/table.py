"""The runs of a stage as a table: means and spreads, and the differences to SAM by pairs of a seed."""

from typing import Any

from results import Result
from steppe.experiments.analysis.statistics import Estimate, estimate

_HEADS = "| method | passes a step | test % | gap, points | test beside SAM | gap beside SAM | runs |"
_LINE = "|---|---:|---:|---:|---:|---:|---:|"


def render(result: Result) -> str:
    """Return the table, best test accuracy first; "SAM" is the SAM among them with the best one."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for run in result.data["runs"]:
        runs.setdefault(run["method"], {})[run["seed"]] = run
    order = sorted(runs, key=lambda method: -_of(runs[method], "test_accuracy").mean)
    sam = next((method for method in order if method.partition(":")[0] == "sam"), None)
    lines = [_row(method, runs[method], runs[sam] if sam and method != sam else {}) for method in order]
    title = f"{result.data['epochs']} standardized epochs on {result.data['about']}."
    return "\n".join([title, "", _HEADS, _LINE, *lines, "", f"{result.where}"]) + "\n"


def _row(method: str, runs: dict[int, dict[str, Any]], beside: dict[int, dict[str, Any]]) -> str:
    passes, test, gap = (_of(runs, name) for name in ("passes", "test_accuracy", "gap"))
    cells = [f"`{method}`", f"{passes.mean:.2f}", _both(test), _both(gap)]
    for name in ("test_accuracy", "gap"):
        pairs = [runs[seed][name] - beside[seed][name] for seed in runs if seed in beside]
        cells.append(_difference(estimate(pairs)) if pairs else "")
    return "| " + " | ".join([*cells, str(len(runs))]) + " |"


def _of(runs: dict[int, dict[str, Any]], name: str) -> Estimate:
    return estimate([run[name] for run in runs.values()])


def _both(value: Estimate) -> str:
    return f"{value.mean:.2f}" + ("" if value.sd is None else f"±{value.sd:.2f}")


def _difference(value: Estimate) -> str:
    if value.half_width is None:
        return f"{value.mean:+.2f}"
    low, high = value.mean - value.half_width, value.mean + value.half_width
    return f"{value.mean:+.2f} [{low:+.2f}, {high:+.2f}]"
