"""A run on a user's own task that two processes train together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from own_tasks import classifier, data, run_of
from tiny import CPU, RecordingReporter, untimed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ranks import start_ranks
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks import check as check_module
from steppe.experiments.tasks.batches import Epochs
from steppe.experiments.tasks.check import check
from steppe.experiments.tasks.samples import TensorSamples
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stopped
from steppe.experiments.world import World
from stops import StopAfter


def layers(dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def task_of(kind: str) -> Task:
    inputs, labels = data(31, seed=1)  # the last batches cannot be halved
    test = TensorDataset(inputs, labels)
    fields: dict[str, dict[str, Any]] = {
        "tensors": {"schedule": lambda optimizer, n: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n)},
        "datasets without metrics": {"train": TensorDataset(*data()), "test": test, "metrics": {}},
        "a loader": {"train": DataLoader(TensorDataset(*data()), 10, shuffle=True), "batch_size": 10},
        "a list of test batches": {"test": [(inputs[i : i + 7], labels[i : i + 7]) for i in range(0, 31, 7)]},
        "one test sample": {"test": (inputs[:1], labels[:1])},
        "one test sample of a dataset": {"test": TensorDataset(inputs[:1], labels[:1])},
        "dropout": {
            "model": lambda: layers(0.5),
            "train": data(46),
            "batch_size": 4,
        },  # the processes draw different amounts
    }
    return classifier(**{"model": lambda: layers(0.0)} | fields[kind])


def train_in(world: World, kind: str, folder: Path, method: str, stop_after: int | None = None) -> Any:
    task = task_of(kind)
    run = run_of(task, method, schedule="own" if task.schedule else "constant", eval_every=1)
    run = replace(run, recipe=run.recipe.replace(methods=(run.method, MethodSpec.parse("asam"))))
    if stop_after is not None:
        with pytest.raises(Stopped):
            train(run, folder, task, world, RecordingReporter(), StopAfter(stop_after))
    return untimed(train(run, folder, task, world))


def train_together(*arguments: Any) -> Any:
    return train_in(World(torch.device("cpu"), dist.get_rank(), dist.get_world_size()), *arguments)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("tensors", "sgd"),  # with averaged weights beside it, as a control
        ("a loader", "sam"),
        ("datasets without metrics", "sam+ema"),
        pytest.param("a list of test batches", "sgd", marks=pytest.mark.slow),
        pytest.param("one test sample", "sgd", marks=pytest.mark.slow),
        ("one test sample of a dataset", "sgd"),
    ],
)
def test_two_processes_train_and_measure_as_one(kind: str, method: str, tmp_path: Path) -> None:
    first, second = start_ranks()(train_together, kind, tmp_path / "two", method)
    alone = train_in(CPU, kind, tmp_path / "one", method)
    for records in (first, second):
        assert len(records) == len(alone) == 2
        for together, wanted in zip(records, alone, strict=True):
            assert flat(together) == pytest.approx(flat(wanted), abs=1e-5, rel=1e-5)


def flat(record: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if not isinstance(v, dict)} | record.get("measures", {})


def test_two_processes_resume_within_an_epoch_to_the_same_bits(tmp_path: Path) -> None:
    whole, _ = start_ranks()(train_together, "dropout", tmp_path / "whole", "sam")
    parts, _ = start_ranks()(train_together, "dropout", tmp_path / "parts", "sam", 1)  # at the 8th batch
    assert whole == parts


def test_batch_smaller_than_the_number_of_processes_is_refused() -> None:
    with pytest.raises(ExperimentError, match="a batch of 1 is shared out over 2 processes"):
        Epochs(TensorSamples(data(4)), 1, 0, World(torch.device("cpu"), 0, 2))


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.used(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (classifier(), "BatchNorm layers, and in several processes on CPUs"),
        (classifier(model=PartlyUsed), "no gradient to unused.weight, and several processes would wait"),
    ],
)
def test_model_that_several_processes_cannot_train_is_refused_first(
    task: Task, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(task, CPU.device)
    monkeypatch.setattr(check_module, "launched", lambda: 2)
    with pytest.raises(ExperimentError, match=reason):
        check(task, CPU.device)
