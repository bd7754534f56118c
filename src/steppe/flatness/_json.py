"""Tensors as nested lists for ``json``, with null for values that are not finite, as JSON has neither inf nor NaN."""

import math
from typing import Any

import torch
from torch import Tensor


def to_lists(x: Tensor) -> Any:
    """Return nested lists of floats, None where they are not finite."""
    if x.dim() > 0:
        return [to_lists(row) for row in x]
    return float(x) if x.isfinite() else None


def from_lists(numbers: Any) -> Tensor:
    """Return the float64 tensor of nested lists, NaN for None."""

    def floats(x: Any) -> Any:
        return [floats(row) for row in x] if isinstance(x, list) else math.nan if x is None else x

    return torch.tensor(floats(numbers), dtype=torch.float64)


def finite_or_none(value: Any) -> Any:
    """Return the value; None for a float that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
