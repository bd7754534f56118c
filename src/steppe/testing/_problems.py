"""Problems and helpers of the checks."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.sam import SAM

Make = Callable[[nn.Module], SAM]
"""A function that builds the optimizer to check around a model."""


class Net(nn.Module):
    """A small network with everything that a second pass can change: BatchNorm, also a cumulative one, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8, momentum=None),
            nn.Dropout(0.3),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (n, 3) for inputs of shape (n, 6)."""
        logits: Tensor = self.layers(x)
        return logits


class ComplexOrPairs(nn.Module):
    """One complex parameter, or the real one of its pairs."""

    def __init__(self, as_complex: bool) -> None:
        super().__init__()
        start = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2)
        self.w = nn.Parameter(torch.view_as_complex(start) if as_complex else start)
        self.norm = nn.LayerNorm(2, dtype=torch.float64)  # for rules on normalization layers

    def forward(self) -> Tensor:
        """Return the loss."""
        w = torch.view_as_real(self.w) if self.w.is_complex() else self.w
        loss: Tensor = (w.square().sum() - 2).square() + (3 * w).sin().sum() + self.norm(w).square().sum()
        return loss


def network(seed: int = 0) -> Net:
    """Return a new network, the same for the same seed."""
    with seeded(seed):
        return Net()


def bumpy_loss(w: Tensor) -> Tensor:
    """Return a loss that is neither quadratic nor symmetric."""
    a = torch.linspace(-1.0, 1.5, w.numel(), dtype=w.dtype)
    slope = torch.linspace(0.3, 2.0, w.numel(), dtype=w.dtype)
    return (torch.sin(3 * w) + (w - a).square() * slope).sum() + w.prod() + w.roll(1).mul(w).sum()


def batch_loss(model: nn.Module, step: int) -> Tensor:
    """Return the loss on the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 6, generator=generator), torch.randint(3, (12,), generator=generator)
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator in the block, and restore its state after it."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def closure_of(optimizer: Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the plain closure of a loss."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    return closure


def closure_of_batch(model: nn.Module, optimizer: Optimizer, step: int) -> Callable[[], Tensor]:
    """Return the closure of the batch of a step."""
    return closure_of(optimizer, lambda: batch_loss(model, step))


def train(model: nn.Module, optimizer: SAM, steps: int, *, start: int = 0) -> None:
    """Take steps, each with its own seed and batch."""
    for step in range(start, start + steps):
        with seeded(step):
            optimizer.step(closure_of_batch(model, optimizer, step))


def count_passes(make: Make, steps: int) -> Iterator[int]:
    """Yield the number of passes of each step."""
    model = network()
    optimizer = make(model)
    for step in range(steps):
        calls: list[int] = []

        def loss(step: int = step, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return batch_loss(model, step)

        optimizer.step(closure_of(optimizer, loss))
        yield len(calls)


@contextmanager
def expect_skips() -> Iterator[None]:
    """Silence the warning of a skipped step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a step was skipped", RuntimeWarning)
        yield


def bits_in_place(tensors: Iterable[Tensor]) -> list[tuple[int, bytes]]:
    """Return the address and the exact contents of each tensor."""
    return [(t.data_ptr(), t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for t in tensors]


def bits(tensors: Iterable[Tensor]) -> list[bytes]:
    """Return the exact contents of each tensor."""
    return [value for _, value in bits_in_place(tensors)]


def expect_same_bits(one: nn.Module, other: nn.Module, why_not: str) -> None:
    """Raise AssertionError unless two modules have the same bits."""
    expect(bits(one.state_dict().values()) == bits(other.state_dict().values()), why_not)


def expect(holds: bool, why_not: str) -> None:
    """Raise AssertionError with a reason; unlike ``assert``, also under ``python -O``."""
    if not holds:
        raise AssertionError(why_not)
