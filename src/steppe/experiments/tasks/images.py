"""The built-in tasks: image classification with the networks and data sets of the recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.experiments.config.methods import BASES
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.accuracy import accuracy
from steppe.experiments.data.datasets import CLASSES, MEAN, STD, Dataset, DatasetName, Split, load, normalize
from steppe.experiments.data.sampling import few_shot, mislabeled
from steppe.experiments.models.backbones import FineTuned
from steppe.experiments.models.networks import new_network
from steppe.experiments.robustness.records import final_measures
from steppe.experiments.robustness.second_tasks import inverted, rotated
from steppe.experiments.tasks.samples import Samples, TensorSamples
from steppe.experiments.tasks.task import Metric, Task

# Images in one forward pass of an evaluation; the number changes memory, speed and the last bits of a result.
_CHUNK, _CHUNK_ON_A_GPU = 500, 5000


class ImageSamples(TensorSamples):
    """Images that are stored as bytes, and normalized when a batch is gathered."""

    def gather(self, positions: Tensor) -> tuple[Tensor, ...]:
        images, labels = self.tensors
        return normalize(images[positions]), labels[positions]


def images_task(dataset: Dataset, recipe: Recipe, *, robustness: bool = False, second: Dataset | None = None) -> Task:
    """Return the task of a recipe on a built-in data set; with `robustness`, trained networks are measured by it.

    `second` is the data set of the second task, on which forgetting is measured.
    """
    if (dataset.backbone is None) != (recipe.model.backbone == "none"):
        raise RuntimeError(
            f"backbone={recipe.model.backbone}, but the data has {dataset.backbone}: load it by "
            "pretraining.with_backbone"
        )
    task = Task(
        name=recipe.name,
        model=partial(_network, dataset, recipe),
        train=partial(_training_images, dataset.train, recipe),
        test=_samples(dataset.test),
        optimizer=partial(_optimizer, recipe),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, unit="%")},
        evaluation_batch_size=_CHUNK_ON_A_GPU if recipe.hardware.device == "cuda" else _CHUNK,
        classes=len(CLASSES),
        final_measures=partial(_robustness, dataset.test) if robustness else None,
        initial_weights=None if dataset.backbone is None else dataset.backbone.digest(),
    )
    if second is None:
        return task
    return replace(task, then=replace(task, train=_samples(second.train), test=_samples(second.test)))


def second_dataset(name: str, first: Dataset, data_dir: Path | None) -> Dataset:
    """Return the data set of a second task: the first one, changed, or another."""
    changes = {"rotated": rotated, "inverted": inverted}
    if name not in changes:
        return load(cast(DatasetName, name), data_dir if name == "fashion-mnist" else None)
    train, test = (Split(changes[name](split.images), split.labels) for split in (first.train, first.test))
    return Dataset(f"{first.name}, {name}", train, test, first.source)


def _network(dataset: Dataset, recipe: Recipe) -> nn.Module:
    model = recipe.model
    if dataset.backbone is not None:
        return dataset.backbone.network(freeze=model.freeze)
    return new_network(model.network, model.width, stem_stride=model.stem_stride, norm=model.norm)


def _training_images(split: Split, recipe: Recipe, seed: int) -> Samples:
    if recipe.data.shots is not None:
        split = few_shot(split, recipe.data.shots, seed)
    if recipe.data.label_noise:
        split = mislabeled(split, recipe.data.label_noise, seed, recipe.data.label_noise_kind)
    return _samples(split)


def _samples(split: Split) -> ImageSamples:
    return ImageSamples((split.images, split.labels))


def _robustness(test: Split, model: nn.Module, raise_if_stopped: Callable[[], None]) -> dict[str, float]:
    return final_measures(model, test.images, test.labels, raise_if_stopped, mean=MEAN, std=STD)


def _optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    options = recipe.training
    trained = model.groups(options.head_lr) if isinstance(model, FineTuned) else model.parameters()
    on_gpu = next(model.parameters()).is_cuda
    return BASES[options.base].build(
        trained, options.lr, recipe.base_momentum, options.weight_decay, nesterov=options.nesterov, on_gpu=on_gpu
    )
