"""Direction and length of the perturbation: C11."""

import math

import torch

from conformance.adapters.base import Adapter, Base
from conformance.outcome import Outcome
from conformance.statements.problems import SGD, ZERO_LR, Vector, number
from conformance.statements.registry import statement

LARGE = 50_000_000


@statement("C11a")
def zero_gradient(peer: Adapter) -> Outcome:
    """Take a step with a zero gradient, whose direction is 0 / 0."""
    model = Vector(1.0, 2.0)
    start = model.w.detach().clone()
    session = peer.build(model, SGD)
    session.step(lambda: 1.0 + (model.w - start).square().sum())
    finite = bool(model.w.isfinite().all())
    return Outcome(finite, "finite" if finite else "NaN", "finite")


@statement("C11b")
def maximize(peer: Adapter) -> Outcome:
    """Compare minimizing f with maximizing -f."""
    down, up = Vector(3.0, 4.0), Vector(3.0, 4.0)
    first = peer.build(down, Base(torch.optim.SGD, {"lr": 1e-3}), 0.5)
    second = peer.build(up, Base(torch.optim.SGD, {"lr": 1e-3, "maximize": True}), 0.5)
    for _ in range(5):
        first.step(lambda: down.w.pow(4).sum())
        second.step(lambda: -up.w.pow(4).sum())
    off = float((down.w - up.w).abs().max().detach())
    return Outcome(off < 1e-6, f"off by {number(off)}", "off by < 1e-6")


def _length(peer: Adapter, gradient: torch.Tensor) -> float:
    model = Vector(like=torch.zeros_like(gradient))
    seen: list[float] = []

    def loss():
        pieces = model.w.detach().split(1_000_000)
        seen.append(math.sqrt(sum(float(piece.double().square().sum()) for piece in pieces)))
        return 1.0 + (model.w * gradient).sum()

    peer.build(model, ZERO_LR, 0.05).step(loss)
    return seen[1] / 0.05


@statement("C11c")
def float16_norm(peer: Adapter) -> Outcome:
    """Use 100,000 float16 gradients of 300, whose norm overflows."""
    length = _length(peer, torch.full((100_000,), 300.0, dtype=torch.float16))
    return Outcome(abs(length - 1) < 0.05, f"{number(length)} rho", "1 rho")


@statement("C11d")
def large_norm(peer: Adapter) -> Outcome:
    """Use 50 million equal gradients, whose norm a plain float32 sum gets wrong."""
    length = _length(peer, torch.full((LARGE,), 0.01))
    return Outcome(abs(length - 1) < 1e-4, f"{length:.5f} rho", "1.00000 rho")
