"""Perturbations of half-precision weights: the share that survives rounding, and stochastic rounding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steppe._tensors import random as random_tensors
from steppe._tensors.dtensor import local
from steppe._tensors.in_place import add_scaled_, pieces
from steppe._tensors.reductions import dot

_MISSING_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 mantissa that a half-precision number lacks."""
MIN_SURVIVING_SHARE = 0.9
"""Warn if less of a perturbation survives rounding."""


def is_half(tensor: Tensor) -> bool:
    """True if the tensor has a half-precision dtype."""
    return tensor.dtype in _MISSING_BITS


def add_scaled_stochastically_(
    targets: Sequence[Tensor], alpha: Tensor, directions: Sequence[Tensor], *, step: int
) -> None:
    """Add in place, targets += alpha * directions, with stochastic rounding of half-precision targets.

    A sum x between two neighboring numbers a < x < b becomes b with probability (x - a) / (b - a), so that its
    expectation is x, however small the summand. The random numbers depend only on the step's number and the position.

    Args:
        targets: Real tensors, changed in place.
        alpha: A 0-dim tensor; it is never read on the host.
        directions: As many tensors, of the same shapes.
        step: Number of the step.

    Example:
        >>> w = [torch.ones(1000, dtype=torch.bfloat16)]
        >>> add_scaled_stochastically_(w, torch.tensor(1.0), [torch.full((1000,), 2**-10)], step=0)  # 1/8 of a bit
        >>> w[0].unique().tolist(), (w[0] > 1).float().mean().item()
        ([1.0, 1.0078125], 0.12600000202655792)
    """
    wide = [i for i, t in enumerate(targets) if not is_half(t)]
    add_scaled_([targets[i] for i in wide], alpha, [directions[i] for i in wide])
    for position, (target, direction) in enumerate(zip(targets, directions, strict=True)):
        if is_half(target):
            below = 1 << _MISSING_BITS[target.dtype]
            (noise,) = random_tensors.integers(f"rounding {position}", 0, step, [target], below=below)
            x = local(target).float() + local(direction, like=target).float() * alpha.to(target.device, torch.float32)
            # Random bits below the last one that is kept, then truncation: rounds up with the right probability.
            x = (x.view(torch.int32) + local(noise)).bitwise_and_(-below).view(torch.float32)
            local(target).copy_(x)


def surviving_share(
    after: Sequence[Tensor], before: Sequence[Tensor], alpha: Tensor, directions: Sequence[Tensor]
) -> Tensor:
    """Return the share of e = alpha * direction by which the weights changed, (after - before).e / |e|^2.

    Args:
        after: This rank's weights at w + e.
        before: The same weights at w.
        alpha: A 0-dim tensor.
        directions: One tensor a weight.

    Returns:
        A 0-dim tensor; 1 where e = 0.

    Example:
        >>> before, step = [torch.ones(4, dtype=torch.bfloat16)], [torch.tensor([1e-4, 1e-4, 1e-4, 0.1])]
        >>> surviving_share([before[0] + step[0].bfloat16()], before, torch.tensor(1.0), step)
        tensor(1.0156, dtype=torch.float64)
    """
    moved_along, square = [], []
    for of_after, of_before, of_directions in pieces(after, before, directions):
        moved = [a.float() - b.float() for a, b in zip(of_after, of_before, strict=True)]
        along = [d.float() for d in of_directions]
        moved_along.append(dot(moved, along).to(alpha.device))
        square.append(dot(along, along).to(alpha.device))
    length = alpha.double() * torch.stack(square).sum()
    return torch.where(length == 0, 1.0, torch.stack(moved_along).sum() / length)
