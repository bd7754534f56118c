"""Half-precision weights, in which a step much smaller than a weight rounds to nothing: measured, and remedied."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steppe._tensors import random as random_tensors
from steppe._tensors.dtensor import local
from steppe._tensors.ops import add_scaled_, as_real, dot

_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""How many bits of a float32 a half-precision number lacks."""


def is_half(tensor: Tensor) -> bool:
    """Whether its dtype is one of half precision."""
    return tensor.dtype in _DROPPED


def add_scaled_stochastically_(
    targets: Sequence[Tensor], alpha: Tensor, directions: Sequence[Tensor], *, step: int
) -> None:
    """Add in place, targets += alpha * directions, and round up or down at random where a target is in half precision.

    A sum between two neighboring numbers a < x < b becomes b with probability (x - a) / (b - a), so that it is x on
    average, however small the summand. The draws depend on the step's number and the position alone.

    >>> w = [torch.ones(1000, dtype=torch.bfloat16)]
    >>> add_scaled_stochastically_(w, torch.tensor(1.0), [torch.full((1000,), 2**-10)], step=0)  # an eighth of a bit
    >>> w[0].unique().tolist(), (w[0] > 1).float().mean().item()
    ([1.0, 1.0078125], 0.12600000202655792)
    """
    wide = [i for i, t in enumerate(targets) if not is_half(t)]
    add_scaled_([targets[i] for i in wide], alpha, [directions[i] for i in wide])
    for position, (target, direction) in enumerate(zip(targets, directions, strict=True)):
        if is_half(target):
            below = 1 << _DROPPED[target.dtype]
            (noise,) = random_tensors.integers(f"rounding {position}", 0, step, [target], below=below)
            x = local(target).float() + local(direction, like=target).float() * alpha.to(target.device, torch.float32)
            x = (x.view(torch.int32) + local(noise)).bitwise_and_(-below).view(torch.float32)
            local(target).copy_(x)


def arrived(after: Sequence[Tensor], before: Sequence[Tensor], alpha: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """Return which share of a step e = alpha * direction arrived in the weights, (after - before).e / |e|^2.

    Args:
        after: the weights that this rank holds, at w + e.
        before: the same, at w.
        alpha: a 0-dim tensor.
        directions: one tensor a weight.

    >>> before, step = [torch.ones(4, dtype=torch.bfloat16)], [torch.tensor([1e-4, 1e-4, 1e-4, 0.1])]
    >>> arrived([before[0] + step[0].bfloat16()], before, torch.tensor(1.0), step)
    tensor(1.0156, dtype=torch.float64)
    """
    here = [local(d).float() for d in directions]
    moved = torch._foreach_sub([as_real(a).float() for a in after], [as_real(b).float() for b in before])
    length = alpha.double() * dot(here, here)
    return torch.where(length == 0, 1.0, dot(moved, here) / length)
