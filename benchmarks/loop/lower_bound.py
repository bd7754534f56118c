"""A lower bound on the time of a pass, from the device's measured rate of matrix products and its memory bandwidth.

Bytes are those of the activations, in bfloat16. In the forward, each convolution, normalization and linear layer reads
its input and writes its output; in the backward, it reads its input and the gradient of its output, and writes the
gradient of its input. ReLUs and sums are assumed to be fused, and weights, a few percent, are not counted.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timing import seconds

_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
_BYTES = 2


def operations(network: nn.Module, images: Tensor) -> int:
    """Return the floating-point operations of a forward and a backward; a multiplication and an addition are two."""
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(network(images), labels).backward()
    return counter.get_total_flops()


def traffic(network: nn.Module, images: Tensor) -> int:
    """Return the bytes of activations that a forward and a backward read and write."""
    entries = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal entries
        entries += 3 * inputs[0].numel() + 2 * output.numel()

    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, _LAYERS)]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return entries * _BYTES


def rates(device: str, *, tiny: bool) -> tuple[float, float]:
    """Return operations per second of a large bfloat16 matrix product, and bytes per second of a copy."""
    n, size = (64, 1 << 16) if tiny else (8192, 1 << 30) if device == "cuda" else (1024, 1 << 27)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, device=device, repeat=10) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source), device=device, repeat=5) for _ in range(5))
    return 2 * n**3 / product, 2 * size / copy


def lower_bound(network: nn.Module, images: Tensor, n: int, device: str, *, tiny: bool) -> dict[str, Any]:
    """Return the lower bound for a pass over `n` images, extrapolated from a batch."""
    operation_rate, byte_rate = rates(device, tiny=tiny)
    total_operations = operations(network, images) * n / len(images)
    total_bytes = traffic(network, images) * n / len(images)
    return {
        "operations": total_operations,
        "bytes": total_bytes,
        "operations_per_second": operation_rate,
        "bytes_per_second": byte_rate,
        "seconds_of_operations": total_operations / operation_rate,
        "seconds_of_bytes": total_bytes / byte_rate,
        "seconds": max(total_operations / operation_rate, total_bytes / byte_rate),
    }
