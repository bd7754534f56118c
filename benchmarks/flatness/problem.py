"""The Hessian that all tools measure: of a small trained network, over batches of real images; and what is exact."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.experiments.data.datasets import load, normalize
from steppe.experiments.models.preact_resnet import preact_resnet18
from steppe.flatness import Hessian, Objective, eigenvalues

BATCH = 128


@dataclass(frozen=True, eq=False)
class Problem:
    """A network in evaluation mode, and batches of equal size, so that all ways of averaging them are one."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the network."""
        return list(self.model.parameters())

    def vector(self, seed: int) -> Tensor:
        """A random unit vector (n,)."""
        n = sum(p.numel() for p in self.parameters)
        v = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        return v / v.double().norm().float()


def problem(width: int, batches: int, epochs: int = 4) -> Problem:
    """Train for some epochs on the sample that comes with Steppe, and take its first images."""
    torch.manual_seed(0)
    model = preact_resnet18(width, stem_stride=2)
    train = load("sample").train
    x, y = normalize(train.images), train.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return Problem(model, [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, batches * BATCH, BATCH)])


def exact(at: Problem) -> float:
    """The largest eigenvalue in float64, confirmed by a product that has nothing of Steppe in it."""
    objective = Objective(at.model, at.batches, loss=F.cross_entropy, dtype=torch.float64)
    found = eigenvalues(Hessian(objective), tol=1e-4)
    u = found.vectors[0]
    product = plain_product(at, u)
    value = u @ product
    residual = float((product - value * u).norm() / value)
    if not residual < 1e-3:  # an eigenvalue is within residual^2 / gap of it, in relative terms
        raise RuntimeError(f"the reference is no eigenvalue: its residual is {residual:.1e} of it")
    return float(value)


def plain_product(at: Problem, v: Tensor) -> Tensor:
    """H v in float64, by two plain derivatives a batch."""
    dtypes = at.parameters[0].dtype
    model = at.model.double()
    try:
        total = torch.zeros_like(v)
        for x, y in at.batches:
            g = torch.autograd.grad(F.cross_entropy(model(x.double()), y), at.parameters, create_graph=True)
            along = torch.cat([part.flatten() for part in g]) @ v
            total += torch.cat([part.flatten() for part in torch.autograd.grad(along, at.parameters)])
        return total / len(at.batches)
    finally:
        model.to(dtypes)
