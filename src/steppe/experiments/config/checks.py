"""What a recipe may not be: each refusal names the field, its value and its meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from steppe.experiments.config.methods import BASES, unknown

if TYPE_CHECKING:  # a recipe checks itself
    from steppe.experiments.config.recipe import Recipe

__all__ = ["check"]

_AT_LEAST: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        "batch_size": (1, "images in one optimizer step"),
        "shots": (1, "training images of each class"),
        "label_noise": (0, "the share of training images with a wrong label"),
        "pretrain_epochs": (1, "the epochs that the backbone is pretrained for"),
        "image_size": (1, "height and width of the images that a checkpoint gets"),
        "epochs": (1, "the compute that each method gets"),
        "extra_epochs": (0, "further compute for the methods that pay more than one pass a step"),
        "eval_every": (1, "standardized epochs from one measurement to the next"),
        "width": (1, "channels of the network's first stage"),
        "flatness_every": (1, "standardized epochs from one measurement of flatness to the next"),
        "flatness_samples": (1, "training images that flatness is measured on"),
        "stem_stride": (1, "the stride of the network's first convolution"),
        "seeds": (1, "runs of each method"),
        "first_seed": (0, "the first run's seed"),
        "momentum": (0, "SGD's momentum"),
        "weight_decay": (0, "the base optimizer's weight decay"),
        "rho": (0, "the radius of SAM's neighborhood"),
        "checkpoint_seconds": (0, "seconds from one checkpoint within an epoch to the next"),
    }
)


def check(recipe: Recipe) -> None:
    """Raise ValueError where a value, or two of them together, make no sense; the methods are checked elsewhere."""
    for field, (least, meaning) in _AT_LEAST.items():
        value = getattr(recipe, field)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"{field}={value}: {meaning}, must be a finite number of at least {least}")
    if not (math.isfinite(recipe.lr) and recipe.lr > 0):
        raise ValueError(f"lr={recipe.lr}: the learning rate must be a finite number above 0")
    if recipe.label_noise >= 1:
        raise ValueError(
            f"label_noise={recipe.label_noise}: a share of the training images, 0.2 for one in five, must be below 1"
        )
    if recipe.threads is not None and recipe.threads < 1:
        raise ValueError(f"threads={recipe.threads}: the number of CPU threads must be at least 1")
    if recipe.head_lr is not None and not (math.isfinite(recipe.head_lr) and recipe.head_lr > 0):
        raise ValueError(f"head_lr={recipe.head_lr}: the head's learning rate must be a finite number above 0")
    if recipe.momentum and not BASES[recipe.base].has_momentum:
        raise ValueError(f"momentum={recipe.momentum}: {recipe.base} has none that could be set; leave it at 0")
    if Path(recipe.name).name != recipe.name or recipe.name in ("", ".."):
        raise ValueError(f"name={recipe.name!r}: it names a folder, so it must be a plain, non-empty name")
    _check_flatness(recipe)
    _check_widths(recipe)
    _check_start(recipe)


def _check_flatness(recipe: Recipe) -> None:
    every, end = recipe.flatness_every, recipe.epochs + recipe.extra_epochs
    if every is None:
        return
    if every < end and every % recipe.eval_every:
        raise ValueError(
            f"flatness_every={every}: flatness is measured where the accuracies are, so it must be a multiple of "
            f"eval_every={recipe.eval_every}, or at least {end}, to be measured at the end only"
        )
    if recipe.rho == 0:
        raise ValueError(
            "rho=0: sharpness is a maximum over the neighborhood of that radius, which holds a single point. Say "
            "--rho 0.05, or leave --flatness-every out"
        )


def _check_widths(recipe: Recipe) -> None:
    widths = recipe.widths
    if not widths:
        return
    said = f"widths={' '.join(map(str, widths))}"
    if widths[0] < 1 or len(set(widths)) < len(widths):
        raise ValueError(f"{said}: channels of the network's first stage, each at least 1 and there once")
    if recipe.width != type(recipe).width:
        raise ValueError(f"width={recipe.width}: {said} are compared, and it would be ignored: leave it out, or them")
    if recipe.backbone != "none":
        raise ValueError(f"backbone={recipe.backbone}: it has a width of its own. Say --backbone none, or no --widths")


def _check_start(recipe: Recipe) -> None:
    kind, colon, name = recipe.backbone.partition(":")
    if recipe.backbone not in ("none", "own") and not (colon and name and kind in ("timm", "hf")):
        raise ValueError(unknown("backbone", recipe.backbone, ("none", "own", "timm:NAME", "hf:NAME", "hf:FOLDER")))
    if recipe.backbone == "own" and recipe.dataset != "digits":
        raise ValueError(
            f"dataset={recipe.dataset}: the own backbone is pretrained on Fashion-MNIST, so it has seen these images "
            "and nothing would be transferred. Say --dataset digits, or --backbone none"
        )
    if recipe.backbone == "none":
        for field in ("freeze", "head_lr"):
            if getattr(recipe, field):
                raise ValueError(
                    f"{field}={getattr(recipe, field)}: without a backbone all layers are new, so it would mean "
                    f"nothing. Say --backbone own or a checkpoint's name, or leave --{field.replace('_', '-')} out"
                )
    if recipe.image_size is not None and recipe.backbone in ("none", "own"):
        raise ValueError(
            f"image_size={recipe.image_size}: images are resized for timm and hf checkpoints only, and "
            f"backbone={recipe.backbone} takes them as they are: leave it out"
        )
    reads_it = recipe.dataset == "fashion-mnist" or (recipe.backbone == "own" and recipe.pretrain_on != "sample")
    if recipe.data_dir is not None and recipe.dataset == "digits" and not reads_it:
        raise ValueError(
            f"data_dir={recipe.data_dir}: nothing here is read from the full Fashion-MNIST, so it would be ignored: "
            "leave it out"
        )
