"""Objectives whose Hessian is known: quadratics, and networks small enough for a dense one."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from steppe.flatness import Hessian, Objective

DOUBLE = torch.float64
# Like the spectrum of a network: a bulk at 0, a few outliers, and negative eigenvalues.
SPECTRUM = [*torch.linspace(-0.5, 1.0, 90).tolist(), 3.0, 3.1, 8.0, 20.0, 20.0, 50.0]


class Quadratic(nn.Module):
    """A model whose output is the loss 1/2 w' A w + b' w, whatever the data."""

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


def matrix_with_spectrum(values: Sequence[float], seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
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
    """Multiply the first layer by alpha and the last by 1/alpha: with a ReLU between, the same function."""
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
    """Compute d^2 L / dw^2, (n, n), by torch.autograd.functional, in the order of named_parameters()."""
    names, shapes = zip(*((k, p.shape) for k, p in model.named_parameters()), strict=True)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        weights = {k: part.view(s) for k, part, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    return hessian(loss, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))


def matrix(values: Sequence[float] = SPECTRUM) -> Hessian:
    """Return the Hessian of a quadratic with these eigenvalues."""
    return Hessian(quadratic(matrix_with_spectrum(values)))


def net_and_dense() -> tuple[Hessian, Tensor]:
    """Return the Hessian of a network over three batches, and the same as a matrix."""
    net = tanh_net()
    return Hessian(objective(net, batch_size=7)), dense_hessian(net, *samples())


def exact_maximum(a: Tensor, b: Tensor, rho: float) -> float:
    """Return the maximum of 1/2 z'Az + b'z over |z| <= rho: (mu - A) z = b with mu >= lambda_max, mu >= 0."""
    values, q = torch.linalg.eigh(a)
    c, top = q.T @ b, float(values[-1])

    def increase(z: Tensor) -> float:
        return float((values * z.square() / 2 + c * z).sum())

    if top < 0 and (c / values).norm() <= rho:
        return increase(-c / values)  # inside
    at_top = (values - top).abs() < 1e-9
    if top >= 0 and c[at_top].norm() < 1e-12:  # the hard case: z may need a component along the top eigenvector
        z = torch.where(at_top, 0.0, c / (top - values + at_top))
        if z.norm() <= rho:
            z[-1] = (rho**2 - z.norm() ** 2).sqrt()
            return increase(z)
    low, high = max(top, 0.0), max(top, 0.0) + float(c.norm()) / rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (c / (mu - values)).norm() > rho else (low, mu)
    return increase(c / (high - values))


def assert_determined_by_seed(function: Callable[[int], Tensor]) -> None:
    """Assert that the result depends on the seed, but not on torch's generator."""
    torch.manual_seed(1)
    first = function(0)
    torch.manual_seed(2)
    assert torch.equal(function(0), first)
    assert not torch.equal(function(1), first)
