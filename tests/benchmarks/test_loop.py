"""benchmarks/loop: every style takes the same kind of steps, a failure loses nothing, and the floor counts right."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import results  # noqa: E402
from loop import floor, race, run, table  # noqa: E402
from loop.article import Article, TwoSteps  # noqa: E402
from loop.choices import Choice, Ours, choices  # noqa: E402
from steppe.experiments.config.recipe import RECIPES, Recipe  # noqa: E402


@pytest.fixture
def tiny() -> Recipe:
    return replace(RECIPES["article"][0], device="cpu", threads=1, width=2, stem_stride=2, batch_size=16)


def test_tiny_run(tmp_path, monkeypatch, capsys):
    words = ["run.py", "--device", "cpu", "--tiny", "--results", str(tmp_path), "--machine", "a desk"]
    monkeypatch.setattr(sys, "argv", words)
    run.main()
    result = results.read(tmp_path / "a-desk" / "loop.json")
    found = result.data
    assert not [row for row in found["rows"] if "failed" in row]
    assert found["fastest"] == choices("cpu", tiny=True)[found["fastest_choice"]].fields
    assert found["experiment_passes"] == {"sgd": 150, "sam": 200}
    assert [len(found["whole_passes"][method]) for method in ("sgd", "sam")] == [2, 1]
    minutes = found["experiment_minutes"]
    assert minutes["together"] == pytest.approx(sum(v for k, v in minutes.items() if k != "together"))
    assert results.load("loop", tmp_path) == [], "a rehearsal is no result"
    text = table.render(result)
    assert "| data on the device | " in text
    assert "150 passes of SGD and 200 of SAM" in text


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_both_styles_take_as_many_steps(method, tiny):
    data = run.random_images(40, 8)
    seen = []
    for steps in (Article(tiny, method, data.train, 0, TwoSteps), Ours(tiny, method, data, Choice())):
        network = steps._model if isinstance(steps, Article) else steps.run.network
        hook = network.register_forward_hook(lambda *a: seen.append(len(a[1][0])))
        assert float(steps(4)) > 0
        hook.remove()
    n = 4 * (2 if method == "sam" else 1)
    assert len(seen) == 2 * n


def test_the_plain_loop_is_sam():
    layers = [nn.Linear(3, 2).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    theirs = TwoSteps(layers[0].parameters(), torch.optim.SGD, rho=0.1, lr=0.2)
    layers[0](x).square().mean().backward()
    theirs.first_step(zero_grad=True)
    layers[0](x).square().mean().backward()
    theirs.second_step()
    import steppe

    ours = steppe.SAM(torch.optim.SGD(layers[1].parameters(), lr=0.2), rho=0.1)
    for sam_pass in ours.passes():
        with sam_pass:
            layers[1](x).square().mean().backward()
    ours.step()
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_what_fails_is_told_and_the_others_go_on():
    def broken():
        raise RuntimeError("no such kernel\nand more")

    def breaks_later():
        left = [2]

        def steps(n):
            left[0] -= 1
            if left[0] < 0:
                raise ValueError("worn out")

        return steps

    timed = race.Race("cpu", warm=1, chunk=2)
    timed.enter({("a", "sgd"): broken, ("b", "sgd"): breaks_later, ("c", "sgd"): lambda: lambda n: None}, 1e18)
    timed.rounds(3, 1e18)
    assert timed.failed == {
        ("a", "sgd"): "failed: RuntimeError: no such kernel",
        ("b", "sgd"): "failed: ValueError: worn out",
    }
    assert {key: len(times) for key, times in timed.times.items()} == {("c", "sgd"): 3}


def test_when_the_time_is_up_one_round_is_made():
    timed = race.Race("cpu", warm=1, chunk=1)
    timed.enter({("a", "sgd"): lambda: lambda n: None, ("b", "sgd"): lambda: lambda n: None}, 0.0)
    timed.rounds(5, 0.0)
    assert {key: len(times) for key, times in timed.times.items()} == {("a", "sgd"): 1}
    assert timed.failed["b", "sgd"] == "not measured: the time was up"


def test_the_floor_of_a_convolution():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Flatten())
    images = torch.randn(5, 2, 6, 6)
    forward = 2 * 5 * 4 * 36 * 2 * 9  # two for each of batch x outputs x places x inputs x 3 x 3
    assert floor.operations(network, images) == 2 * forward, "no gradient of the images themselves"
    assert floor.traffic(network, images) == 2 * (3 * 5 * 2 * 36 + 2 * 5 * 4 * 36)


def test_on_a_gpu_everything_alone_and_together():
    known = choices("cuda")
    alone = [c for c in known.values() if sum([c.amp, c.channels_last, c.compile, c.cuda_graphs, c.fused]) == 1]
    assert len(alone) == 5
    assert known["all"].fields == dict.fromkeys(("amp", "channels_last", "compile", "cuda_graphs"), True)
    assert known["all"].on_offer
    assert not known["all, any cuDNN kernel"].on_offer
    assert all(Recipe(**choice.fields) for choice in known.values())


def test_the_fastest_is_one_that_a_recipe_can_ask_for(tiny):
    at = run.RunContext(tiny, run.random_images(32, 8), warm=1, chunk=1, rounds=1, workers=(0,))
    known = choices("cuda")
    timed = race.Race("cpu", 1, 1)
    for name, step in {
        "data on the device": 9.0,
        "all": 3.0,
        "all but compiled": 2.0,
        "all, any cuDNN kernel": 1.0,
    }.items():
        for method in run.METHODS:
            timed.times[name, method], timed.warmed[name, method] = [step], 0.0
    found = run.summary(timed, at, known, "cuda")
    assert found["fastest_choice"] == "all but compiled"
    assert found["fastest"] == {"amp": True, "channels_last": True, "compile": False, "cuda_graphs": True}
    sgd, sam = (next(r["seconds"] for r in found["rows"] if r["method"] == m) for m in run.METHODS)
    assert (sgd, sam) == (18.0, 9.0), "two steps an epoch, and a step of SAM is two passes"
