"""steppe.experiments.compare, tune and measure: from Python."""

import json
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import BUDGET
from torch import nn
from torch.optim import Optimizer

import steppe
from steppe.experiments import ComparisonResult, Metric, Task, accuracy, compare, measure, tune
from steppe.experiments.comparison import plot
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.errors import ExperimentError
from steppe.experiments.report import page


@pytest.fixture(autouse=True)
def no_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the page in one test only: it takes longer than the runs."""
    if "page" not in request.node.name:
        monkeypatch.setattr(page, "write", lambda folder, recipe, results, summary: folder.path)


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


@pytest.mark.slow
def test_result_has_table_verdicts_advice_figures_and_a_page(tmp_path: Path) -> None:
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("options", "hint"), [({}, "smaller --lr or"), ({"lr": 1e30}, r"smaller --lr \(it was 1e\+30\) or")]
)
def test_diverged_run_names_the_learning_rate_only_if_it_was_given(
    options: dict[str, float], hint: str, tmp_path: Path
) -> None:
    task = replace(classifier(), optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1e30))
    with pytest.raises(ExperimentError, match=rf"base-seed0 diverged in epoch 1: .*{hint}"):
        compare(task, ["base"], epochs=2, seeds=1, out=tmp_path / "run", quiet=True, **options)  # type: ignore[arg-type]


def test_another_task_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    compare(classifier(), epochs=1, seeds=1, out=tmp_path / "run", quiet=True)
    wider = Task(**{**vars(classifier()), "model": lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2))})
    with pytest.raises(ExperimentError, match=r"another configuration.*the task was .*58 parameters.*65 parameters"):
        compare(wider, epochs=1, seeds=1, out=tmp_path / "run", quiet=True)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> ComparisonResult:
    def local(base: Optimizer, rho: float = 0.05, model: nn.Module | None = None) -> steppe.SAM:
        return steppe.SAM(base, rho=rho, model=model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write", lambda folder, recipe, results, summary: folder.path)
        out = tmp_path_factory.mktemp("compared")
        return compare(classifier(), ["base", local], epochs=1, seeds=2, out=out, quiet=True)


def test_comparison_of_objects_of_python_is_measured(compared: ComparisonResult) -> None:
    result = measure(compared, samples=20, **asdict(BUDGET), quiet=True)
    assert len(result.measured) == 4
    assert [verdict.method for verdict in result.verdicts] == ["local"]
    assert result.table.startswith("| measure | base | local |")
    shown = result._repr_html_()
    assert "<th>local</th>" in shown
    assert 'alt="spectra: ' in shown
    assert result.verdicts[0].sentence() in str(result)
    assert "## Flatness" in (result.folder / "summary.md").read_text()
    written = {path: path.stat().st_mtime_ns for path in result.folder.glob("runs/*/flatness.json")}
    again = measure(result.folder, task=classifier(), samples=20, **asdict(BUDGET), quiet=True)
    assert again.table == result.table
    assert written == {path: path.stat().st_mtime_ns for path in result.folder.glob("runs/*/flatness.json")}


def test_measuring_with_another_task_is_refused(compared: ComparisonResult) -> None:
    other = replace(classifier(), model=lambda: nn.Linear(4, 2))
    with pytest.raises(ExperimentError, match=r"of another task \(Sequential .*given \(Linear .*give theirs"):
        measure(compared.folder, task=other, quiet=True)


def test_only_comparisons_are_measured(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="the folder of a comparison is needed, not Task"):
        measure(classifier())  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "trials.jsonl").touch()
    with pytest.raises(TypeError, match="the folder of a comparison is needed, not the folder of a search, "):
        measure(tmp_path)


@pytest.mark.slow
def test_search_has_the_best_values_and_the_call_that_confirms_them(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    task = replace(classifier(), name="mine")
    words = {"search": "rho=0.02,0.2", "sampler": "grid", "hold_out": 4, "epochs": 1, "seeds": 1, "quiet": True}
    result = tune(task, "sam", out=tmp_path / "run", **words)  # type: ignore[arg-type]
    assert [(trial.method, dict(trial.values)) for trial in result.trials] == [
        ("base", {}),
        ("sam", {"rho": 0.02}),
        ("sam", {"rho": 0.2}),
    ]
    rho = result.values["sam"]["rho"]
    assert result.best == ["base", f"sam:rho={rho}"]
    assert result.summary.options.hold_out == 4
    assert result.figures().keys() == {"rho"}
    assert result.table.count("\n") == 4
    (call,) = result.commands
    assert call.startswith(f"steppe.experiments.compare(task, ['base', 'sam:rho={rho}'], ")
    shown = result._repr_html_()
    assert escape(call) in shown
    assert shown.count("data:image/png;base64,") == 1
    calls: list[dict[str, object]] = []
    exec(
        call,
        {
            "task": task,
            "steppe": type("", (), {"experiments": type("", (), {"compare": lambda *a, **k: calls.append(k)})}),
        },
    )
    assert calls[0]["first_seed"] == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trial": 3}, TypeError, "tune: there is no option 'trial'; did you mean 'trials'"),
        ({"sampler": "gird"}, ValueError, "sampler: 'gird' is unknown; did you mean 'grid'"),
        ({"objective": "los"}, ValueError, "objective: 'los' is unknown; did you mean 'loss'"),
        ({"search": "rhoo=0.1,0.2"}, ValueError, "search: 'rhoo' is unknown; did you mean 'rho'"),
        ({"sampler": "grid"}, ValueError, "is a range, and a grid needs its values"),
        ({"methods": "samm"}, ValueError, "did you mean 'sam'"),
    ],
)
def test_wrong_search_is_refused_first(
    options: dict[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        tune(classifier(), **{"out": tmp_path / "run", **options})  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_search_of_a_function_without_a_name_is_refused(tmp_path: Path) -> None:
    def local(base: Optimizer, rho: float = 0.05) -> Optimizer:
        return base

    with pytest.raises(ValueError, match="methods: local is a function without a name"):
        tune(classifier(), [local], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_options_of_compare_and_measure_are_told_with_the_closest_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="compare: there is no option 'epoch'; did you mean 'epochs'"):
        compare(classifier(), epoch=3, out=tmp_path / "run")
    with pytest.raises(TypeError, match="measure: there is no option 'restart'; did you mean 'restarts'"):
        measure(tmp_path, restart=3)
    with pytest.raises(ValueError, match="batch_norm: 'evl' is unknown; did you mean 'eval'"):
        measure(tmp_path, batch_norm="evl")  # type: ignore[arg-type]


def test_refused_method_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    compare(classifier(), epochs=1, seeds=1, out=tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ExperimentError, match="msam cannot train this task"):
        compare(classifier(), ["sam", "base", "msam"], epochs=1, seeds=2, out=tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({"device": "cuda:0"}, "device: 'cuda:0' is unknown; did you mean 'cuda'"),
        ({"device": "gpu"}, "device: 'gpu' is unknown"),
        ({"schedule": "cosin"}, "schedule: 'cosin' is unknown; did you mean 'cosine'"),
        ({"base": "SGD"}, "base: 'SGD' is unknown"),
        ({"on": "ry"}, "on: 'ry' is unknown; did you mean 'ray'"),
        ({"amp": "no"}, "amp='no': True or False is needed, and it is str"),
        ({"lr": "1e-3"}, "lr='1e-3': a number is needed, and it is str"),
        ({"lr": True}, "lr=True: a number is needed, and it is bool"),
        ({"epochs": 2.5}, "epochs=2.5: a whole number is needed, and it is float"),
        ({"seeds": [0, 1]}, r"seeds=\[0, 1\]: a whole number is needed, and it is list"),
        ({"runs_at_once": 2.5}, "runs_at_once=2.5: a whole number is needed, and it is float"),
    ],
)
def test_option_of_another_kind_is_refused(option: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=wanted):
        compare(classifier(), **{"out": tmp_path / "run", "quiet": True} | option)
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_and_tensors_are_options_like_those_of_python() -> None:
    numbers = {"seeds": np.int64(2), "rho": torch.tensor(0.5), "lr": np.float64(0.25), "device": torch.device("cpu")}
    recipe = RECIPES["task"][0].replace(**numbers)
    options = [recipe.options()[name] for name in numbers]
    assert (options, [*map(type, options)]) == ([2, 0.5, 0.25, "cpu"], [int, float, float, str])
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_named_task_has_the_folder_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = compare("user_tasks:regression", ["base"], epochs=1, seeds=1, device="cpu", quiet=True)
    assert result.folder == Path("runs/regression")
    assert compare(classifier, ["base"], epochs=1, seeds=1, quiet=True).folder == Path("runs/classifier")
    assert compare(classifier(), ["base"], epochs=1, seeds=1, quiet=True).folder == Path("runs/task")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "flowers.py").write_text("from user_tasks import regression as task")
    assert compare("flowers:task", ["base"], epochs=1, seeds=1, quiet=True).folder == Path("runs/flowers")
