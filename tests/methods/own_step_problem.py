"""A problem of ten numbers in float64 with another loss for each batch, for methods with a step of their own.

The slow references of these methods are in the notation of their papers, on one flat vector, without the package.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from checks import bumpy, split
from support import DRIVES, batch, bits

Loss = Callable[[Tensor, int], Tensor]
"""L(w, t), with t the number of the batch."""

# With these learning rates no method is chaotic: else 20 steps would make 1e-9 of a rounding error.
STABLE_BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.02),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.004, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def loss(w: Tensor, t: int) -> Tensor:
    """Return the loss on batch t."""
    generator = torch.Generator().manual_seed(t)
    return bumpy(w) + w @ torch.randn(w.numel(), generator=generator, dtype=w.dtype)


def start() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(10, dtype=torch.float64)


def flat(params) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params])


def trained(make, drive: str = "closure", steps: int = 20) -> Tensor:
    """Return w after some steps of make(params), with one batch a step."""
    params = [torch.nn.Parameter(p) for p in split(start())]
    optimizer = make(params)
    for t in range(steps):
        DRIVES[drive](optimizer, lambda t=t: loss(flat(params), t))
    return flat(params).detach()


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# Parts of slow references.


def gradient(L: Loss, w: Tensor, t: int) -> Tensor:
    w = w.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(L(w, t), w)
    return g


def normalized(x: Tensor) -> Tensor:
    length = x.square().sum().sqrt()
    return x / length if length > 0 else x


def base_step(optimizer: Optimizer, w: Tensor, g: Tensor) -> None:
    w.grad = g.clone()
    optimizer.step()


# Costs and checkpoints.


def forward_passes_per_step(model, optimizer, drive: str, steps: int) -> float:
    calls = []
    x, y = batch()
    for _ in range(steps):
        DRIVES[drive](optimizer, lambda: (calls.append(1), F.cross_entropy(model(x), y))[1])
    return len(calls) / steps


def state_bits(optimizer) -> list[bytes]:
    """Return the base's state and the rules' memory, to the bit."""
    packed = optimizer.state_dict()["state"]
    return [b for index in sorted(packed) for key in sorted(packed[index]) for b in _bits(packed[index][key])]


def _bits(value) -> list[bytes]:
    return bits([value if isinstance(value, torch.Tensor) else torch.tensor(value)])
