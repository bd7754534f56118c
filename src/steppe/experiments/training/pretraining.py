"""Where runs start from: nothing, a network pretrained here once and kept, or somebody's checkpoint."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.modules.batchnorm import _BatchNorm

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import CLASSES, DataError, Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import Executor, Job, failures
from steppe.experiments.execution.progress import RunProgress
from steppe.experiments.models.backbones import Backbone, from_hub
from steppe.experiments.models.preact_resnet import preact_resnet18
from steppe.experiments.storage import checkpoints
from steppe.experiments.storage.files import write_json
from steppe.experiments.storage.run_folder import CHECKPOINT, RunFolder
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.training.run import owner
from steppe.experiments.training.stopping import on_signals
from steppe.experiments.world import World

__all__ = ["pretraining", "reduced", "with_start"]


def reduced(recipe: Recipe, console: Console) -> Recipe:
    """Say what `pretrain_on=auto` means here."""
    if recipe.model.backbone != "own" or recipe.model.pretrain_on != "auto":
        return recipe
    if data.is_here(recipe.data.data_dir):
        return recipe.replace(pretrain_on="fashion-mnist")
    _say(
        console,
        "Note: the full Fashion-MNIST is not on this machine, so the backbone is pretrained on the 3,000 images of the "
        "sample, and will be a weaker one. `--pretrain-on fashion-mnist` downloads it; --data-dir names a folder.",
    )
    return recipe.replace(pretrain_on="sample")


def with_start(dataset: Dataset, executor: Executor, path: Path, console: Console) -> Dataset:
    """Give `dataset` the backbone that the runs of `executor.recipe` start from; `path` is their run folder.

    Raises ExperimentError or DataError when it cannot be had, and Stopped when somebody asked to stop; pretraining
    then goes on where it was.
    """
    recipe, world = executor.recipe, executor.world
    if recipe.model.backbone == "none":
        return dataset
    if recipe.model.backbone == "own":
        backbone = _pretrained(executor, path, console)
    else:
        backbone = from_hub(recipe.model.backbone, len(CLASSES), recipe.model.image_size)
    if (
        world.size > 1
        and world.device.type == "cpu"
        and any(isinstance(m, _BatchNorm) for m in backbone.model.modules())
    ):
        raise ExperimentError(
            f"{recipe.model.backbone} has BatchNorm layers, and in several processes on CPUs each would normalize by its own "
            "part of the batch: start it without torchrun, with --on ray for many runs at a time, or take a checkpoint "
            "without BatchNorm"
        )
    if world.rank == 0:
        _claim(path / "backbone.json", backbone, console)
    return replace(dataset, start=backbone)


def _claim(file: Path, backbone: Backbone, console: Console) -> None:
    """Note what the folder's runs start from, or see that it is what they started from; ExperimentError else."""
    digest = backbone.digest()
    try:
        before = str(json.loads(file.read_text())["sha256"]) if file.exists() else digest
    except (ValueError, TypeError, KeyError) as error:
        raise ExperimentError(
            f"{file} is damaged ({error}), so nobody knows what the runs here started from: choose another folder with "
            "--out"
        ) from error
    if before != digest:
        raise ExperimentError(
            f"the runs in {file.parent} started from other weights (SHA-256 {before[:12]}) than {backbone.source} has "
            f"now ({digest[:12]}), and could not be compared with these: choose another folder with --out"
        )
    write_json(file, {"source": backbone.source, "sha256": digest})
    _say(console, f"Backbone: {backbone.source} (SHA-256 {digest[:12]})")


def pretraining(recipe: Recipe) -> Recipe:
    """The recipe of the backbone that `recipe`, which is resolved and reduced, starts from."""
    assert recipe.model.pretrain_on != "auto"
    options = recipe.options()
    return Recipe().replace(
        name="backbone",
        dataset=recipe.model.pretrain_on,
        data_dir=recipe.data.data_dir if recipe.model.pretrain_on == "fashion-mnist" else None,
        methods=("sgd",),
        momentum=0.9,
        lr=0.05,
        batch_size=128,
        epochs=recipe.model.pretrain_epochs,
        eval_every=recipe.model.pretrain_epochs,
        seeds=1,
        **{name: options[name] for name in _SHARED},
    )


_SHARED = (
    *("width", "stem_stride", "norm", "device", "amp", "channels_last", "compile", "threads"),
    *("cuda_graphs", "checkpoint_seconds"),
)


def _pretrained(executor: Executor, path: Path, console: Console) -> Backbone:
    """Pretrain the network, or take it from where it was kept."""
    recipe, world = pretraining(executor.recipe), executor.world
    (run,) = recipe.runs()
    folder = RunFolder(_kept(recipe, world, path))
    checkpoint, whose = folder.run(run) / CHECKPOINT, owner(run, world.size, None)
    if not _finished(checkpoint, whose, recipe.comparison.epochs):
        with folder.locked() if world.rank == 0 else nullcontext():
            if world.rank == 0:
                folder.claim(recipe, world.size)
                _say(console, f"Pretraining the backbone, once: it is kept in {folder.path}")
            if world.rank > 0:
                world.barrier()
            images = data.load(recipe.data.dataset, recipe.data.data_dir)
            if world.rank == 0:
                world.barrier()
            progress = RunProgress(console, run.standardized_epochs) if world.rank == 0 else Reporter()
            with progress, on_signals() as stop:
                failed = failures(list(executor.run([Job(run, folder.run(run))], images, folder.path, progress, stop)))
            if failed is not None:
                raise ExperimentError(failed)
    state = checkpoints.load(checkpoint, whose)
    # its weights are overwritten: the generator of whoever calls must not notice that they were drawn
    with torch.random.fork_rng(devices=[]):
        model = preact_resnet18(recipe.model.width, stem_stride=recipe.model.stem_stride, norm=recipe.model.norm)
    model.load_state_dict(state["model"])
    name = "the sample of Fashion-MNIST" if recipe.data.dataset == "sample" else "Fashion-MNIST"
    test = state["records"][-1]["test_accuracy"]
    source = f"PreAct ResNet-18 (width {recipe.model.width}), {recipe.comparison.epochs} epochs on {name}, {test:.2f} % there"
    return Backbone(model, "head", source)


def _kept(recipe: Recipe, world: World, path: Path) -> Path:
    """The folder of a backbone: in the user's cache, by its whole configuration; else in the run folder."""
    whole = json.dumps(recipe.result() | {"processes": world.size, "torch": torch.__version__}, sort_keys=True)
    key = f"width{recipe.model.width}-{recipe.data.dataset}-{recipe.comparison.epochs}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"
    try:
        return data.cache_home() / "steppe" / "backbones" / key
    except DataError:  # a container's user may have no home
        return path / "backbones" / key


def _finished(checkpoint: Path, whose: str, epochs: int) -> bool:
    if not checkpoint.exists():
        return False
    records = checkpoints.load(checkpoint, whose)["records"]
    return bool(records) and records[-1]["standardized_epoch"] >= epochs


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
