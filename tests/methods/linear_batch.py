"""A small problem for the closures: three weights, a batch of samples, and a loss that is known for each sample."""

import torch
from torch import nn

from steppe import SAM

RHO = 0.3


def problem(n: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(3, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)


def per_sample(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x @ w) + (x @ w).square() / 5


def gradient(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    w = w.clone().requires_grad_()
    return torch.autograd.grad(per_sample(w, x).mean(), w)[0]


def build(w: torch.Tensor, **rules) -> tuple[nn.Parameter, SAM]:
    p = nn.Parameter(w.clone())
    return p, SAM(torch.optim.SGD([p], lr=0.1), RHO, **rules)
