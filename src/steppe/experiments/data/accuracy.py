"""The accuracy of a classifier."""

from torch import Tensor


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the accuracy in percent, for logits (n, classes, ...) and targets (n, ...).

    >>> import torch
    >>> accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    75.0
    """
    return 100.0 * float((outputs.argmax(1) == targets).sum()) / targets.numel()
