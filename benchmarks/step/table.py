"""Render a result as Markdown."""

from typing import Any

from markdown_tables import row
from results import Result

_NAMES = {
    "steppe": "Steppe",
    "classic": "classic, single file",
    "pytorch_optimizer": "`pytorch_optimizer`",
    "lower_bound": "lower bound: 8N over one buffer",
}


def render(result: Result) -> str:
    """Return one table per case, one of the time of the host, and the device and command of the measurement."""
    lines: list[str] = []
    for case in result.data["cases"]:
        lines += _case(case, result.on_gpu)
    if host := result.data["host"]:
        lines += _host(host)
    return "\n".join([*lines, result.source]) + "\n"


def _case(case: dict[str, Any], on_gpu: bool) -> list[str]:
    threads = "" if on_gpu else f", {case['threads']} thread{'s' * (case['threads'] > 1)}"
    head = ["", "ms", "of Steppe's time", "operations", "traffic, N", "bytes per weight", "additional memory, N"]
    if on_gpu:
        head += ["kernels", "kernels' ms"]
    return [
        f"**{case['title']}**: {case['weights']:,} weights in {case['tensors']} tensors, {case['dtype']}{threads}. "
        f"A copy moves {case['copy_gb_s']:.0f} GB/s.",
        "",
        row(head),
        row(["---"] + ["---:"] * (len(head) - 1)),
        *(row(_cells(values, on_gpu)) for values in case["rows"]),
        "",
    ]


def _cells(values: dict[str, Any], on_gpu: bool) -> list[str]:
    time = values["time"]
    cells = [
        _NAMES[values["implementation"]],
        f"{1e3 * time['seconds']:.3g} ({1e3 * time['fastest']:.3g} to {1e3 * time['slowest']:.3g})",
        f"{time['ratio']:.2f} ({time['ratio_least']:.2f} to {time['ratio_most']:.2f})",
        f"{values['operations']}",
        f"{values['traffic']:.2f}",
        f"{values['bytes']:.1f}",
        f"{values['memory']:.2f}",
    ]
    if on_gpu:
        cells += [f"{values['kernels']}", f"{1e3 * values['kernel_seconds']:.3g}"]
    return cells


def _host(rows: list[dict[str, Any]]) -> list[str]:
    counts = sorted({values["tensors"] for values in rows})
    by_name: dict[str, dict[int, dict[str, float]]] = {}
    for values in rows:
        by_name.setdefault(values["implementation"], {})[values["tensors"]] = values["time"]
    return [
        "**Time of the host** (Python and the dispatch of operations), ms, for as many tensors of at most two entries "
        "per dimension",
        "",
        row(["", *(f"{count} tensors" for count in counts)]),
        row(["---"] + ["---:"] * len(counts)),
        *(
            row([_NAMES[name], *(f"{1e3 * times[count]['seconds']:.2f}" for count in counts)])
            for name, times in by_name.items()
        ),
        "",
    ]
