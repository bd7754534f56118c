"""The Hessian that all tools measure, of a small trained network over real images, and its exact lambda_max."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.experiments.data.datasets import load, normalize
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.flatness import Hessian, Objective, eigenvalues

BATCH = 128


@dataclass(frozen=True, eq=False)
class Problem:
    """A network in evaluation mode, and batches of equal size, so that all ways of averaging over them agree."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the network."""
        return list(self.model.parameters())

    def vector(self, seed: int) -> Tensor:
        """Return a random unit vector, (n,)."""
        n = sum(p.numel() for p in self.parameters)
        v = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        return v / v.double().norm().float()


def make_problem(width: int, batches: int, epochs: int = 4) -> Problem:
    """Train for some epochs on the packaged sample of Fashion-MNIST, and select its first images."""
    torch.manual_seed(0)
    model = PreActResNet18(width, stem_stride=2)
    train = load("sample").train
    x, y = normalize(train.images), train.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for indices in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[indices]), y[indices]).backward()
            optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return Problem(model, [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, batches * BATCH, BATCH)])


def exact_lambda_max(problem: Problem) -> float:
    """Return the largest eigenvalue in float64, verified by a product that uses no code of Steppe."""
    objective = Objective(problem.model, problem.batches, loss=F.cross_entropy, dtype=torch.float64)
    found = eigenvalues(Hessian(objective), tol=1e-4)
    u = found.vectors[0]
    product = reference_product(problem, u)
    value = u @ product
    residual = float((product - value * u).norm() / value)
    if not residual < 1e-3:  # an eigenvalue is within residual^2 / gap of it, in relative terms
        raise RuntimeError(f"the reference is not an eigenvalue: its relative residual is {residual:.1e}")
    return float(value)


def reference_product(problem: Problem, v: Tensor) -> Tensor:
    """Return H v in float64, by two calls of torch.autograd.grad per batch."""
    dtype = problem.parameters[0].dtype
    model = problem.model.double()
    try:
        total = torch.zeros_like(v)
        for x, y in problem.batches:
            g = torch.autograd.grad(F.cross_entropy(model(x.double()), y), problem.parameters, create_graph=True)
            along = torch.cat([part.flatten() for part in g]) @ v
            total += torch.cat([part.flatten() for part in torch.autograd.grad(along, problem.parameters)])
        return total / len(problem.batches)
    finally:
        model.to(dtype)
