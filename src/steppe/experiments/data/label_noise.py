"""Label noise: a share of the training labels replaced by wrong ones, which a network can only learn by heart."""

from __future__ import annotations

import torch
from numpy.random import SeedSequence

from steppe.experiments.data.datasets import CLASSES, Split

__all__ = ["mislabeled"]

_DRAW = 0x401E  # apart from the shuffling and the few shots of the same seed


def mislabeled(split: Split, share: float, seed: int) -> Split:
    """Give `share` of the images, to the nearest image, a wrong class by `seed`, each of the nine with the same chance.

    The wrong labels of one seed are among those of a larger share.

    >>> split = Split(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10))
    >>> (mislabeled(split, 0.2, seed=0).labels != split.labels).sum()
    tensor(2)
    """
    n = len(split)
    mixed = int(SeedSequence((seed, _DRAW)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    shuffled = torch.randperm(n, generator=generator)
    shift = torch.randint(1, len(CLASSES), (n,), generator=generator)
    labels = split.labels.cpu().clone()
    wrong = shuffled[: round(share * n)]
    labels[wrong] = (labels[wrong] + shift[wrong]) % len(CLASSES)
    return Split(split.images, labels.to(split.labels.device))
