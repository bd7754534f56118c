"""Batches of a split, shuffled and normalized on its device."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steppe.experiments.data.datasets import Split, normalize
from steppe.experiments.data.sampling import generator
from steppe.experiments.world import World


@dataclass(frozen=True, eq=False)
class Batch:
    """This process's share of a global batch of `size` images in an epoch of the run, counted from 0."""

    split: Split
    indices: Tensor
    """Positions of the images in the split, int64 (n,), on its device."""
    size: int
    epoch: int

    @cached_property
    def images(self) -> Tensor:
        """float32 (n, 1, 28, 28), gathered at first use."""
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
    """Return the order of `n` images in an epoch, int64 (n,); it depends on these three numbers alone.

    So a run can be resumed anywhere, and all methods of a seed are trained on the same batches.
    """
    return torch.randperm(n, generator=generator(seed, epoch))


def count(n: int, batch_size: int) -> int:
    """Return the number of batches of `n` images, none of them larger than `batch_size`.

    >>> count(3000, 64)
    47
    """
    return -(-n // batch_size)


def start(index: int, n: int, number: int) -> int:
    """Return the position among `n` images at which batch `index` of `number` begins; sizes differ by one at most.

    >>> [start(i, 10, 4) for i in range(5)]
    [0, 2, 5, 7, 10]
    """
    return index * n // number


def batches(
    split: Split, batch_size: int, indices: Tensor, world: World, first: int = 0, epoch: int = 0
) -> Iterator[Batch]:
    """Cut the split, in the order of `indices`, into global batches; yield this process's share of each.

    Begin with batch number `first`. Sizes differ by one image at most: a smaller last batch would end each epoch, just
    before a measurement, with a step on the noisy BatchNorm statistics of a few images.
    """
    indices, n, number = indices.to(split.labels.device), len(indices), count(len(indices), batch_size)
    for index in range(first, number):
        whole = indices[start(index, n, number) : start(index + 1, n, number)]
        mine = whole[world.share(len(whole))]
        yield Batch(split, mine, len(whole), epoch)
