"""Tasks of a user's own, small enough for tests, and their runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny import CPU, RecordingReporter, untimed
from torch import Tensor, nn

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import METHODS
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data.accuracy import accuracy
from steppe.experiments.storage.run_folder import CHECKPOINT
from steppe.experiments.tasks.task import Metric, Task
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stopped
from stops import StopAfter

ON_ANY_MODEL = [name for name, method in METHODS.items() if not method.needs_adapters]
"""The methods that do not need a model with adapters."""
OPTIONS = {"device": "cpu", "threads": 1, "cuda_graphs": False, "schedule": "constant", "epochs": 2, "seeds": 1}


def data(n: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    return F.one_hot(labels, 5).float() + 0.5 * torch.randn(n, 5, generator=g), labels


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def classifier(**fields: Any) -> Task:
    usual: dict[str, Any] = {
        "model": net,
        "train": data(),
        "test": data(32, seed=1),
        "optimizer": sgd,
        "loss": F.cross_entropy,
        "metrics": {"accuracy": Metric(accuracy, unit="%")},
        "batch_size": 12,
        "classes": 3,
    }
    return Task(**usual | fields)


def recipe_of(task: Task, **options: Any) -> Recipe:
    recipe = RECIPES["task"][0].replace(**OPTIONS | {"batch_size": task.batch_size} | options)
    return replace(recipe, task=task.info)


def run_of(task: Task, method: str = "sam", seed: int = 0, **options: Any) -> Run:
    spec = MethodSpec.parse(method)
    return Run(recipe_of(task, methods=(spec,), **options), spec, seed)


def result(task: Task, folder: Path, method: str = "sam", *, stop_after: int | None = None, **options: Any) -> Any:
    """Train a run, stopped in the middle and resumed if `stop_after` is given; return its records and its weights."""
    run = run_of(task, method, **options)
    if stop_after is not None:
        try:
            train(run, folder, task, CPU, RecordingReporter(), StopAfter(stop_after))
        except Stopped:
            assert torch.load(folder / CHECKPOINT, weights_only=True)["batch"], "it did not stop within an epoch"
        else:
            raise AssertionError("the run did not stop")
    records = train(run, folder, task, CPU)
    weights = torch.load(folder / CHECKPOINT, weights_only=True)["model"]
    return untimed(records), {name: tensor.tolist() for name, tensor in weights.items()}
