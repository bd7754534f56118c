"""Bases, models and batches that the statements use, and comparisons of models."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from conformance.adapters.base import Base, Session

SGD = Base(torch.optim.SGD, {"lr": 0.1})
ZERO_LR = Base(torch.optim.SGD, {"lr": 0.0})
MOMENTUM = Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
FUSED = Base(torch.optim.AdamW, {"lr": 0.01, "fused": True})
ADAMW = Base(torch.optim.AdamW, {"lr": 0.01})


class Vector(nn.Module):
    """A model of one parameter. With a linear loss its gradient is constant, whatever rho is."""

    def __init__(self, *values: float, like: torch.Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values) if like is None else like)


def tiny(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def conv(norm: Callable[[int], nn.Module] = nn.BatchNorm2d, dropout: float = 0.0) -> nn.Module:
    """Return a convolution, a norm, dropout and a linear layer."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers)


def batch(seed: int, n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of noise."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)


def train(session: Session, steps: int, start: int = 0, forward: Callable | None = None) -> None:
    """Take steps, each on its own batch, with the current model of the session in every pass."""
    for step in range(start, start + steps):
        x, y = batch(step, dtype=next(session.model.parameters()).dtype)
        session.step(lambda x=x, y=y: F.cross_entropy((forward or session.model)(x), y))


def interrupt_second_pass(session: Session, model: nn.Module, error: type[BaseException]) -> None:
    """Take a step on the first batch, whose second pass raises the error."""
    calls = []

    def loss() -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise error
        x, y = batch(0)
        return F.cross_entropy(model(x), y)

    session.step(loss)


def flat(model: nn.Module) -> torch.Tensor:
    """Return copies of all parameters as one vector."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if all bits are equal."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    """Return the names of the entries of two models' state that differ in any bit."""
    other = b.state_dict()
    return [name for name, value in a.state_dict().items() if not same(value, other[name])]


def number(value: float) -> str:
    """Return a number with three digits."""
    return f"{value:.3g}"
