"""The step benchmark: its lists of tensors are the networks', and what it counts is what was moved."""

import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from step.implementations import Floor, base, ours  # noqa: E402

import results  # noqa: E402
from step import run  # noqa: E402
from step.counting import Counted  # noqa: E402
from step.shapes import CASES, resnet18, toy, vit_b16, weights  # noqa: E402
from step.table import render  # noqa: E402


@pytest.mark.parametrize(
    ("case", "tensors", "size"),
    [("resnet18", 62, 11_689_512), ("vit_b16", 152, 86_567_656), ("decoder_1b", 292, 1_019_137_280)],
)
def test_the_lists_are_those_of_the_networks(case, tensors, size):
    shapes = CASES[case]()
    assert (len(shapes), weights(shapes)) == (tensors, size)
    assert len(toy(case)) == tensors
    assert weights(toy(case)) < 10 * tensors


def test_shapes_that_are_known_by_name():
    assert resnet18()["layer3.0.downsample.0.weight"] == (256, 128, 1, 1)
    assert vit_b16()["position"] == (1, 197, 768)
    assert prod(vit_b16()["layers.11.attention.in.weight"]) == 3 * 768 * 768


def test_traffic_is_what_operations_read_and_write():
    w, g = torch.ones(100), torch.ones(100)
    with Counted([w, g]) as counted:
        copy = torch.empty_like(w)  # no work
        copy.copy_(w)
        w.add_(g)
        g.view(10, 10).t()  # no work
    assert (counted.operations, counted.read, counted.written) == (2, 400 + 800, 400 + 400)
    assert counted.now == counted.peak == 400
    del copy
    assert counted.now == 0
    with Counted([w]) as counted:
        w.expand(50, 100).sum()
    assert counted.read == 400, "an expanded tensor is read as often, but is no longer"


def counted(build, n: int = 1 << 16) -> Counted:
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in (n, n, n, n, 3)]
    gradients = [torch.randn_like(p) for p in parameters]

    def put():
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g

    step = build(parameters)
    step(put)
    with Counted([*parameters, *gradients]) as seen:
        step(put)
    return seen


def test_steppe_moves_8n_and_looks_at_the_gradient_once_more():
    n = 4 * 4 * (1 << 16)
    own, plain = counted(ours), counted(base)
    assert (own.read + own.written - plain.read - plain.written) / n == pytest.approx(9, abs=0.05)
    floor = Floor(1 << 18, "cpu", torch.float32)
    with Counted() as seen:
        floor.step(lambda: None)
    assert (seen.read + seen.written) / n == pytest.approx(8, abs=1e-3)
    assert seen.operations == 4


def test_a_tiny_run_writes_a_result_and_a_table(tmp_path, monkeypatch, capsys):
    command = f"run.py --tiny --device cpu --machine here --case resnet18 --results {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    run.main()
    result = results.read(tmp_path / "here" / "step.json")
    assert result.tiny
    assert results.load("step", tmp_path) == [], "a rehearsal is no result"
    (case,) = result.data["cases"]
    assert [row["method"] for row in case["rows"]] == ["steppe", "floor"]
    assert {row["tensors"] for row in result.data["host"]} == {62, 152, 292}
    table = render(result)
    assert table in capsys.readouterr().out
    assert "| Steppe |" in table
    for row in case["rows"]:
        row.update(kernels=3, kernel_seconds=1e-3)
    assert "kernels' ms" in render(replace(result, on_gpu=True))
