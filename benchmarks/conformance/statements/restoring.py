"""Restoring the weights, also after exceptions: C6, C7."""

import torch
from torch import nn

from conformance.adapters.base import Adapter
from conformance.outcome import Outcome
from conformance.statements.problems import SGD, ZERO_LR, Vector, flat, interrupt_second_pass, number, tiny, train
from conformance.statements.registry import statement


def _restored(peer: Adapter, dtype: torch.dtype) -> Outcome:
    g = torch.Generator().manual_seed(0)
    model = Vector(like=(0.05 * torch.randn(1_000_000, generator=g)).to(dtype))
    c = torch.randn(1_000_000, generator=g).to(dtype)
    session = peer.build(model, ZERO_LR)
    before = model.w.detach().clone()
    session.step(lambda: (model.w * c).sum())
    changed = float((model.w.detach() != before).double().mean())
    return Outcome(changed == 0, f"{number(100 * changed)} % differ", "0 % differ")


@statement("C6a")
def restores_float32(peer: Adapter) -> Outcome:
    """Use a million weights of size 0.05."""
    return _restored(peer, torch.float32)


@statement("C6b")
def restores_bfloat16(peer: Adapter) -> Outcome:
    """Use a million weights of size 0.05."""
    return _restored(peer, torch.bfloat16)


@statement("C6c")
def keeps_storage(peer: Adapter) -> Outcome:
    """Compare addresses, on which flat buffers, CUDA graphs and shared tensors rely."""
    model = tiny()
    before = [p.detach() for p in model.parameters()]  # references, so that no address is reused
    train(peer.build(model, SGD), 2)
    moved = sum(a.data_ptr() != p.data_ptr() for a, p in zip(before, model.parameters(), strict=True))
    return Outcome(moved == 0, f"{moved} of {len(before)} moved", f"0 of {len(before)} moved")


@statement("C7a")
def restores_after_exception(peer: Adapter) -> Outcome:
    """Return the larger distance from w of two exceptions, in units of rho."""
    worst = 0.0
    for error in (ZeroDivisionError, KeyboardInterrupt):
        model = tiny()
        session = peer.build(model, SGD, 0.5)
        before = flat(model)
        try:
            interrupt_second_pass(session, model, error)
        except error:
            worst = max(worst, float((flat(model) - before).norm()) / 0.5)
    return Outcome(worst == 0, f"{number(worst)} rho away", "0 rho away")


def _gradient_in_one_pass(peer: Adapter, index: int) -> Outcome:
    model = nn.ParameterDict({"a": nn.Parameter(torch.full((3,), 0.7)), "b": nn.Parameter(torch.full((3,), 0.3))})
    session = peer.build(model, ZERO_LR, 0.5)
    before, calls = flat(model), []

    def loss():
        calls.append(1)
        value = model["a"].square().sum()
        return value + model["b"].square().sum() if (len(calls) - 1) % 2 == index else value

    for _ in range(3):
        session.step(loss)
    drift = float((flat(model) - before).abs().max())
    return Outcome(drift < 1e-6, f"drifts by {number(drift)}", "drifts by < 1e-6")


@statement("C7b")
def gradient_in_first_pass_only(peer: Adapter) -> Outcome:
    """Omit a parameter from the second pass, as stochastic depth or routed experts do; rounding is tolerated."""
    return _gradient_in_one_pass(peer, 0)


@statement("C7c")
def gradient_in_second_pass_only(peer: Adapter) -> Outcome:
    """Omit a parameter from the first pass, as stochastic depth or routed experts do; rounding is tolerated."""
    return _gradient_in_one_pass(peer, 1)
