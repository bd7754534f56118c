"""Weights rounded to n bits: symmetric, uniform, after training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steppe._checks import check_count
from steppe._tensors.cached_weights import drop_cached_weights
from steppe.flatness._forward import check_not_sharded


def rounded(weights: Tensor, bits: int, *, per_channel: bool = False) -> Tensor:
    """Return the nearest multiples of a step, from -(2^(bits-1) - 1) to 2^(bits-1) - 1 steps.

    The step is such that the largest weight in absolute value is the last multiple: of the tensor or, with
    `per_channel`, of each index of the first dimension, an output channel of a linear layer or a convolution. Halves
    are rounded to the even multiple.

    Example:
        >>> rounded(torch.tensor([0.2, -0.4, 1.0]), bits=2)
        tensor([0., -0., 1.])
    """
    check_count("bits", bits, "the bits of a weight, of which a sign and a value need 2", at_least=2)
    exact = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    if not exact.numel():
        return exact.to(weights.dtype)
    largest = exact.abs().amax(tuple(range(1, exact.dim())), keepdim=True) if per_channel else exact.abs().max()
    steps = 2 ** (bits - 1) - 1
    multiples = (exact / largest.where(largest > 0, 1.0) * steps).round()
    nearest: Tensor = (multiples / steps * largest).to(weights.dtype)
    return nearest


@contextmanager
def round_weights(model: nn.Module, bits: int, *, per_channel: bool = False) -> Iterator[None]:
    """Round all weight matrices of a model within the context, and restore them bit for bit, also after an exception.

    Weight matrices are the floating-point parameters of two dimensions and more: of linear layers, convolutions and
    embeddings, but not biases and the scales of normalization layers. Gradients are left as they are.

    Raises:
        TypeError: A part of the model is sharded.
        ValueError: ``bits`` is below 2.
    """
    check_not_sharded(model)
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p.is_floating_point()]
    saved = [(p, p.detach().clone()) for p in matrices]
    try:
        for p in matrices:
            # .data: a graph that was recorded before is right again afterwards, so autograd must not count the writes
            p.data.copy_(rounded(p, bits, per_channel=per_channel))
        drop_cached_weights()
        yield
    finally:
        for p, before in saved:
            p.data.copy_(before)
        drop_cached_weights()
