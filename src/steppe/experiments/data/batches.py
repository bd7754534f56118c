"""The order of the samples in an epoch, and its batches."""

import torch
from torch import Tensor

from steppe.experiments.data.sampling import generator


def order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `n` samples in an epoch, int64 (n,); it depends on these three numbers alone.

    So a run can be resumed anywhere, and all methods of a seed are trained on the same batches.
    """
    return torch.randperm(n, generator=generator(seed, epoch))


def count(n: int, batch_size: int) -> int:
    """Return the number of batches of `n` samples, none of them larger than `batch_size`.

    >>> count(3000, 64)
    47
    """
    return -(-n // batch_size)


def start(index: int, n: int, number: int) -> int:
    """Return the position among `n` samples at which batch `index` of `number` begins; sizes differ by one at most.

    A smaller last batch would end each epoch, just before a measurement, with a step on the noisy BatchNorm statistics
    of a few samples.

    >>> [start(i, 10, 4) for i in range(5)]
    [0, 2, 5, 7, 10]
    """
    return index * n // number
