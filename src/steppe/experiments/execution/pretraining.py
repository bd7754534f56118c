"""The backbone that runs start from: a network pretrained here, once, or a published checkpoint."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.modules.batchnorm import _BatchNorm

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import CLASSES, Dataset
from steppe.experiments.errors import DataError, ExperimentError
from steppe.experiments.execution.executor import Executor
from steppe.experiments.execution.progress import print_line
from steppe.experiments.execution.train_runs import train_runs
from steppe.experiments.models.backbones import Backbone, from_hub
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.storage import checkpoint_file
from steppe.experiments.storage.files import read_checked, write_checked
from steppe.experiments.storage.run_folder import CHECKPOINT, RunFolder, owner
from steppe.experiments.tasks.images import images_task
from steppe.experiments.world import World


def load_data(recipe: Recipe, world: World) -> Dataset:
    """Load a recipe's data set; the first process downloads it, if need be, before the others read it."""
    with world.first_process_first():
        return data.load(recipe.data.dataset, recipe.data.data_dir)


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
