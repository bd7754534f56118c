"""Label noise: a fraction of the training labels is wrong, so a network can fit them by memorizing only."""

import torch

from steppe.experiments.data.datasets import CLASSES, Split
from steppe.experiments.data.seeds import LABEL_NOISE, generator


def mislabeled(split: Split, fraction: float, seed: int) -> Split:
    """Give a fraction of the images, rounded, a wrong class drawn uniformly by `seed`.

    A smaller fraction gives a subset of the wrong labels of a larger one.

    >>> split = Split(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10))
    >>> (mislabeled(split, 0.2, seed=0).labels != split.labels).sum()
    tensor(2)
    """
    n, draws = len(split), generator(seed, LABEL_NOISE)
    shuffled = torch.randperm(n, generator=draws)
    shift = torch.randint(1, len(CLASSES), (n,), generator=draws)
    labels = split.labels.cpu().clone()
    wrong = shuffled[: round(fraction * n)]
    labels[wrong] = (labels[wrong] + shift[wrong]) % len(CLASSES)
    return Split(split.images, labels.to(split.labels.device))
