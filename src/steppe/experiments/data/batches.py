"""Batches of a split that lies on its device as bytes: shuffled, cut and normalized there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from numpy.random import SeedSequence
from torch import Tensor

from steppe.experiments.data.datasets import Split, normalize
from steppe.experiments.world import World

__all__ = ["Batch", "batches", "count", "order", "start"]


@dataclass(frozen=True, eq=False)
class Batch:
    """This process's share of a global batch of `size` images in the run's own `epoch`, counted from 0."""

    split: Split
    indices: Tensor
    """Which images of the split they are, int64 (n,), on its device."""
    size: int
    epoch: int

    @cached_property
    def images(self) -> Tensor:
        """float32 (n, 1, 28, 28), gathered when they are first asked for."""
        return normalize(self.split.images[self.indices])

    @cached_property
    def labels(self) -> Tensor:
        """int64 (n,)."""
        return self.split.labels[self.indices]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images and labels, as `Forward` and the builders of `steppe.closures` take them."""
        return self.images, self.labels

    def __len__(self) -> int:
        return len(self.indices)


def order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of `n` images in an epoch, int64 (n,): it depends on nothing but these three.

    So a run can be resumed anywhere, and every method of a seed sees the same batches.
    """
    # torch's CPU generator keeps 32 bits of its seed: (seed << 32) + epoch would shuffle every seed alike
    mixed = int(SeedSequence((seed, epoch)).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


def count(n: int, batch_size: int) -> int:
    """How many batches `n` images make, none of them larger than `batch_size`.

    >>> count(3000, 64)
    47
    """
    return -(-n // batch_size)


def start(index: int, n: int, number: int) -> int:
    """Where batch `index` of `number` begins among `n` images: their sizes differ by one at most.

    >>> [start(i, 10, 4) for i in range(5)]
    [0, 2, 5, 7, 10]
    """
    return index * n // number


def batches(
    split: Split, batch_size: int, indices: Tensor, world: World, first: int = 0, epoch: int = 0
) -> Iterator[Batch]:
    """Cut the split, in the order of `indices`, into global batches from number `first` on; yield a share of each.

    Their sizes differ by one image at most. A last batch of a few images, as cutting off whole batches would leave,
    is a step on the noisy statistics of a few images (BatchNorm) at the end of each epoch, just before it is measured.
    """
    indices, n, number = indices.to(split.labels.device), len(indices), count(len(indices), batch_size)
    for index in range(first, number):
        whole = indices[start(index, n, number) : start(index + 1, n, number)]
        mine = whole[world.share(len(whole))]
        yield Batch(split, mine, len(whole), epoch)
