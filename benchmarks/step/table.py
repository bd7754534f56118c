"""A result as Markdown."""

from typing import Any

from results import Result

_NAMES = {
    "steppe": "Steppe",
    "classic": "classic, single file",
    "pytorch_optimizer": "`pytorch_optimizer`",
    "floor": "floor: 8N over one buffer",
}


def render(result: Result) -> str:
    """Return a table a case, one of the host's time, and where it was measured."""
    lines: list[str] = []
    for case in result.data["cases"]:
        lines += _case(case, result.on_gpu)
    if host := result.data["host"]:
        lines += _host(host)
    return "\n".join([*lines, result.where]) + "\n"


def _case(case: dict[str, Any], on_gpu: bool) -> list[str]:
    threads = "" if on_gpu else f", {case['threads']} thread{'s' * (case['threads'] > 1)}"
    head = ["", "ms", "of Steppe's time", "operations", "traffic, N", "bytes a weight", "more memory, N"]
    if on_gpu:
        head += ["kernels", "kernels' ms"]
    return [
        f"**{case['title']}**: {case['weights']:,} weights in {case['tensors']} tensors, {case['dtype']}{threads}. "
        f"A copy moves {case['copy_gb_s']:.0f} GB/s.",
        "",
        _row(head),
        _row(["---"] + ["---:"] * (len(head) - 1)),
        *(_row(_cells(row, on_gpu)) for row in case["rows"]),
        "",
    ]


def _cells(row: dict[str, Any], on_gpu: bool) -> list[str]:
    time = row["time"]
    cells = [
        _NAMES[row["method"]],
        f"{1e3 * time['seconds']:.3g} ({1e3 * time['fastest']:.3g} to {1e3 * time['slowest']:.3g})",
        f"{time['ratio']:.2f} ({time['ratio_least']:.2f} to {time['ratio_most']:.2f})",
        f"{row['operations']}",
        f"{row['traffic']:.2f}",
        f"{row['bytes']:.1f}",
        f"{row['memory']:.2f}",
    ]
    if on_gpu:
        cells += [f"{row['kernels']}", f"{1e3 * row['kernel_seconds']:.3g}"]
    return cells


def _host(rows: list[dict[str, Any]]) -> list[str]:
    counts = sorted({row["tensors"] for row in rows})
    by_name: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        by_name.setdefault(row["method"], {})[row["tensors"]] = row["time"]
    return [
        "**The host's time** for the same numbers of tensors with hardly an entry each, ms",
        "",
        _row(["", *(f"{count} tensors" for count in counts)]),
        _row(["---"] + ["---:"] * len(counts)),
        *(
            _row([_NAMES[name], *(f"{1e3 * times[count]['seconds']:.2f}" for count in counts)])
            for name, times in by_name.items()
        ),
        "",
    ]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
