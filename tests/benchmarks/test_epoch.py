"""benchmarks/epoch: whole steps and whole periods, each beside its own base; failures are reported."""

import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

import results
import timing
from epoch import figure, methods, run, table, timed_methods
from epoch.methods import MOMENTUM, MSAM, PLAIN_SAM, QUARTER, SGD, Problem
from steppe.experiments.models.preact_resnet import PreActResNet18

TINY = Problem(8, 1, 2)
each_method = pytest.mark.parametrize("method", methods.methods(TINY), ids=lambda method: method.name)


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Networks of two blocks: the methods are those of deeper ones."""
    tiny.shallow(monkeypatch)


@pytest.fixture
def passes():
    """The number of samples that networks have processed so far; a forward alone is a third of a pass."""
    count = [0.0]

    def add(module, inputs):
        if isinstance(module, PreActResNet18):
            count[0] += len(inputs[0]) * (1.0 if torch.is_grad_enabled() else 1 / 3)

    hook = register_module_forward_pre_hook(add)
    yield count
    hook.remove()


@pytest.fixture
def clock(passes, monkeypatch):
    """A clock that measures passes."""
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: passes[0]))


def trained(method, problem, monkeypatch, steps):
    """Return the weights after some steps."""
    networks = []

    def network(self):
        networks.append(original(self))
        return networks[-1]

    original = Problem.network
    with monkeypatch.context() as patch:
        patch.setattr(Problem, "network", network)
        step = method.build_step(problem)
    for _ in range(steps):
        torch.manual_seed(0)
        step()
    return torch.cat([p.detach().flatten() for p in networks[0].parameters()])


@pytest.mark.slow
@pytest.mark.usefixtures("clock")
def test_methods_make_their_planned_passes():
    rows, failed = timed_methods.time_methods(methods.methods(TINY), TINY, seconds=0.0, least=1)
    assert not failed
    assert list(rows) == [method.name for method in methods.methods(TINY)]
    for name, row in rows.items():
        assert row["ratio_least"] == pytest.approx(row["passes"], abs=1e-3), name
        assert row["ratio_most"] == pytest.approx(row["passes"], abs=1e-3), name
        assert row["seconds"] == pytest.approx(8 * row["passes"], abs=1e-2), name
        assert row["images_per_second"] == pytest.approx(1 / row["passes"], abs=0.06), name  # rounded to one decimal


@each_method
def test_methods_differ_from_their_base(method, monkeypatch):
    base = MOMENTUM if method.momentum else SGD
    steps = max(method.period, 3)
    found, expected = (trained(each, TINY, monkeypatch, steps) for each in (method, base))
    assert torch.equal(found, expected) == (method.name == base.name)


def test_base_is_sgd_on_the_batch(monkeypatch):
    found = trained(SGD, TINY, monkeypatch, 3)
    network = TINY.network()
    images, labels = TINY.data()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(found, torch.cat([p.detach().flatten() for p in network.parameters()]))


def test_msam_is_compared_with_sgd_with_momentum(monkeypatch):
    timed = []

    def record(own, base, times, device):
        timed.append((own, base))
        times.own += [1.0, 1.0]
        times.base += [1.0, 1.0]

    monkeypatch.setattr(timed_methods, "_time", record)
    timed_methods.time_methods([PLAIN_SAM, MSAM], TINY, seconds=0.0, least=1)
    assert [(r.method.name, b.method.name) for r, b in timed] == [
        (PLAIN_SAM.name, SGD.name),
        (MSAM.name, MOMENTUM.name),
    ]


def test_failed_method_is_reported_and_the_others_are_timed():
    broken = replace(QUARTER, fraction=2.0)
    rows, failed = timed_methods.time_methods([broken, SGD], TINY, seconds=0.0, least=1)
    assert list(rows) == ["SGD"]
    assert failed[QUARTER.name].startswith("ValueError: fraction must be")


def test_graphs_are_captured_only_of_methods_with_equal_steps(monkeypatch):
    captured = []
    monkeypatch.setattr(timed_methods, "captured", lambda step: captured.append(step) or step)
    rows, failed = timed_methods.time_methods(methods.methods(TINY), replace(TINY, graphs=True), seconds=0.0, least=1)
    assert {"SGD", "SAM", "MSAM", "SAM, quarter batch"} <= set(rows)
    assert {"LookSAM, every 5th step", "SAM in the last quarter", "RST, p = 0.5", "RWP", "ESAM"} <= set(failed)
    assert len(captured) == len(rows) + 2  # and the bases


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [SGD, PLAIN_SAM, QUARTER, MSAM], ids=lambda method: method.name)
def test_captured_step_equals_the_eager_step(method, monkeypatch):
    problem = Problem(8, 4, 2, device="cuda", graphs=True)
    eager = trained(method, problem, monkeypatch, timed_methods.WARMUP_STEPS + 4)
    build = methods.Method.build_step
    captured = timed_methods.captured
    monkeypatch.setattr(methods.Method, "build_step", lambda self, problem: captured(build(self, problem)))
    torch.testing.assert_close(trained(method, problem, monkeypatch, 4), eager)


def result(**changed) -> results.Result:
    row = {
        "images_per_second": 1234.5,
        "ratio": 2.01,
        "ratio_low": 2.0,
        "ratio_high": 2.015,
        "passes": 2,
        "target": 2.02,
    }
    sizes = [(8, 4), (16, 4), (8, 16)]
    points = [{"batch": b, "width": w, "methods": {"SAM": row}, "failed": {"MSAM": "?"}} for b, w in sizes]
    problem = asdict(Problem(8, 4, 2)) | {"threads": 1}
    data = {"problem": problem, "methods": {"SAM": row | changed}, "failed": {"MESA": "OSError: no"}, "points": points}
    return results.Result("epoch", "a machine", False, "2026-01-01", "python run.py", "2.13.0", {}, data)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "| SAM | 1,234 | 2.01 (2.00 to 2.02) | 2 | +0.5% | 2.02 | holds |"),
        ({"ratio_high": 2.03}, "holds, by the median |"),
        ({"ratio": 2.03, "ratio_high": 2.04}, "**missed**, by the median |"),
        ({"ratio": 2.2, "ratio_low": 2.1, "ratio_high": 2.3}, "| **missed** |"),
    ],
)
def test_table_has_the_verdict_on_the_target(changed, expected):
    text = table.render(result(**changed))
    assert expected in text
    assert "| MESA | OSError: no |" in text
    assert "| 16 | 4 | 2.01 | failed | failed |" in text
    assert text.rstrip().endswith(result().source)


def test_figure_has_a_row_for_each_device(tmp_path):
    one, two = (figure.draw([result()] * n, tmp_path / f"{n}.png")[0] for n in (1, 2))
    height = [int.from_bytes(path.read_bytes()[20:24]) for path in (one, two)]
    assert height[1] > 1.5 * height[0]


def test_command_saves_a_result_and_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "methods", lambda problem: [SGD, PLAIN_SAM, MSAM])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--tiny", "--device", "cpu", "--results", str(tmp_path), "--machine", "m"]
    )
    run.main()
    assert "| SAM | " in capsys.readouterr().out
    assert (tmp_path / "m" / "epoch.json").exists()
    assert not results.load("epoch", tmp_path)  # a rehearsal is no result


def test_graphs_on_a_cpu_are_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--graphs", "--device", "cpu"])
    with pytest.raises(SystemExit):
        run.main()
    assert "a CPU has no CUDA graphs" in capsys.readouterr().err


def test_several_cpu_threads_use_the_safe_layout():
    options = {"device": "cpu", "tiny": False, "amp": None, "compile": False, "graphs": False}
    one, two = (run.sizes(SimpleNamespace(**options, threads=threads))[0] for threads in (1, 2))
    assert one.channels_last
    assert not two.channels_last
