"""The loss that a closure or a pass returned, and its backward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def find_loss(value: Any) -> Any:
    """Return the loss in what a closure returned: alone, first in a tuple or list, or as "loss" in a mapping.

    >>> find_loss((0.5, "accuracy")), find_loss({"loss": 0.5}), find_loss(0.5), find_loss([])
    (0.5, 0.5, 0.5, None)
    """
    if isinstance(value, Mapping):
        return value.get("loss")
    if isinstance(value, tuple | list):
        return value[0] if value else None
    return value


def backward(loss: Tensor, scaler: torch.amp.GradScaler | None) -> None:
    """Run the backward pass of a loss, multiplied by the loss scale if there is a scaler."""
    scaled = loss if scaler is None else scaler.scale(loss)
    scaled.backward()  # type: ignore[no-untyped-call]
