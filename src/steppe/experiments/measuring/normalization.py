"""Find out if a loss takes logits whose scale can be normalized."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from steppe.flatness import Objective

Loss = Callable[..., Tensor]
"""(outputs, targets) -> the mean loss of a batch."""


def is_cross_entropy(loss: Loss | None) -> bool:
    """True if a loss is torch's cross-entropy, as a function or a module."""
    return loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)


def takes_logits(loss: Loss, objective: Callable[[Loss], Objective]) -> bool:
    """True if a loss takes logits of shape (samples, classes), of three classes or more.

    With two classes, only the difference of the logits matters, and normalized, only its sign would be left.
    `objective` makes the objective of a loss; it is evaluated once.
    """
    arguments: list[Any] = []

    def record(outputs: Any, targets: Any) -> Tensor:
        arguments[:] = arguments or [outputs, targets]  # those of the first batch
        return loss(outputs, targets)

    objective(record).loss()
    outputs, targets = arguments
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    are_logits = outputs.dim() == 2 and outputs.shape[1] > 2
    return are_logits and (not targets.is_floating_point() or is_cross_entropy(loss))
