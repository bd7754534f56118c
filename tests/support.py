"""Small problems, base optimizers and the three APIs of a step, shared by the tests."""

import io
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import steppe
from steppe import closures
from steppe.methods.sassha import SASSHA

BASES: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


class Net(nn.Module):
    """A network with what a second pass can change: BatchNorm, also with a cumulative mean, and dropout."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, momentum=None),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(4 * 4 * 4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def net(seed: int = 0, *, dropout: float = 0.3, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net(dropout).to(dtype)


def batch(seed: int = 0, *, n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)


def bits(tensors) -> list[bytes]:
    """Return the exact contents, -0.0 and NaN payloads included."""
    return [t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in map(torch.atleast_1d, tensors)]


def model_bits(model: nn.Module) -> dict[str, bytes]:
    state = model.state_dict()
    return dict(zip(state, bits(state.values()), strict=True))


def saved_and_loaded(state: Any, *, weights_only: bool = True) -> Any:
    """Return what a file holds to which the state was saved."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def observed(optimizer: Optimizer, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss as the optimizer needs it: for SASSHA, one that estimates the Hessian."""
    return closures.hessian_diagonal(optimizer, loss) if isinstance(optimizer, SASSHA) else loss


# One step by each of the three APIs; loss() is the forward alone.


def by_closure(optimizer: Optimizer, loss: Callable[[], Tensor]):
    loss = observed(optimizer, loss)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return optimizer.step(closure)


def by_passes(optimizer: steppe.SAM, loss: Callable[[], Tensor]):
    loss = observed(optimizer, loss)
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss().backward()
    optimizer.step()


def by_classic(optimizer: steppe.SAM, loss: Callable[[], Tensor]):
    optimizer.zero_grad()
    loss().backward()
    optimizer.first_step(zero_grad=True)
    loss().backward()
    optimizer.second_step()


def plain(optimizer: Optimizer, loss: Callable[[], Tensor]):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


DRIVES = {"closure": by_closure, "passes": by_passes, "classic": by_classic}

every_base = pytest.mark.parametrize("base", BASES)
every_drive = pytest.mark.parametrize("drive", DRIVES)


def in_pairs(first: Iterable[Any], second: Iterable[Any], third: Iterable[Any]) -> list[tuple[Any, Any, Any]]:
    """Return each value of the first with each of the second, and thirds in turn: each pair of values occurs.

    For the pairs with the third, neither of the others is shorter than it.
    """
    thirds = list(third)
    return [(a, b, thirds[(i + j) % len(thirds)]) for i, a in enumerate(first) for j, b in enumerate(second)]


def in_turn(first: Iterable[Any], second: Iterable[Any]) -> Callable[..., bool]:
    """Return a test of cases: True for each value of the first with one of the second, which are taken in turn."""
    firsts, seconds = list(first), list(second)
    return lambda a, b, *_: b == seconds[firsts.index(a) % len(seconds)]


def each_in_turn(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Return a product as cases for pytest: each value of the first is fast with one of the second, in turn."""
    first, second = list(first), list(second)
    return rest_is_slow(itertools.product(first, second), in_turn(first, second))


def rest_is_slow(cases: Iterable[Any], fast: Callable[..., bool]) -> list[Any]:
    """Return cases for pytest, tuples or values: `make test` has those that are fast, `make test-slow` the others."""
    tuples = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*case, marks=[] if fast(*case) else pytest.mark.slow) for case in tuples]


def train(model: nn.Module, optimizer: Optimizer, drive, steps: int, *, start: int = 0) -> None:
    for step in range(start, start + steps):
        x, y = batch(step, dtype=next(model.parameters()).dtype)
        drive(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
