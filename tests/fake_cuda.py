"""Steps on CUDA tensors without storage: FakeTensorMode runs them on a machine without a GPU."""

import torch
from torch import nn

from steppe import SAM

CUDA_BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


def fake_parameters() -> list[nn.Parameter]:
    """Four parameters on a CUDA device; within FakeTensorMode."""
    return [nn.Parameter(torch.empty(n, 3, device="cuda")) for n in range(1, 5)]


def step_with_ones(optimizer: SAM, params: list[nn.Parameter], drive: str) -> None:
    """Take a step with gradients of ones: a CPU build of torch has no autograd for CUDA tensors."""

    def write_gradients():
        for p in params:
            p.grad = torch.ones_like(p)

    if drive == "passes":
        for sam_pass in optimizer.passes():
            with sam_pass:
                write_gradients()
        optimizer.step()
    elif drive == "closure":
        optimizer.step(write_gradients)
    else:
        write_gradients()
        optimizer.first_step(zero_grad=True)
        write_gradients()
        optimizer.second_step(zero_grad=True)
