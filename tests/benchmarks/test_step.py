"""benchmarks/step: shapes are those of the networks, and traffic is counted correctly."""

import sys
from dataclasses import replace
from math import prod

import pytest
import torch

import results
import steppe
from step import measuring, recording, run
from step.counting import Counted
from step.implementations import LowerBound, base, closure_step, implementations, steppe_sam
from step.parameter_shapes import CASES, resnet18, toy, vit_b16, weights
from step.table import render, standing


@pytest.mark.parametrize(
    ("case", "tensors", "size"),
    [("resnet18", 62, 11_689_512), ("vit_b16", 152, 86_567_656), ("decoder_1b", 292, 1_019_137_280)],
)
def test_shapes_are_those_of_the_networks(case, tensors, size):
    shapes = CASES[case]()
    assert (len(shapes), weights(shapes)) == (tensors, size)
    assert len(toy(case)) == tensors
    assert weights(toy(case)) < 10 * tensors


def test_some_shapes_by_name():
    assert resnet18()["layer3.0.downsample.0.weight"] == (256, 128, 1, 1)
    assert vit_b16()["position"] == (1, 197, 768)
    assert prod(vit_b16()["layers.11.attention.in.weight"]) == 3 * 768 * 768


def test_traffic_counts_reads_and_writes():
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
    assert counted.read == 400, "the storage of an expanded tensor counts once"


def counted(build, n: int = 1 << 16) -> Counted:
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in (n, n, n, n, 3)]
    gradients = [torch.randn_like(p) for p in parameters]

    def assign():
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g

    step = build(parameters)
    step(assign)
    with Counted([*parameters, *gradients]) as found:
        step(assign)
    return found


def test_steppe_moves_8n_and_reads_the_gradient_once_more():
    n = 4 * 4 * (1 << 16)
    own, plain = counted(steppe_sam), counted(base)
    assert (own.read + own.written - plain.read - plain.written) / n == pytest.approx(9, abs=0.05)
    bound = LowerBound(1 << 18, "cpu", torch.float32)
    with Counted() as found:
        bound.step(lambda: None)
    assert (found.read + found.written) / n == pytest.approx(8, abs=1e-3)
    assert found.operations == 4


def test_command_saves_a_result_and_prints_the_table(tmp_path, monkeypatch, capsys):
    command = f"run.py --tiny --device cpu --machine here --case resnet18 --results {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    run.main()
    result = results.read(tmp_path / "here" / "step.json")
    assert result.tiny
    assert results.load("step", tmp_path) == [], "a rehearsal is no result"
    (case,) = result.data["cases"]
    assert [row["implementation"] for row in case["rows"]] == ["steppe", "lower_bound"]
    assert {row["tensors"] for row in result.data["host"]} == {62, 152, 292}
    table = render(result)
    assert table in capsys.readouterr().out
    assert "| Steppe |" in table
    for row in case["rows"]:
        row.update(kernels=3, kernel_seconds=1e-3)
    assert "kernels' ms" in render(replace(result, on_gpu=True))


def test_time_of_an_implementations_own_base_is_subtracted():
    times = {"base": [1.0, 1.0], "heavyball_base": [2.0, 4.0], "steppe": [3.0, 4.0], "heavyball": [5.0, 8.0]}
    assert measuring._minus_base(times) == {"steppe": [2.0, 3.0], "heavyball": [3.0, 4.0]}


def test_table_says_by_how_much_steppe_is_not_the_first():
    assert standing({"steppe": 1.0, "zij": 1.5, "temperon": 2.0}) == (
        "Steppe is the first; next is zij, with 1.50 of its time."
    )
    slower = standing({"steppe": 1.0, "zij": 0.8, "temperon": 2.0, "lower_bound": 0.5}, "62 tensors: ")
    assert slower == (
        "62 tensors: Steppe is not the first; faster by the median: zij (0.80 of Steppe's time). "
        "Steppe takes 2.00 times as long as the lower bound."
    )


def test_step_with_a_closure_makes_two_passes_and_leaves_the_weights():
    class ByHand(torch.optim.SGD):
        def step(self, closure):
            calls.append(float(closure()))
            calls.append(float(closure()))

    calls = []
    parameters, assign = measuring._parameters({"w": (2, 2)}, "cpu", torch.float32)
    step = closure_step(lambda base, _: ByHand(base.param_groups[0]["params"], lr=1e-9))(parameters)
    step(assign)
    assert len(calls) == 2
    assert parameters[0].grad is not None


def test_folder_of_peers_must_exist(tmp_path):
    with pytest.raises(SystemExit, match="pip install"):
        implementations(None, tmp_path / "missing")


def test_cost_of_the_report_is_measured_and_printed(tmp_path, monkeypatch, capsys):
    command = f"recording.py --tiny --device cpu --machine here --results {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    recording.main()
    result = results.read(tmp_path / "here" / "recording.json")
    printed = capsys.readouterr().out
    assert len(result.data["networks"]) == 2
    assert all(found["network"] in printed for found in result.data["networks"])


def test_recorder_without_a_cost_records_nothing_and_the_other_one_each_step():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    for recorder, samples in ((recording.Nothing(optimizer.base), 0), (recording.EachStep(optimizer.base), 3)):
        optimizer._engine.recorder = recorder
        for _ in range(3):
            optimizer.step(lambda: w.square().sum())
        assert len(recorder.samples) == samples
