"""Operations on lists of tensors for authors of rules: accurate norms, multi-tensor arithmetic, sharded tensors, draws."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steppe._tensors.dtensor import foreach, is_sharded, local, shard_like, whole
from steppe._tensors.ops import (
    accumulator,
    add_scaled_,
    all_finite,
    as_real,
    copy_,
    dot,
    norm,
    real_views,
    reciprocal,
    where_finite,
)
from steppe._tensors.random import integers, normal, uniform

__all__ = [
    "accumulator",
    "add_scaled_",
    "all_finite",
    "as_real",
    "check_weight",
    "copy_",
    "dot",
    "foreach",
    "integers",
    "is_sharded",
    "local",
    "norm",
    "normal",
    "orthogonal",
    "real_views",
    "reciprocal",
    "scaled_by",
    "shard_like",
    "to_wide",
    "uniform",
    "where_finite",
    "whole",
]


def orthogonal(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    """The part of x orthogonal to y, each list seen as one vector: x - (x.y / |y|^2) y; exactly 0 where x = y."""
    square = dot(ys, ys)
    along = torch.where(square == 0, 0.0, dot(xs, ys) / square)
    rest = [x.clone() for x in xs]
    add_scaled_(rest, -along, ys)
    return rest


def check_weight(name: str, value: float, what: str) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {value}: {what}")


def to_wide(x: Tensor) -> Tensor:
    """Where squares of x fit: float32 for half precision."""
    return x.float() if x.dtype.itemsize <= 2 else x


def scaled_by(x: Tensor, factor: Tensor) -> Tensor:
    """x times a factor that may not fit into x's own dtype."""
    wide = to_wide(x)
    return (wide * factor.to(wide)).to(x.dtype)
