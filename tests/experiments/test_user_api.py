"""steppe.experiments.compare: a comparison from Python."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

import steppe
from steppe.experiments import Metric, Task, accuracy, compare
from steppe.experiments.comparison import plot
from steppe.experiments.errors import ExperimentError


def classifier() -> Task:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    y = (x[:, 0] + x[:, 1] > 0).long()
    return Task(
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        train=(x[:40], y[:40]),
        test=(x[40:], y[40:]),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, unit="%")},
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
        batch_size=10,
    )


def mine(base: Optimizer, rho: float = 0.05, model: nn.Module | None = None) -> steppe.SAM:
    """A method of my own."""
    return steppe.SAM(base, rho=rho, model=model)


def test_result_has_table_verdicts_advice_and_figures(tmp_path: Path) -> None:
    result = compare(classifier(), ["base", "sam", "sam:rho=0.1"], epochs=2, seeds=2, out=tmp_path / "run", quiet=True)
    assert "| SAM (rho 0.1) |" in result.table
    assert [verdict.method for verdict in result.verdicts] == ["sam", "sam:rho=0.1"]
    assert result.advice
    assert str(result.best) in ("base", "sam", "sam:rho=0.1")
    assert {"overview", "test_accuracy", "pareto"} <= result.figures().keys()
    assert "<table>" in result._repr_html_()
    assert "data:image/png;base64," in result._repr_html_()
    assert (result.folder / "report.html").exists()


def test_function_is_a_method_and_gives_the_bits_of_the_same_rule(tmp_path: Path) -> None:
    def local(base: Optimizer, rho: float = 0.05, model: nn.Module | None = None) -> steppe.SAM:
        return steppe.SAM(base, rho=rho, model=model)

    result = compare(classifier(), ["base", "sam", local], epochs=2, seeds=1, out=tmp_path / "run", quiet=True)
    sam, own = (records[-1] for run, records in result.results.items() if run.method.name != "base")
    assert own.measures == sam.measures
    assert own.passes == 2
    plot(tmp_path / "run", Console(quiet=True))  # a folder can be reported without the function


def test_function_of_a_module_is_named_by_its_import(tmp_path: Path) -> None:
    result = compare(classifier(), ["base", mine], epochs=1, seeds=1, out=tmp_path / "run", quiet=True)
    assert [str(m) for m in result.recipe.comparison.methods] == ["base", "test_user_api:mine"]
    assert result.summary.rows[1].method.label == "mine"


def test_lambdas_are_trained_in_other_processes(tmp_path: Path) -> None:
    one = compare(classifier(), epochs=2, seeds=1, out=tmp_path / "one", quiet=True)
    two = compare(classifier(), epochs=2, seeds=1, out=tmp_path / "two", quiet=True, runs_at_once=2)
    assert [r[-1].measures for r in one.results.values()] == [r[-1].measures for r in two.results.values()]


def test_averages_are_methods(tmp_path: Path) -> None:
    result = compare(classifier(), ["base", "base+ema", "sam+swa"], epochs=2, seeds=1, out=tmp_path / "r", quiet=True)
    assert [row.method.label for row in result.summary.rows] == ["base", "base + EMA", "SAM + SWA"]


def test_unnamed_function_and_unknown_method_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give it a name of its own"):
        compare(classifier(), ["base", lambda base: base], out=tmp_path / "run")
    with pytest.raises(ValueError, match="did you mean 'sam'"):
        compare(classifier(), ["base", "samm"], out=tmp_path / "run")


def test_error_in_the_task_names_the_line_before_anything_is_trained(tmp_path: Path) -> None:
    def wrong(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs, targets)

    task = Task(**{**vars(classifier()), "loss": wrong})
    with pytest.raises(ExperimentError, match=r"loss= .*outputs a tensor of shape \(4, 2\).*test_user_api.py:\d+"):
        compare(task, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_task_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    compare(classifier(), epochs=1, seeds=1, out=tmp_path / "run", quiet=True)
    wider = Task(**{**vars(classifier()), "model": lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2))})
    with pytest.raises(ExperimentError, match=r"another configuration.*the task was .*58 parameters.*65 parameters"):
        compare(wider, epochs=1, seeds=1, out=tmp_path / "run", quiet=True)
