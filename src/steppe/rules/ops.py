"""Operations on lists of tensors, for authors of rules.

A list ``xs`` has one real tensor per parameter, of any shape, floating dtype and device, plain or sharded
(``DTensor``). No operation reads values on the host, so none makes an accelerator wait. A scalar result is a 0-dim
tensor, in float64 where the device has it.

Lists as one long vector:

- ``norm(xs)``: |x|, 0-dim; accurate for 100 M entries, half precision, huge and tiny entries.
- ``dot(xs, ys)``: x.y, 0-dim; ys has the shapes of xs.
- ``orthogonal(xs, ys)``: the part of x orthogonal to y, a list of the shapes of xs.
- ``reciprocal(length)``: 1 / length, and 0 where length is 0; 0-dim to 0-dim.
- ``all_finite(xs)``: True if no entry is NaN or infinite; 0-dim bool.

Entry by entry:

- ``foreach(torch._foreach_mul, xs, ys)``: a multi-tensor operation on plain and sharded tensors alike.
- ``add_scaled_(xs, alpha, ys)``: xs += alpha ys in place; alpha is a 0-dim tensor.
- ``copy_(xs, ys)``: xs = ys in place.
- ``where_finite(length, xs, ys)``: copies of xs if the 0-dim ``length`` is finite, else of ys (tensors or floats).

One tensor:

- ``widen(x)``: x in a dtype in which its squares fit, of the same shape.
- ``scaled(x, factor)``: x times a 0-dim or broadcastable factor, in the dtype of x.
- ``as_real(x)``: a real view; complex entries become pairs in a last dimension of 2.
- ``accumulator(device)``: the widest dtype of a device.
- ``is_sharded(x)``, ``full_tensor(x)``, ``shard_like(full, x)``: for rules that need all entries of a tensor at once.

Random numbers, which depend only on a name, a seed, a step and the position of the parameter (and on
``micro_batch=point.micro_batch``, where each micro-batch has a perturbation of its own):

- ``normal(name, seed, step, xs)``: standard normal numbers, a list of the shapes, dtypes and devices of xs.
- ``uniform(name, seed, step, xs)``: float32 numbers from [0, 1), a list of the shapes and devices of xs.
- ``uniform_number(name, seed, step, position)``: one float from [0, 1).
"""

from collections.abc import Sequence

from torch import Tensor

from steppe._tensors.dtensor import foreach, full_tensor, is_sharded, shard_like
from steppe._tensors.in_place import add_scaled_, as_real, copy_
from steppe._tensors.random import key, normal, uniform
from steppe._tensors.reductions import accumulator, all_finite, dot, norm, projection, reciprocal, where_finite

__all__ = [
    "accumulator",
    "add_scaled_",
    "all_finite",
    "as_real",
    "copy_",
    "dot",
    "foreach",
    "full_tensor",
    "is_sharded",
    "norm",
    "normal",
    "orthogonal",
    "reciprocal",
    "scaled",
    "shard_like",
    "uniform",
    "uniform_number",
    "where_finite",
    "widen",
]


def orthogonal(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of x orthogonal to y, each list as one vector: x - (x.y / |y|^2) y; exactly 0 where x = y.

    Example:
        >>> import torch
        >>> orthogonal([torch.tensor([3.0, 4.0])], [torch.tensor([2.0, 0.0])])
        [tensor([0., 4.])]
    """
    coefficient = projection(xs, ys)  # before the copy: its products in float64 take memory, too
    rest = [x.clone() for x in xs]
    add_scaled_(rest, -coefficient, ys)
    return rest


def widen(x: Tensor) -> Tensor:
    """Return x in a dtype in which its squares fit: float32 for half precision, else x itself."""
    return x.float() if x.dtype.itemsize <= 2 else x


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x times a factor that may not fit into the dtype of x; the result has that dtype."""
    wide = widen(x)
    return (wide * factor.to(wide)).to(x.dtype)


def uniform_number(name: str, seed: int, step: int, position: int, *, micro_batch: int = 0) -> float:
    """Return one uniform number from [0, 1), the same on every machine and rank."""
    return key(name, seed, step, position, micro_batch) / 2**64
