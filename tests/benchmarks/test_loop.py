"""benchmarks/loop: both loops take the same steps, a failure loses nothing, and the lower bound counts correctly."""

import sys

import pytest
import torch
import torch._dynamo
from torch import nn

import results
import steppe
from loop import lower_bound, run, table
from loop.article_loop import ArticleLoop, LoopSAM
from loop.candidates import Candidates
from loop.configurations import Configuration, SteppeLoop, configurations
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe


@pytest.fixture
def tiny() -> Recipe:
    return RECIPES["article"][0].replace(device="cpu", threads=1, width=2, stem_stride=2, batch_size=16)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "recompile_limit"), reason="torch 2.6 names the limit otherwise")
def test_command_saves_a_result_and_prints_the_table(tmp_path, monkeypatch, capsys):
    command = ["run.py", "--device", "cpu", "--tiny", "--results", str(tmp_path), "--machine", "a desk"]
    monkeypatch.setattr(sys, "argv", command)
    run.main()
    result = results.read(tmp_path / "a-desk" / "loop.json")
    found = result.data
    assert not [row for row in found["rows"] if "failed" in row]
    assert found["fastest"] == configurations("cpu", tiny=True)[found["fastest_configuration"]].fields
    assert found["experiment_passes"] == {"sgd": 150, "sam": 200}
    assert [len(found["whole_passes"][method]) for method in ("sgd", "sam")] == [2, 1]
    minutes = found["experiment_minutes"]
    assert minutes["total"] == pytest.approx(sum(v for k, v in minutes.items() if k != "total"))
    assert results.load("loop", tmp_path) == [], "a rehearsal is no result"
    text = table.render(result)
    assert "| data on the device | " in text
    assert "150 passes of SGD and 200 of SAM" in text


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_both_loops_take_the_same_number_of_passes(method, tiny):
    data = run.random_images(40, 8)
    batches = []
    for loop in (ArticleLoop(tiny, method, data.train, 0, LoopSAM), SteppeLoop(tiny, method, data, Configuration())):
        network = loop.network if isinstance(loop, ArticleLoop) else loop.run.network
        hook = network.register_forward_hook(lambda *a: batches.append(len(a[1][0])))
        assert float(loop(4)) > 0
        hook.remove()
    n = 4 * (2 if method == "sam" else 1)
    assert len(batches) == 2 * n


def test_loop_over_parameters_is_sam():
    layers = [nn.Linear(3, 2).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    reference = LoopSAM(layers[0].parameters(), torch.optim.SGD, rho=0.1, lr=0.2)
    layers[0](x).square().mean().backward()
    reference.first_step(zero_grad=True)
    layers[0](x).square().mean().backward()
    reference.second_step()
    optimizer = steppe.SAM(torch.optim.SGD(layers[1].parameters(), lr=0.2), rho=0.1)
    for sam_pass in optimizer.passes():
        with sam_pass:
            layers[1](x).square().mean().backward()
    optimizer.step()
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_failed_loop_is_reported_and_the_others_are_timed():
    def broken():
        raise RuntimeError("no such kernel\nand more")

    def breaks_later():
        left = [2]

        def steps(n):
            left[0] -= 1
            if left[0] < 0:
                raise ValueError("worn out")

        return steps

    candidates = Candidates("cpu", warmup_steps=1, chunk=2)
    candidates.build({("a", "sgd"): broken, ("b", "sgd"): breaks_later, ("c", "sgd"): lambda: lambda n: None}, 1e18)
    candidates.time(3, 1e18)
    assert candidates.failed == {
        ("a", "sgd"): "failed: RuntimeError: no such kernel",
        ("b", "sgd"): "failed: ValueError: worn out",
    }
    assert {key: len(times) for key, times in candidates.times.items()} == {("c", "sgd"): 3}


def test_one_round_is_timed_when_the_time_is_up():
    candidates = Candidates("cpu", warmup_steps=1, chunk=1)
    candidates.build({("a", "sgd"): lambda: lambda n: None, ("b", "sgd"): lambda: lambda n: None}, 0.0)
    candidates.time(5, 0.0)
    assert {key: len(times) for key, times in candidates.times.items()} == {("a", "sgd"): 1}
    assert candidates.failed["b", "sgd"] == "not measured: the time was up"


def test_lower_bound_of_a_convolution():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Flatten())
    images = torch.randn(5, 2, 6, 6)
    forward = 2 * 5 * 4 * 36 * 2 * 9  # two for each of batch x outputs x positions x inputs x 3 x 3
    assert lower_bound.operations(network, images) == 2 * forward, "no gradient of the images themselves"
    assert lower_bound.traffic(network, images) == 2 * (3 * 5 * 2 * 36 + 2 * 5 * 4 * 36)


def test_gpu_configurations_have_every_option_alone_and_combined():
    known = configurations("cuda")
    alone = [c for c in known.values() if sum([c.amp, c.channels_last, c.compile, c.cuda_graphs, c.fused]) == 1]
    assert len(alone) == 5
    assert known["all"].fields == dict.fromkeys(("amp", "channels_last", "compile", "cuda_graphs"), True)
    assert known["all"].in_recipe
    assert not known["all, any cuDNN kernel"].in_recipe
    assert all(Recipe().replace(**configuration.fields) for configuration in known.values())


def test_fastest_configuration_is_one_that_a_recipe_can_select(tiny):
    workload = run.Workload(tiny, run.random_images(32, 8), warmup_steps=1, chunk=1, rounds=1, workers=(0,))
    known = configurations("cuda")
    candidates = Candidates("cpu", 1, 1)
    for name, step in {
        "data on the device": 9.0,
        "all": 3.0,
        "all but compiled": 2.0,
        "all, any cuDNN kernel": 1.0,
    }.items():
        for method in run.METHODS:
            candidates.times[name, method], candidates.warmup_seconds[name, method] = [step], 0.0
    found = run.summary(candidates, workload, known, "cuda")
    assert found["fastest_configuration"] == "all but compiled"
    assert found["fastest"] == {"amp": True, "channels_last": True, "compile": False, "cuda_graphs": True}
    sgd, sam = (next(r["seconds"] for r in found["rows"] if r["method"] == m) for m in run.METHODS)
    assert (sgd, sam) == (18.0, 9.0), "two steps per epoch, and a step of SAM is two passes"
