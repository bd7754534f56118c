"""`steppe measure RUN` of a user's own task."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import user_tasks
from rich.console import Console
from tiny import BUDGET

from steppe.experiments import comparison
from steppe.experiments.analysis.verdicts import FLATNESS, read_flatness, verdicts
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.data.sampling import FLATNESS_SAMPLE, generator
from steppe.experiments.errors import ExperimentError
from steppe.experiments.measuring import jobs
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.experiments.measuring.measure_runs import measure_runs
from steppe.experiments.report import page
from steppe.experiments.storage.run_folder import CHECKPOINT, RunFolder
from steppe.experiments.tasks.task import Task
from steppe.flatness import (
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Objective,
    Scaled,
    adam_preconditioner,
    by_layer,
    eigenvalues,
)
from steppe.flatness.budget import FURTHER

OPTIONS = MeasuringOptions(samples=20, budget=BUDGET, processes=1)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write", lambda folder, recipe, results, summary: folder.path)


def trained(out: Path, task: str, given: Task | None = None, **options: object) -> RunFolder:
    words = {"task": task, "epochs": 1, "seeds": 1, "device": "cpu", "threads": 1, "out": out}
    recipe = RECIPES["task"][0].replace(**(words | options))
    comparison.compare(recipe, [], Console(quiet=True), task=given)
    return RunFolder(out)


def measured(folder: RunFolder, name: str, **budget: object) -> dict[str, Any]:
    options = replace(OPTIONS, budget=replace(BUDGET, **budget))  # type: ignore[arg-type]
    measure_runs(folder.path, options, Console(quiet=True))
    return json.loads((folder.path / "runs" / name / FLATNESS).read_text())  # type: ignore[no-any-return]


def test_task_is_restored_by_its_name_and_measured_on_its_own_loss(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "user_tasks:regression", seeds=2)
    found = measured(folder, "sam-seed1")["measures"]
    model = user_tasks.regression().model()
    model.load_state_dict(torch.load(folder.path / "runs" / "sam-seed1" / CHECKPOINT, weights_only=True)["model"])
    drawn = torch.randperm(48, generator=generator(1, FLATNESS_SAMPLE))[:20].sort().values
    inputs, targets = user_tasks.samples(48, 0)
    loss = Objective(model, (inputs[drawn], targets[drawn]), loss=F.mse_loss).loss()
    assert found["loss"]["value"] == pytest.approx(float(loss), rel=1e-6)
    assert "sharpness" in found
    assert not [name for name in found if "normalized" in name]
    (verdict,) = verdicts(folder.recipe(), read_flatness(folder, folder.recipe()))
    assert verdict.sentence().startswith("SAM's minima against base's, 2 paired runs: ")
    comparison.plot(folder.path, Console(quiet=True))
    text = (folder.path / "summary.md").read_text()
    assert "## Flatness" in text
    assert "image" not in text
    assert "accurac" not in text


@pytest.mark.parametrize(("task", "normalized"), [("classifier", True), ("two_classes", False)])
def test_only_logits_of_three_or_more_classes_are_normalized(task: str, normalized: bool, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", f"user_tasks:{task}", methods=("base",))
    names = measured(folder, "base-seed0")["measures"]
    assert any("normalized" in name for name in names) == normalized


def test_averaged_run_is_measured_at_its_averaged_weights(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "user_tasks:regression", methods=("base", "base+ema"), lr=0.1, epochs=3)
    found = measured(folder, "base+ema-seed0")["measures"]["loss"]["value"]
    state = torch.load(folder.path / "runs" / "base+ema-seed0" / CHECKPOINT, weights_only=True)
    model = user_tasks.regression().model()
    model.load_state_dict(state["model"])
    drawn = torch.randperm(48, generator=generator(0, FLATNESS_SAMPLE))[:20].sort().values
    inputs, targets = user_tasks.samples(48, 0)
    last = float(Objective(model, (inputs[drawn], targets[drawn]), loss=F.mse_loss).loss())
    assert found != pytest.approx(last, rel=1e-3)


def test_task_that_was_an_object_of_python_is_named_with_the_way_out(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "regression", user_tasks.regression())
    with pytest.raises(ExperimentError, match=r"object of Python \(regression\).*package\.module:task") as raised:
        measure_runs(folder.path, OPTIONS, Console(quiet=True))
    assert "\n" not in str(raised.value)


def sample(n: int, task: Task) -> dict[str, torch.Tensor]:
    """Return the samples that the runs of seed 0 are measured on."""
    drawn = torch.randperm(n, generator=generator(0, FLATNESS_SAMPLE))[:20].sort().values
    rows = [task.train[i] for i in drawn.tolist()]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("name", ["classifier", "own_loss"])
def test_every_further_measure_of_a_task_is_that_of_its_function(name: str, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", f"user_tasks:{name}", methods=("sam",))
    found = measured(folder, "sam-seed0", further=",".join(FURTHER), tol=1e-6, num_eigenvalues=1)["measures"]
    task = getattr(user_tasks, name)()
    model = task.model().eval()
    state = torch.load(folder.path / "runs" / "sam-seed0" / CHECKPOINT, weights_only=True)
    model.load_state_dict(state["model"])
    batch = sample(32, task)
    if name == "own_loss":
        own = Objective(model, batch)
    else:
        own = Objective(model, (batch["inputs"], batch["labels"]), loss=F.cross_entropy)
    optimizer = task.optimizer(model)
    optimizer.load_state_dict({key: state["optimizer"][key] for key in ("state", "param_groups")})
    scaled = Scaled(Hessian(own), adam_preconditioner(optimizer, own).rsqrt())
    operators = {"gauss_newton": GaussNewton(own), "fisher": EmpiricalFisher(own), "adam_sharpness": scaled}
    expected = {key: float(eigenvalues(operator, tol=1e-6).values[0]) for key, operator in operators.items()}
    expected |= {f"lambda_max/{row.layer}": row.lambda_max.value for row in by_layer(own, tol=1e-6)}
    for key, value in expected.items():
        assert found[key]["value"] == pytest.approx(value, rel=1e-3), key
    assert {"batch_sharpness", "rounding"} <= found.keys()
    lr = state["optimizer"]["param_groups"][0].get("initial_lr", state["optimizer"]["param_groups"][0]["lr"])
    assert found["adam_sharpness"]["note"].startswith(f"edge of stability {38 / lr:.3g} at lr {lr:.3g}")


def without_logits() -> Task:
    return replace(user_tasks.own_loss(), model=LossOnly)


class LossOnly(user_tasks.WithLoss):
    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(inputs, labels)["loss"]}


def with_penalty() -> Task:
    return replace(user_tasks.own_loss(), model=Penalized)


class Penalized(user_tasks.WithLoss):
    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().forward(inputs, labels)
        return {**found, "loss": found["loss"] + self.layers[0].weight.square().sum()}


def by_sgd() -> Task:
    return replace(user_tasks.classifier(), optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("task", "further", "message"),
    [
        ("without_logits", "gauss_newton", "needs the model's outputs"),
        ("without_logits", "fisher", "needs the model's outputs"),
        ("with_penalty", "gauss_newton", "by another way than the model's outputs"),
        ("with_penalty", "fisher", "by another way than the model's outputs"),
        ("by_sgd", "adam_sharpness", "has no state of Adam"),
    ],
)
def test_measure_that_a_task_does_not_allow_raises_before_any_other(
    task: str, further: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(tmp_path / "run", f"{__name__}:{task}", methods=("base", "sam"))
    monkeypatch.setattr(jobs, "measure_job", lambda job, progress: pytest.fail("the measurement has begun"))
    with pytest.raises(ExperimentError, match=f"^base-seed0: .*{message}") as raised:
        measured(folder, "base-seed0", further=f"rounding,{further}")
    assert "\n" not in str(raised.value)
    assert not list(folder.path.rglob(FLATNESS))
