"""Objectives whose Hessian is known: quadratics, and networks small enough for a dense one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from steppe.flatness import Objective

DOUBLE = torch.float64


class Quadratic(nn.Module):
    """1/2 w' A w + b' w, as the loss of a model that has no use for data."""

    def __init__(self, a: Tensor, b: Tensor | None = None, w: Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(a), dtype=a.dtype) if w is None else w.clone())
        self.register_buffer("a", a)
        self.register_buffer("b", torch.zeros(len(a), dtype=a.dtype) if b is None else b)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.w @ self.a @ self.w + self.b @ self.w


def quadratic(a: Tensor, b: Tensor | None = None, w: Tensor | None = None) -> Objective:
    data = torch.zeros(1, 1), torch.zeros(1)
    return Objective(Quadratic(a, b, w), data, loss=lambda loss, _: loss)


def with_spectrum(values: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric matrix of these eigenvalues, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=DOUBLE, generator=generator))
    return q @ torch.tensor(values, dtype=DOUBLE).diag() @ q.T


def tanh_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def relu_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()


def rescaled(net: nn.Sequential, alpha: float) -> nn.Sequential:
    """The first layer times alpha, the last one divided by it: with a ReLU between, the same function."""
    with torch.no_grad():
        net[0].weight.mul_(alpha)
        net[-1].weight.div_(alpha)
    return net


def samples(n: int = 20, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, dtype=DOUBLE, generator=generator), torch.randint(3, (n,), generator=generator)


def objective(model: nn.Module, data: object = None, **options: object) -> Objective:
    return Objective(model, samples() if data is None else data, loss=F.cross_entropy, **options)


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """d^2 L / dw^2 as a matrix, by torch, in the order of named_parameters()."""
    names, shapes = zip(*((k, p.shape) for k, p in model.named_parameters()), strict=True)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        weights = {k: part.view(s) for k, part, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    return hessian(loss, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
