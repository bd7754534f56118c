"""benchmarks/lora_memory: the bytes that are counted without the kernels are those of a real run."""

from dataclasses import asdict, replace

import pytest
import torch

import results
from live_memory import LiveMemory, SkippedKernels
from lora_memory import table
from lora_memory.count import METHODS, MODELS, Setup, count, setups
from support import rest_is_slow

LLAMA = Setup("tiny Llama", True, "bfloat16", "AdamW", False, 2, 16)
CASES = [
    *(replace(LLAMA, method=method) for method in METHODS),
    replace(LLAMA, method="merged_sam", checkpointing=True),
    replace(LLAMA, lora=False, dtype="float32", method="SAM"),
    replace(LLAMA, model="tiny GPT-2", dtype="float32", method="merged_sam"),
]
FAST = CASES[0], CASES[-1]


@pytest.mark.parametrize(
    "setup",
    rest_is_slow(CASES, lambda case: case in FAST),
    ids=lambda s: f"{s.model}-{s.method}-{s.dtype}-{s.lora}-{s.checkpointing}",
)
def test_bytes_without_kernels_are_those_with_them(setup):
    without, real = count(setup), count(setup, kernels=True)
    assert replace(without, peak=0) == replace(real, peak=0)
    assert abs(without.peak - real.peak) < 100, "but for a few numbers that wait for Python's garbage collector"


def test_skipped_kernels_allocate_and_leave_the_values():
    x = torch.ones(4, 4)
    with SkippedKernels(), LiveMemory() as memory:
        x.add_(1)
        y = x @ x
        view = y.t()[1:]
        reshaped = view.reshape(-1)  # copies: the view is not contiguous
        assert bool(torch.zeros(()) > 1), "a value that is read is True"
    assert x.tolist() == torch.ones(4, 4).tolist()
    assert view.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert (reshaped.shape, memory.now) == ((12,), x.nbytes + y.nbytes + reshaped.nbytes)


def test_batch_that_fits_follows_the_counted_peaks():
    always = {"weights": 4 * table.GIB, "optimizer_state": 0, "kept": 2 * table.GIB}
    rows = [{"batch": 8, "peak": 22 * table.GIB, **always}, {"batch": 1, "peak": 15 * table.GIB, **always}]
    assert [table.largest_batch(rows, gpu / table.USABLE) for gpu in (14.9, 15.1, 21.1, 21.9, 22.1, 24.1)] == [
        *(0, 1, 7),  # on the line through both
        *(7, 8, 9),  # 2 GiB for each sequence more
    ]


@pytest.mark.parametrize("method", ["AdamW", pytest.param("merged_sam", marks=pytest.mark.slow)])
def test_batch_that_is_said_to_fit_does(method):
    setup = replace(LLAMA, method=method, checkpointing=True)
    rows = [asdict(s) | asdict(count(s)) for s in (replace(setup, batch=1), replace(setup, batch=4))]
    for peak in (1.2 * rows[0]["peak"], 2 * rows[1]["peak"]):
        fitting = table.largest_batch(rows, peak / table.GIB / table.USABLE)
        assert fitting >= 1
        assert count(replace(setup, batch=fitting)).peak <= peak


def stored() -> list[dict]:
    (result,) = results.load("memory_lora")
    return result.data["rows"]


def test_stored_result_has_all_setups():
    assert [{k: r[k] for k in asdict(LLAMA)} for r in stored()] == [asdict(s) for s in setups(MODELS, 1, 8, 512)]


def test_counted_again_agrees_with_the_stored_result():
    setup = Setup("GPT-2", True, "bfloat16", "SAM", False, 1, 512)
    (row,) = [r for r in stored() if {k: r[k] for k in asdict(setup)} == asdict(setup)]
    again = asdict(count(setup))
    for name in set(again) - {"peak"}:  # the peak depends on the version of Transformers
        assert again[name] == row[name], name


def test_methods_add_what_the_page_says():
    rows = [r for r in stored() if r["batch"] == 8]
    base = {_case(r): r for r in rows if r["method"] == "AdamW"}
    for row in rows:
        copies = {"AdamW": 0, "SAM": 1, "LookSAM": 2, "merged_sam": 0, "flat_lora": 0}[row["method"]]
        assert 0 <= row["kept"] - copies * row["trained"] < 1000, "beside copies, a few numbers"
        if row["lora"] and row["method"] in ("SAM", "LookSAM"):
            assert row["peak"] - base[_case(row)]["peak"] < (2 * copies - 1) * row["trained"] + 1000
        if row["lora"] and row["method"] == "flat_lora":
            assert row["peak"] - base[_case(row)]["peak"] < 2**21


def _case(row: dict) -> tuple:
    return row["model"], row["lora"], row["dtype"], row["checkpointing"]
