"""benchmarks/epoch: whole steps, whole periods, each beside its own base; what cannot be timed is told."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from epoch.methods import MOMENTUM, MSAM, QUARTER, SGD, SHARP, Problem, everybody  # noqa: E402

import results  # noqa: E402
import timing  # noqa: E402
from epoch import figure, methods, race, run, table  # noqa: E402
from steppe.experiments.models.preact_resnet import PreActResNet18  # noqa: E402

TINY = Problem(8, 1, 2)
each = pytest.mark.parametrize("method", everybody(TINY), ids=lambda method: method.name)


@pytest.fixture
def passes():
    """The samples that have gone through a network so far; those without a backward to come are thirds."""
    seen = [0.0]

    def count(module, inputs):
        if isinstance(module, PreActResNet18):
            seen[0] += len(inputs[0]) * (1.0 if torch.is_grad_enabled() else 1 / 3)

    hook = register_module_forward_pre_hook(count)
    yield seen
    hook.remove()


@pytest.fixture
def clock(passes, monkeypatch):
    """A clock that only passes make go."""
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: passes[0]))


def trained(method, problem, monkeypatch, steps):
    """The weights after some steps."""
    networks = []

    def network(self):
        networks.append(made(self))
        return networks[-1]

    made = Problem.network
    with monkeypatch.context() as patch:
        patch.setattr(Problem, "network", network)
        step = method.step(problem)
    for _ in range(steps):
        torch.manual_seed(0)
        step()
    return torch.cat([p.detach().flatten() for p in networks[0].parameters()])


@pytest.mark.usefixtures("clock")
def test_where_only_passes_take_time_everybody_costs_the_planned_ones():
    rows, failed = race.race(everybody(TINY), TINY, seconds=0.0, least=1)
    assert not failed
    assert list(rows) == [method.name for method in everybody(TINY)]
    for name, row in rows.items():
        assert row["ratio_least"] == pytest.approx(row["passes"], abs=1e-3), name
        assert row["ratio_most"] == pytest.approx(row["passes"], abs=1e-3), name
        assert row["seconds"] == pytest.approx(8 * row["passes"], abs=1e-2), name
        assert row["images_per_second"] == pytest.approx(1 / row["passes"], abs=0.06), name  # a decimal is kept


@each
def test_nobody_is_the_base_in_disguise(method, monkeypatch):
    base = MOMENTUM if method.momentum else SGD
    steps = max(method.period, 3)
    found, alone = (trained(who, TINY, monkeypatch, steps) for who in (method, base))
    assert torch.equal(found, alone) == (method.name == base.name)


def test_the_base_is_sgd_on_the_batch(monkeypatch):
    found = trained(SGD, TINY, monkeypatch, 3)
    network = TINY.network()
    images, labels = TINY.data()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(found, torch.cat([p.detach().flatten() for p in network.parameters()]))


def test_msam_stands_beside_sgd_with_momentum(monkeypatch):
    timed = []
    monkeypatch.setattr(race, "_time", lambda runner, base, times, device: timed.append((runner, base)) or _full(times))
    race.race([SHARP, MSAM], TINY, seconds=0.0, least=1)
    assert [(r.method.name, b.method.name) for r, b in timed] == [
        (SHARP.name, SGD.name),
        (MSAM.name, MOMENTUM.name),
    ]


def _full(times):
    times.own += [1.0, 1.0]
    times.base += [1.0, 1.0]


def test_one_that_fails_is_told_and_the_others_are_timed():
    broken = replace(QUARTER, fraction=2.0)
    rows, failed = race.race([broken, SGD], TINY, seconds=0.0, least=1)
    assert list(rows) == ["SGD"]
    assert failed[QUARTER.name].startswith("ValueError: fraction must be")


def test_with_graphs_only_whole_steps_are_captured_and_the_rest_is_left_out(monkeypatch):
    taken = []
    monkeypatch.setattr(race, "captured", lambda step: taken.append(step) or step)
    rows, failed = race.race(everybody(TINY), replace(TINY, graphs=True), seconds=0.0, least=1)
    assert {"SGD", "SAM", "MSAM", "SAM, a quarter climbs"} <= set(rows)
    assert {"LookSAM, k = 5", "Late SAM, the last quarter", "RST, p = 0.5", "RWP", "ESAM"} <= set(failed)
    assert len(taken) == len(rows) + 2  # and the bases


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
@pytest.mark.parametrize("method", [SGD, SHARP, QUARTER, MSAM], ids=lambda method: method.name)
def test_a_captured_step_is_the_step(method, monkeypatch):
    problem = Problem(8, 4, 2, device="cuda", graphs=True)
    eager = trained(method, problem, monkeypatch, race.WARM + 4)
    make = methods.Method.step
    monkeypatch.setattr(methods.Method, "step", lambda self, problem: race.captured(make(self, problem)))
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
    ("changed", "said"),
    [
        ({}, "| SAM | 1,234 | 2.01 (2.00 to 2.02) | 2 | +0.5% | 2.02 | holds |"),
        ({"ratio_high": 2.03}, "holds, by the median |"),
        ({"ratio": 2.03, "ratio_high": 2.04}, "**missed**, by the median |"),
        ({"ratio": 2.2, "ratio_low": 2.1, "ratio_high": 2.3}, "| **missed** |"),
    ],
)
def test_the_table_says_which_target_holds(changed, said):
    text = table.render(result(**changed))
    assert said in text
    assert "| MESA | OSError: no |" in text
    assert "| 16 | 4 | 2.01 | failed | failed |" in text
    assert text.rstrip().endswith(result().where)


def test_the_figure_has_a_row_for_each_device(tmp_path):
    one, two = (figure.draw([result()] * n, tmp_path / f"{n}.png")[0] for n in (1, 2))
    height = [int.from_bytes(path.read_bytes()[20:24]) for path in (one, two)]
    assert height[1] > 1.5 * height[0]


def test_it_runs_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "everybody", lambda problem: [SGD, SHARP, MSAM])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--tiny", "--device", "cpu", "--results", str(tmp_path), "--machine", "m"]
    )
    run.main()
    assert "| SAM | " in capsys.readouterr().out
    assert (tmp_path / "m" / "epoch.json").exists()
    assert not results.load("epoch", tmp_path)  # a rehearsal is no result


def test_graphs_are_refused_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--graphs", "--device", "cpu"])
    with pytest.raises(SystemExit):
        run.main()
    assert "a CPU has no CUDA graphs" in capsys.readouterr().err


def test_several_threads_of_a_cpu_get_the_layout_that_is_safe():
    given = {"device": "cpu", "tiny": False, "amp": None, "compile": False, "graphs": False}
    one, two = (run.sizes(SimpleNamespace(**given, threads=threads))[0] for threads in (1, 2))
    assert one.channels_last
    assert not two.channels_last
