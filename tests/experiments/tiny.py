"""Comparisons small enough for tests; run as a script, it is the command line on such data."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steppe.cli import main
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import Dataset, Split
from steppe.experiments.execution import cpus, prepared_task
from steppe.experiments.execution.executor import MakeTask
from steppe.experiments.models import preact_resnet
from steppe.experiments.models.preact_resnet import STAGES
from steppe.experiments.report import page
from steppe.experiments.storage.records import Record
from steppe.experiments.tasks.batches import Batch, Epochs
from steppe.experiments.tasks.images import ImageSamples, images_task
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.run import Training, train
from steppe.experiments.tuning import tune as tuning
from steppe.experiments.world import World
from steppe.flatness import FAMILIES, Budget

BUDGET = Budget(
    m=8,
    ascent_steps=1,
    restarts=1,
    pairs=2,
    num_eigenvalues=2,
    tol=0.5,
    probes=2,
    density_probes=1,
    density_iterations=3,
    points=0,
    further="batch_sharpness,rounding",
)
"""A measurement of flatness in a second."""
MEASURED = {
    name
    for kind, family in FAMILIES.items()
    for name in family.measures
    if kind != "further" or name in BUDGET.names_of_further
}
"""The measures that it has."""
CPU = World(torch.device("cpu"))
OPTIONS = {"width": 2, "batch_size": 16, "epochs": 4, "seeds": 1, "device": "cpu", "threads": 1, "amp": False}
RESOLVED = {"cuda_graphs": False}


def recipe(**fields: object) -> Recipe:
    return Recipe().replace(**(OPTIONS | RESOLVED | fields))


def run_of(method: str, seed: int = 0, **fields: object) -> Run:
    return Run(recipe(**fields), MethodSpec.parse(method), seed)


def options(**fields: object) -> list[str]:
    """The same as command-line options."""
    return [w for k, v in (OPTIONS | fields).items() for w in (f"--{k.replace('_', '-')}", *str(v).split())]


def split(n: int, seed: int) -> Split:
    """Noisy pictures of ten fixed patterns: something to learn, and something to overfit."""
    patterns = torch.randint(0, 256, (10, 1, 28, 28), generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=g)
    noise = torch.randint(0, 256, (n, 1, 28, 28), generator=g)
    return Split(((patterns[labels] + 3 * noise) // 4).to(torch.uint8), labels)


def dataset(train: int = 72, test: int = 50) -> Dataset:
    return Dataset("tiny", split(train, 0), split(test, 1), "made for tests")


@dataclass
class RecordingReporter(Reporter):
    """Records the progress that it gets."""

    interval: float = 0.0
    steps: list[float] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def step(self, run: Run, standardized_epoch: float, loss: float, samples_per_second: float) -> None:
        self.steps.append(loss)

    def measured(self, run: Run, record: Record) -> None:
        self.records.append(record)


def shallow(patch: pytest.MonkeyPatch) -> None:
    """Let ResNets have two blocks and not eight: a run takes half the time, and all kinds of layers are left."""
    patch.setattr(preact_resnet, "STAGES", (1, 1))
    patch.setattr(prepared_task, "images_task", shallow_task)  # in the processes that train runs


def whole(patch: pytest.MonkeyPatch) -> None:
    """Let ResNets have all their blocks, for tests of the network itself and of processes that make it themselves."""
    patch.setattr("tiny.shallow", lambda patch: None)
    patch.setattr(preact_resnet, "STAGES", STAGES)


def shallow_task(data: Dataset, recipe: Recipe, **options: Any) -> Task:
    """The task of a recipe with a shallow network, also in a process of its own."""
    task = images_task(data, recipe, **options)
    return replace(task, model=partial(_shallow_network, task.model))


def _shallow_network(make: Callable[[], nn.Module]) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        shallow(patch)
        return make()


def make_task(data: Dataset | None = None, **options: bool) -> MakeTask:
    """The function by which executors make the task of a run on the tiny data."""
    return partial(shallow_task, data or dataset(), **options)


def training_of(run: Run, data: Dataset | None = None) -> Training:
    return Training(run, make_task(data)(run.recipe), CPU)


def samples(data: Split) -> ImageSamples:
    return ImageSamples((data.images, data.labels))


def batches_of(
    data: Split, batch_size: int, *, seed: int = 0, epoch: int = 0, first: int = 0, world: World = CPU
) -> Iterator[Batch]:
    return Epochs(samples(data), batch_size, seed, world).batches(epoch, first)


def train_run(
    run: Run, folder: Path, data: Dataset | None = None, *, robustness: bool = False, **kwargs: object
) -> list[Record]:
    """Train a run; with `robustness`, it is measured as the command line does."""
    task = make_task(data, robustness=robustness)(run.recipe)
    return train(run, folder, task, CPU, **kwargs)  # type: ignore[arg-type]


def image_record(
    standardized_epoch: int,
    epoch: float,
    steps: int,
    gradient_evaluations: float,
    passes: float,
    train_loss: float,
    train_accuracy: float,
    test_loss: float,
    test_accuracy: float,
    gap: float,
    *rest: float,
) -> Record:
    """A record of images: `rest` are seconds, images a second, and the measures of sharpness."""
    measures = {"train_loss": train_loss, "train_accuracy": train_accuracy, "test_loss": test_loss}
    measures |= {"test_accuracy": test_accuracy, "gap": gap}
    return Record(standardized_epoch, epoch, steps, gradient_evaluations, passes, measures, *rest)


def untimed(records: list[Record]) -> list[dict[str, object]]:
    """Records without the fields that no two runs share."""
    return [{k: v for k, v in r.to_json().items() if k not in ("seconds", "images_per_second")} for r in records]


def command_line(words: list[str] | None = None, *, draws: bool = True) -> int:
    """Run the command line on the tiny data; without figures, which take longer than the runs, if `draws` is false."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda name, data_dir=None: dataset())
        patch.setattr(cpus, "available", lambda: 1)  # in this process, unless more are asked for
        shallow(patch)
        if not draws:
            patch.setattr(page, "write", lambda folder, recipe, results, summary: folder.path)
            patch.setattr(tuning, "draw", lambda result, folder: [])
        return main(words)


if __name__ == "__main__":
    sys.exit(command_line(draws=False))
