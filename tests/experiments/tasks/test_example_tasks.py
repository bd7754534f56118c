"""The tasks of examples/tasks, each with `steppe compare module:task` from the first word to the report."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steppe.cli import main
from steppe.experiments.report import page
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS

EXAMPLES = Path(__file__).parents[3] / "examples" / "tasks"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SLOW = ("diabetes", "hugging_face", "text", "vit")
_MISTAKEN = """import torch
from steppe.experiments import Task


def loss(outputs, targets):
    return outputs.sums()


def task():
    data = torch.zeros(8, 2), torch.zeros(8, 1)
    model = lambda: torch.nn.Linear(2, 1)
    optimizer = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
    return Task(model=model, train=data, test=data, loss=loss, optimizer=optimizer)
"""
IN_ONE_PROCESS = ["--runs-at-once", "1"]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A working directory of its own, and the examples importable as a user's modules are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


def compare(name: str, *words: str, epochs: int = 2, seeds: int = 2, out: str = "run") -> Path:
    options = {"epochs": epochs, "seeds": seeds, "out": out, "device": "cpu", "eval-every": 2}
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert main(["compare", f"{name}:task", *given, "--methods", "base", "sam", *words]) == 0
    return Path(out)


def records(folder: Path, run: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "runs" / run / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def weights(folder: Path, run: str) -> dict[str, Any]:
    state = torch.load(folder / "runs" / run / CHECKPOINT, weights_only=True)["model"]
    return {name: tensor.tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NAMES])
def test_example_is_compared_and_reported(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != "diabetes":  # one is enough for the page and its figures, which take longer than the runs
        monkeypatch.setattr(page, "write", lambda folder, recipe, results, summary: None)
    folder = compare(name, *IN_ONE_PROCESS)
    task = importlib.import_module(name).task()
    summary = json.loads((folder / "summary.json").read_text())
    printed = capsys.readouterr().out
    metric = next(iter(task.metrics))
    assert {"base", "SAM"} <= set(printed.replace("│", " ").split())
    assert f"test {metric}" in " ".join(printed.split())
    assert [row["method"] for row in summary["rows"]][:2] == ["base", "sam"]
    for run in ("base-seed0", "sam-seed1"):
        last = records(folder, run)[-1]
        assert last["standardized_epoch"] == 2
        assert math.isfinite(last[f"test_{metric}"])
    if name == "diabetes":
        assert "R2" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_two_worker_processes_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write", lambda folder, recipe, results, summary: None)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
    for name in ("vit", "graphs"):  # a loader with workers and augmentation; functions without a name
        one = compare(name, *IN_ONE_PROCESS, seeds=1, out=f"{name}-1")
        two = compare(name, "--runs-at-once", "2", seeds=1, out=f"{name}-2")
        for run in ("base-seed0", "sam-seed0"):
            assert records(one, run) == records(two, run)
            assert weights(one, run) == weights(two, run)


def test_more_seeds_and_methods_are_added_to_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write", lambda folder, recipe, results, summary: None)
    folder = compare("diabetes", *IN_ONE_PROCESS, seeds=1)
    before = (folder / "runs" / "sam-seed0" / CHECKPOINT).stat().st_mtime_ns
    compare("diabetes", "asam", *IN_ONE_PROCESS, seeds=2)
    assert (folder / "runs" / "sam-seed0" / CHECKPOINT).stat().st_mtime_ns == before
    assert (folder / "runs" / "asam-seed1" / CHECKPOINT).exists()


def test_error_in_a_task_is_one_line_and_trains_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mistaken.py").write_text(_MISTAKEN)
    sys.path.insert(0, str(tmp_path))
    try:
        assert main(["compare", "mistaken:task", *IN_ONE_PROCESS]) == 1
    finally:
        sys.path.remove(str(tmp_path))
    error = " ".join(capsys.readouterr().err.split())
    assert "the task's loss= raised an error on outputs a tensor of shape (4, 1) and targets" in error
    assert "mistaken.py:6: return outputs.sums()" in error
    assert "Traceback" not in error
    assert not Path("runs").exists()
