"""The floor of a pass: its operations at the device's measured matrix rate, its bytes at its measured bandwidth.

Bytes are those of the activations, in bfloat16: each convolution, normalization and linear layer reads its input and
writes its output going forward, and backward reads the gradient of its output and its input, and writes the gradient of
its input. ReLUs and sums are taken to be done on the way, and weights, a few percent, are not counted.
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
    """Floating-point operations of a forward and a backward of `images`: a multiplication and an addition are two."""
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(network(images), labels).backward()
    return counter.get_total_flops()


def traffic(network: nn.Module, images: Tensor) -> int:
    """Bytes of activations that a forward and a backward read and write."""
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
    """Operations a second of a large bfloat16 matrix product, and bytes a second that a copy reads and writes."""
    n, size = (64, 1 << 16) if tiny else (8192, 1 << 30) if device == "cuda" else (1024, 1 << 27)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, device=device, repeat=10) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source), device=device, repeat=5) for _ in range(5))
    return 2 * n**3 / product, 2 * size / copy


def floor(network: nn.Module, images: Tensor, n: int, device: str, *, tiny: bool) -> dict[str, Any]:
    """Of a pass of `n` images, by those of a batch."""
    by_matrices, by_memory = rates(device, tiny=tiny)
    work = operations(network, images) * n / len(images)
    moved = traffic(network, images) * n / len(images)
    return {
        "operations": work,
        "bytes": moved,
        "operations_per_second": by_matrices,
        "bytes_per_second": by_memory,
        "seconds_of_operations": work / by_matrices,
        "seconds_of_bytes": moved / by_memory,
        "seconds": max(work / by_matrices, moved / by_memory),
    }
