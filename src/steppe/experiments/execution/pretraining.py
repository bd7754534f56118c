"""What runs start from: the task, and the backbone, a network pretrained here once or a published checkpoint."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import cloudpickle  # type: ignore[import-untyped]
import torch
from rich.console import Console
from torch.nn.modules.batchnorm import _BatchNorm

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import CLASSES, Dataset
from steppe.experiments.data.sampling import hold_out
from steppe.experiments.errors import DataError, ExperimentError, first_line
from steppe.experiments.execution.executor import Executor, Job, MakeTask, failures
from steppe.experiments.execution.progress import RunProgress, print_line
from steppe.experiments.models.backbones import Backbone, from_hub
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.storage import checkpoint_file
from steppe.experiments.storage.checkpoints import owner
from steppe.experiments.storage.files import read_checked, write_checked
from steppe.experiments.storage.run_folder import CHECKPOINT, RunFolder
from steppe.experiments.tasks.images import images_task, second_dataset
from steppe.experiments.tasks.load import held_out, load_task
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.stopping import on_signals
from steppe.experiments.world import World


def load_data(recipe: Recipe, world: World) -> Dataset:
    """Load a recipe's data set; the first process downloads it, if need be, before the others read it."""
    with world.first_process_first():
        return data.load(recipe.data.dataset, recipe.data.data_dir)


def prepare_task(
    executor: Executor, path: Path, console: Console, given: Task | None = None, one_in: int | None = None
) -> MakeTask:
    """Return the function that makes the task of a run: the user's own, or one on the recipe's data set.

    `path` is the run folder; `given` is a task that has no name by which it could be imported. With `one_in`, one in so
    many training samples is held out and takes the place of the test data.
    """
    recipe = executor.recipe
    if recipe.data.task:
        then = recipe.forgetting.then if one_in is None else ""
        task = _prepared(given or load_task(recipe.data.task), one_in, then)
        return OneTask(task) if task.entry_point is None else NamedTask(task, task.entry_point, one_in, then)
    dataset = load_data(recipe, executor.world)
    if one_in is not None:
        return partial(images_task, with_backbone(hold_out(dataset, one_in), executor, path, console))
    second = None
    if recipe.forgetting.then:
        with executor.world.first_process_first():
            second = second_dataset(recipe.forgetting.then, dataset, recipe.data.data_dir)
    return partial(images_task, with_backbone(dataset, executor, path, console), robustness=True, second=second)


def _prepared(task: Task, one_in: int | None, then: str) -> Task:
    """Return a task for a search, or for a comparison with its second task, by its name or its own."""
    if one_in is not None:
        return replace(held_out(task, one_in), then=None)
    return replace(task, then=load_task(then)) if then else task


@dataclass(frozen=True)
class OneTask:
    """A function that returns the same task for every recipe; sent to another process, it takes everything along."""

    task: Task

    def __call__(self, recipe: Recipe) -> Task:
        return self.task

    def __reduce__(self) -> tuple[Callable[[bytes], OneTask], tuple[bytes]]:
        return _sent, (_bytes(self.task),)


@dataclass(frozen=True)
class NamedTask:
    """A function that returns the task of a name; another process imports it, once, by the name."""

    task: Task
    name: str
    one_in: int | None
    then: str = ""

    def __call__(self, recipe: Recipe) -> Task:
        return self.task

    def __reduce__(self) -> tuple[Callable[..., NamedTask], tuple[str, int | None, str]]:
        return _imported, (self.name, self.one_in, self.then)


def _bytes(task: Task) -> bytes:
    """Pickle a task, also with functions that no name leads to, as a notebook's."""
    try:
        return bytes(cloudpickle.dumps(task))
    except Exception as error:
        raise ExperimentError(
            f"the task cannot be sent to another process ({type(error).__name__}: {first_line(error)}): name it, "
            "package.module:task, so that each process imports it, or train one run after the other in this process "
            "with runs_at_once=1"
        ) from error


def _sent(task: bytes) -> OneTask:
    return OneTask(pickle.loads(task))


@cache
def _imported(name: str, one_in: int | None, then: str) -> NamedTask:
    """Return the same object for every run that a worker trains."""
    return NamedTask(_prepared(load_task(name), one_in, then), name, one_in, then)


def train_runs(
    runs: Iterable[Run], make_task: MakeTask, executor: Executor, folder: RunFolder, console: Console
) -> str | None:
    """Train runs of a folder with a progress display; return one line on those that failed, if any."""
    jobs = [Job(run, folder.run(run)) for run in runs]
    total = sum(job.run.standardized_epochs for job in jobs)
    progress = RunProgress(console, total, task=executor.recipe.task) if executor.world.rank == 0 else Reporter()
    with progress, on_signals() as stop:
        return failures(executor.run(jobs, make_task, folder.path, progress, stop))


def resolve_pretraining(recipe: Recipe, console: Console) -> Recipe:
    """Choose the data for `pretrain_on=auto`: the whole Fashion-MNIST if it is on this machine, else the sample."""
    if recipe.model.backbone != "own" or recipe.model.pretrain_on != "auto":
        return recipe
    if data.is_available(recipe.data.data_dir):
        return recipe.replace(pretrain_on="fashion-mnist")
    print_line(
        console,
        "Note: the full Fashion-MNIST is not on this machine, so the backbone is pretrained on the 3,000 images of the "
        "sample, and will be a weaker one. `--pretrain-on fashion-mnist` downloads it; --data-dir names a folder.",
    )
    return recipe.replace(pretrain_on="sample")


def with_backbone(dataset: Dataset, executor: Executor, path: Path, console: Console) -> Dataset:
    """Return `dataset` with the backbone that the runs of `executor.recipe` start from, pretrained if need be.

    `path` is the run folder.

    Raises:
        ExperimentError: if the backbone cannot be loaded or trained, or differs from that of the folder.
        Stopped: on a signal; the pretraining then resumes at the next call.
    """
    recipe, world = executor.recipe, executor.world
    if recipe.model.backbone == "none":
        return dataset
    if recipe.model.backbone == "own":
        backbone = _pretrained(executor, path, console)
    else:
        backbone = from_hub(recipe.model.backbone, len(CLASSES), recipe.model.image_size)
    in_shares = world.size > 1 and world.device.type == "cpu"
    if in_shares and any(isinstance(module, _BatchNorm) for module in backbone.model.modules()):
        raise ExperimentError(
            f"{recipe.model.backbone} has BatchNorm layers, and in several processes on CPUs each would normalize by "
            "its own part of the batch: start it without torchrun, with --on ray for many runs at a time, or take a "
            "checkpoint without BatchNorm"
        )
    if world.rank == 0:
        _claim(path / "backbone.json", backbone, console)
    return replace(dataset, backbone=backbone)


def _claim(file: Path, backbone: Backbone, console: Console) -> None:
    """Record the backbone of a folder's runs; ExperimentError if it is another one than before."""
    digest = backbone.digest()
    remedy = "the initial weights of the runs here are unknown, so choose another folder with --out"
    before = read_checked(file, lambda values: str(values["sha256"]), remedy) if file.exists() else digest
    if before != digest:
        raise ExperimentError(
            f"the runs in {file.parent} started from other weights (SHA-256 {before[:12]}) than {backbone.source} has "
            f"now ({digest[:12]}), and could not be compared with these: choose another folder with --out"
        )
    write_checked(file, {"source": backbone.source, "sha256": digest})
    print_line(console, f"Backbone: {backbone.source} (SHA-256 {digest[:12]})")


def pretraining_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe that pretrains the backbone of a resolved recipe."""
    model = recipe.model
    assert model.pretrain_on != "auto"
    return replace(Recipe(), hardware=recipe.hardware).replace(
        name="backbone",
        width=model.width,
        stem_stride=model.stem_stride,
        norm=model.norm,
        dataset=model.pretrain_on,
        data_dir=recipe.data.data_dir if model.pretrain_on == "fashion-mnist" else None,
        methods=("sgd",),
        momentum=0.9,
        lr=0.05,
        batch_size=128,
        epochs=model.pretrain_epochs,
        eval_every=model.pretrain_epochs,
        seeds=1,
        checkpoint_seconds=recipe.output.checkpoint_seconds,
    )


def _pretrained(executor: Executor, path: Path, console: Console) -> Backbone:
    """Pretrain the network, or load it if that was done before."""
    recipe, world = pretraining_recipe(executor.recipe), executor.world
    model, epochs = recipe.model, recipe.comparison.epochs
    (run,) = recipe.runs()
    folder = RunFolder(_folder(recipe, world, path))
    checkpoint, its_owner = folder.run(run) / CHECKPOINT, owner(run, world.size, None)
    state = checkpoint_file.load(checkpoint, its_owner) if checkpoint.exists() else {"records": []}
    with checkpoint_file.one_line_errors(checkpoint):
        finished = bool(state["records"]) and state["records"][-1]["standardized_epoch"] >= epochs
    if not finished:
        with folder.locked() if world.rank == 0 else nullcontext():
            if world.rank == 0:
                folder.claim(recipe, world.size)
                print_line(console, f"Pretraining the backbone, once: it is kept in {folder.path}")
            failed = train_runs([run], partial(images_task, load_data(recipe, world)), executor, folder, console)
            if failed is not None:
                raise ExperimentError(failed)
        state = checkpoint_file.load(checkpoint, its_owner)
    # the drawn weights are overwritten, so the caller's generator must not advance
    with torch.random.fork_rng(devices=[]):
        network = PreActResNet18(model.width, stem_stride=model.stem_stride, norm=model.norm)
    with checkpoint_file.one_line_errors(checkpoint):
        network.load_state_dict(state["model"])
        test = float(state["records"][-1]["test_accuracy"])
    name = "the sample of Fashion-MNIST" if recipe.data.dataset == "sample" else "Fashion-MNIST"
    source = f"PreAct ResNet-18 (width {model.width}), {epochs} epochs on {name}, {test:.2f} % there"
    return Backbone(network, "head", source)


def _folder(recipe: Recipe, world: World, path: Path) -> Path:
    """Return the folder of a backbone: in the user's cache, by its configuration; else in the run folder."""
    depends_on = recipe.result_options() | {"processes": world.size, "torch": torch.__version__}
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    key = f"width{recipe.model.width}-{recipe.data.dataset}-{recipe.comparison.epochs}-{digest}"
    try:
        return data.cache_home() / "steppe" / "backbones" / key
    except DataError:  # the user of a container may have no home
        return path / "backbones" / key
