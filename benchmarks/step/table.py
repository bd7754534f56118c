"""Render a result as Markdown."""

from typing import Any

from markdown_tables import row
from results import Result

_NAMES = {
    "steppe": "Steppe",
    "classic": "classic, single file",
    "pytorch_optimizer": "`pytorch_optimizer`",
    "temperon": "temperon",
    "sam-pytorch": "sam-pytorch",
    "heavyball": "HeavyBall, not compiled",
    "unifiedsam": "unifiedsam",
    "zij": "zij",
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
        standing({v["implementation"]: v["time"]["ratio"] for v in case["rows"]}),
        "",
    ]


def standing(ratios: dict[str, float], of: str = "") -> str:
    """Say by how much Steppe is not the first, from the medians of the times in units of Steppe's time."""
    others = {name: ratio for name, ratio in ratios.items() if name not in ("steppe", "lower_bound")}
    faster = {name: ratio for name, ratio in sorted(others.items(), key=lambda item: item[1]) if ratio < 0.995}
    text = ""
    if faster:
        listed = ", ".join(f"{_NAMES[name]} ({ratio:.2f} of Steppe's time)" for name, ratio in faster.items())
        text = f"{of}Steppe is not the first; faster by the median: {listed}."
    elif others:
        second = min(others, key=others.__getitem__)
        text = f"{of}Steppe is the first; next is {_NAMES[second]}, with {others[second]:.2f} of its time."
    if "lower_bound" in ratios:
        text += f" Steppe takes {1 / ratios['lower_bound']:.2f} times as long as the lower bound."
    return text.strip()


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
    """Return the table of the host's time, and a sentence for each of its columns."""
    kinds = {"time": ""} | ({"cold": ", cold caches"} if "cold" in rows[0] else {})
    columns = [(count, kind) for kind in kinds for count in sorted({values["tensors"] for values in rows})]
    found: dict[str, dict[tuple[int, str], dict[str, float]]] = {}
    for values in rows:
        for kind in kinds:
            found.setdefault(values["implementation"], {})[values["tensors"], kind] = values[kind]
    return [
        "**Time of the host** (Python and the dispatch of operations), ms, for as many tensors of at most two entries "
        "per dimension" + ("; with cold caches, other data is read between the steps" if len(kinds) > 1 else ""),
        "",
        row(["", *(f"{count} tensors{kinds[kind]}" for count, kind in columns)]),
        row(["---"] + ["---:"] * len(columns)),
        *(
            row([_NAMES[name], *(f"{1e3 * times[column]['seconds']:.2f}" for column in columns)])
            for name, times in found.items()
        ),
        "",
        *(
            "- " + standing({k: v[count, kind]["ratio"] for k, v in found.items()}, f"{count} tensors{kinds[kind]}: ")
            for count, kind in columns
            if len(found) > 1
        ),
        "",
    ]
