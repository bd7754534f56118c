"""A few training images of each class: what fine-tuning is asked for when there are no more."""

from __future__ import annotations

import torch
from numpy.random import SeedSequence

from steppe.experiments.data.datasets import Split
from steppe.experiments.errors import ExperimentError

__all__ = ["few_shot"]

_DRAW = 0x5407  # apart from the shuffling of the same seed


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """Draw `shots` images of each class by `seed`; the fewer of one seed are among its more.

    Raises ExperimentError when a class has not so many.
    """
    labels = split.labels.cpu()
    mixed = int(SeedSequence((seed, _DRAW)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    chosen = []
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        if len(members) < shots:
            raise ExperimentError(
                f"shots={shots}: class {label} has {len(members)} training images, so there are not so many of each "
                f"class to draw: take --shots {len(members)} or fewer, or leave it out to train on all images"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    drawn = torch.cat(chosen).sort().values.to(split.labels.device)
    return Split(split.images[drawn], split.labels[drawn])
