"""Render the memory of fine-tuning as Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

from lora_memory.count import DTYPES, FITTED, METHODS
from markdown_tables import row
from results import Result

GIB = 2**30
GPUS = (8, 16, 24, 80)
"""Memories of GPUs, in GiB."""
USABLE = 0.9
"""Share of a GPU's memory that tensors can take: the context, workspaces of kernels and fragmentation have the rest."""
Row = dict[str, Any]


def render(result: Result) -> str:
    """Return the tables: what is kept, the peak within a step, and what fits where."""
    rows: list[Row] = result.data["rows"]
    batch, length = max(r["batch"] for r in rows), rows[0]["length"]
    batches = " and ".join(map(str, sorted({r["batch"] for r in rows})))
    lines = [
        "**Between two steps**, and the gradients, GiB (counted; independent of batch and length).",
        *("", *_between(rows)),
        "",
        f"**At the peak of a step**, GiB, with {batch} sequences of {length} tokens (counted): AdamW, and what each "
        "method adds to it.",
        *("", *_peaks([r for r in rows if r["batch"] == batch])),
        "",
        f"**What fits where** (arithmetic): the number of sequences of {length} tokens that fit for certain into a GPU "
        f"of this many GiB, {USABLE:.0%} of them used, with {' / '.join(FITTED)}; from the counted peaks of batches of "
        f"{batches}.",
        *("", *_fits(rows)),
        *("", result.source),
    ]
    return "\n".join(lines) + "\n"


def _between(rows: Sequence[Row]) -> Iterator[str]:
    methods = list(METHODS)[1:]
    yield row(
        ["model", "trained", "base weights", "weights", "trained weights", "gradients", "AdamW's state", *methods]
    )
    yield "|" + "---|" * 3 + "---:|" * (4 + len(methods))
    for first, same in _groups(rows):
        kept = {r["method"]: r["kept"] for r in same}
        counted = [first[name] for name in ("weights", "trained", "gradients", "optimizer_state")]
        own = ["" if name not in kept else _gib(kept[name], "+") for name in methods]
        yield row([*_name(first), *map(_gib, counted), *own])


def _peaks(rows: Sequence[Row]) -> Iterator[str]:
    methods = list(METHODS)[1:]
    yield row(["model", "trained", "base weights", "checkpointing", "AdamW", *methods])
    yield "|" + "---|" * 4 + "---:|" * (1 + len(methods))
    for first, same in _groups(rows):
        for checkpointing in (False, True):
            peak = {r["method"]: r["peak"] for r in same if r["checkpointing"] == checkpointing}
            own = ["" if name not in peak else _gib(peak[name] - peak["AdamW"], "+") for name in methods]
            yield row([*_name(first), "yes" if checkpointing else "no", _gib(peak["AdamW"]), *own])


def _fits(rows: Sequence[Row]) -> Iterator[str]:
    yield row(["model", "trained", "base weights", "checkpointing", *(f"{gpu} GiB" for gpu in GPUS)])
    yield "|" + "---|" * 4 + "---:|" * len(GPUS)
    for first, same in _groups(rows):
        methods = [name for name in FITTED if any(r["method"] == name for r in same)]
        for checkpointing in (False, True):
            counted = [r for r in same if r["checkpointing"] == checkpointing]
            cells = []
            for gpu in GPUS:
                most = [largest_batch([r for r in counted if r["method"] == name], gpu) for name in methods]
                cells.append(" / ".join(map(str, most)) if any(most) else "-")
            yield row([*_name(first), "yes" if checkpointing else "no", *cells])


def largest_batch(rows: Sequence[Row], gpu: float) -> int:
    """Return a number of sequences whose peak fits into a GPU of so many GiB, from the peaks of two batches.

    The bytes at each moment of a step are a line over the batch, and the peak is the highest of these lines. So between
    the two batches it is below their chord; beyond the larger one, it grows by at most its distance from what is always
    in memory (weights, AdamW's state, what the method keeps), for each sequence.
    """
    few, many = sorted(rows, key=lambda r: int(r["batch"]))
    room = USABLE * gpu * GIB
    chord = (many["peak"] - few["peak"]) / (many["batch"] - few["batch"])
    if room < few["peak"]:
        return 0
    if room < many["peak"]:
        return int(few["batch"] + (room - few["peak"]) // chord)
    always = many["weights"] + many["optimizer_state"] + many["kept"]
    return int(many["batch"] + (room - many["peak"]) // ((many["peak"] - always) / many["batch"]))


def _groups(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Yield the rows of each model, tuning and dtype, and the first of them."""
    for model in dict.fromkeys(r["model"] for r in rows):
        for lora in (False, True):
            for dtype in DTYPES:
                same = [r for r in rows if (r["model"], r["lora"], r["dtype"]) == (model, lora, dtype)]
                yield same[0], same


def _name(values: Row) -> list[str]:
    return [values["model"], "LoRA" if values["lora"] else "all", values["dtype"]]


def _gib(size: int, sign: str = "") -> str:
    return f"{size / GIB:{sign}.3f}"
