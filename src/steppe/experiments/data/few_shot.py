"""Draw a few training images of each class."""

import torch

from steppe.experiments.data.datasets import Split
from steppe.experiments.data.seeds import FEW_SHOT, generator
from steppe.experiments.errors import ExperimentError


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """Draw `shots` images of each class by `seed`; a smaller number gives a subset of a larger one's.

    Raises ExperimentError when a class has fewer.
    """
    labels, draws = split.labels.cpu(), generator(seed, FEW_SHOT)
    chosen = []
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        if len(members) < shots:
            raise ExperimentError(
                f"shots={shots}: class {label} has {len(members)} training images, so there are not so many of each "
                f"class to draw: take --shots {len(members)} or fewer, or leave it out to train on all images"
            )
        chosen.append(members[torch.randperm(len(members), generator=draws)[:shots]])
    drawn = torch.cat(chosen).sort().values.to(split.labels.device)
    return Split(split.images[drawn], split.labels[drawn])
