"""Range checks for the options of a recipe; each error names the option, its value and its meaning."""

import math
from collections.abc import Mapping
from typing import Any

_MINIMA: Mapping[str, tuple[float, str]] = {
    "shots": (1, "training images of each class"),
    "label_noise": (0, "the fraction of training images with a wrong label"),
    "width": (1, "channels of the network's first stage"),
    "stem_stride": (1, "the stride of the network's first convolution"),
    "pretrain_epochs": (1, "the epochs that the backbone is pretrained for"),
    "image_size": (1, "height and width of the images that a checkpoint gets"),
    "momentum": (0, "SGD's momentum"),
    "weight_decay": (0, "the base optimizer's weight decay"),
    "rho": (0, "the radius of SAM's neighborhood"),
    "batch_size": (1, "images in one optimizer step"),
    "epochs": (1, "the compute that each method gets"),
    "extra_epochs": (0, "further compute for the methods with more than one pass a step"),
    "seeds": (1, "runs of each method"),
    "first_seed": (0, "the first run's seed"),
    "eval_every": (1, "standardized epochs from one measurement to the next"),
    "flatness_every": (1, "standardized epochs from one measurement of flatness to the next"),
    "flatness_samples": (1, "training images that flatness is measured on"),
    "threads": (1, "the number of CPU threads"),
    "checkpoint_seconds": (0, "seconds from one checkpoint within an epoch to the next"),
}


def check_ranges(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that is out of its range; None is in every range."""
    for name, (limit, meaning) in _MINIMA.items():
        value = options[name]
        if value is not None and not (math.isfinite(value) and value >= limit):
            raise ValueError(f"{name}={value}: {meaning}, must be a finite number of at least {limit}")
    for name, meaning in (("lr", "the learning rate"), ("head_lr", "the head's learning rate")):
        value = options[name]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: {meaning} must be a finite number above 0")
    if options["label_noise"] >= 1:
        raise ValueError(
            f"label_noise={options['label_noise']}: a fraction of the training images, 0.2 for one in five, must be "
            "below 1"
        )
