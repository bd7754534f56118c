"""Draws from a data set: a few images of each class, wrong labels, a validation set."""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from numpy.random import SeedSequence
from torch import Tensor

from steppe.experiments.data.datasets import CLASSES, Dataset, Split
from steppe.experiments.errors import ExperimentError

# One number for each purpose, so that the draws of one seed are independent.
FEW_SHOT, LABEL_NOISE, FLATNESS_SAMPLE = 0x5407, 0x401E, 0xF1A7

LabelNoise = Literal["uniform", "next"]


def generator(seed: int, purpose: int) -> torch.Generator:
    """Return a CPU generator that depends on `seed` and `purpose` alone, and not on torch's global one."""
    return torch.Generator().manual_seed(seed_of(seed, purpose))


def seed_of(*numbers: int) -> int:
    """Mix numbers to one of 32 bits, which torch's CPU generator keeps of a seed."""
    return int(SeedSequence(numbers).generate_state(1)[0])


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """Draw `shots` images of each class by `seed`; a smaller number gives a subset of a larger one's.

    Raises ExperimentError when a class has fewer.
    """
    chosen = []
    for label, members in _shuffled_classes(split.labels, generator(seed, FEW_SHOT)):
        if len(members) < shots:
            raise ExperimentError(
                f"shots={shots}: class {label} has {len(members)} training images, so there are not so many of each "
                f"class to draw: take --shots {len(members)} or fewer, or leave it out to train on all images"
            )
        chosen.append(members[:shots])
    return split.select(torch.cat(chosen).sort().values)


def hold_out(data: Dataset, one_in: int) -> Dataset:
    """Return a data set for tuning, whose test split is one in `one_in` training images of each class.

    The choice depends on the training set alone, not on a seed or the machine.
    """
    held = torch.zeros(len(data.train), dtype=torch.bool)
    for _, members in _shuffled_classes(data.train.labels, torch.Generator().manual_seed(0)):
        held[members[: len(members) // one_in]] = True
    if not held.any():
        raise ExperimentError(
            f"no class has {one_in} training images, so none can be held out for validation: take a smaller --hold-out"
        )
    return Dataset(f"{data.name}, validation", data.train.select(~held), data.train.select(held), data.source)


def mislabeled(split: Split, fraction: float, seed: int, kind: LabelNoise = "uniform") -> Split:
    """Give a fraction of the images, rounded, a wrong class, by `seed`.

    >>> split = Split(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10))
    >>> (mislabeled(split, 0.2, seed=0).labels != split.labels).sum()
    tensor(2)
    """
    return Split(split.images, wrong_labels(split.labels, fraction, seed, classes=len(CLASSES), kind=kind))


def wrong_labels(labels: Tensor, fraction: float, seed: int, *, classes: int, kind: LabelNoise = "uniform") -> Tensor:
    """Return labels, (n,), a fraction of which, rounded, are wrong; those of a smaller fraction are a subset.

    "uniform" draws any other class. "next" takes the next class, 0 after the last one: these errors agree with each
    other, and are harder to resist (the pair flips of Han et al. 2018, https://arxiv.org/abs/1804.06872).

    >>> wrong_labels(torch.tensor([0, 1, 2, 3]), 1.0, seed=0, classes=4, kind="next")
    tensor([1, 2, 3, 0])
    """
    if not 0 <= fraction <= 1 or classes < 2 or kind not in get_args(LabelNoise):
        raise ValueError(
            f"fraction={fraction}, classes={classes}, kind={kind!r}: a fraction is from 0 to 1, a wrong label needs 2 "
            "classes at least, and the kinds are uniform and next"
        )
    n, draws = len(labels), generator(seed, LABEL_NOISE)
    shuffled = torch.randperm(n, generator=draws)
    shift = torch.randint(1, classes, (n,), generator=draws) if kind == "uniform" else torch.ones(n, dtype=torch.int64)
    noisy = labels.cpu().clone()
    wrong = shuffled[: round(fraction * n)]
    noisy[wrong] = (noisy[wrong] + shift[wrong]) % classes
    return noisy.to(labels.device)


def _shuffled_classes(labels: Tensor, draws: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Yield each label, in order, and the positions of its images in a random order."""
    labels = labels.cpu()
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        yield label, members[torch.randperm(len(members), generator=draws)]
