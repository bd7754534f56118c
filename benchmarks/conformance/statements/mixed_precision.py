"""Autocast and loss scaling: C16, C17."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from conformance.adapters.base import Adapter
from conformance.outcome import Outcome
from conformance.statements.problems import MOMENTUM, SGD, ZERO_LR, Vector, batch, flat, number, tiny, train
from conformance.statements.registry import statement


@statement("C16")
def autocast(peer: Adapter) -> Outcome:
    """Compare the loss at w + e with that at w; with the cached casts of w they are equal."""
    torch.manual_seed(0)
    model, losses = nn.Linear(8, 1), []
    session = peer.build(model, ZERO_LR, 1.0)
    x = torch.randn(4, 8)

    def loss():
        value = model(x).float().square().mean()
        losses.append(float(value.detach()))
        return value

    with torch.autocast("cpu", dtype=torch.bfloat16):
        session.step(loss)
    ratio = losses[1] / losses[0]
    return Outcome(ratio > 1.05, f"loss x {ratio:.2f}", "loss x > 1.05")


@statement("C17a")
def loss_scaler(peer: Adapter) -> Outcome:
    """Use torch.amp.GradScaler on a CPU, scale 1,024; the third of four batches overflows in the second pass."""
    model, twin = tiny(), tiny()
    session, unscaled = peer.build(model, MOMENTUM), peer.build(twin, MOMENTUM)
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        x, y = batch(step)
        calls: list[int] = []

        def loss(x=x, y=y, calls=calls, step=step):
            calls.append(1)
            return F.cross_entropy(model(x), y) * (math.inf if step == 2 and len(calls) == 2 else 1.0)

        before = flat(model)
        session.scaled(grad_scaler, loss)
        if step != 2:
            train(unscaled, 1, step)
        elif not torch.equal(before, flat(model)):
            return Outcome(False, "weights moved", "equal, skipped")
    off = float((flat(model) - flat(twin)).abs().max())
    return Outcome(off < 1e-4, "equal, skipped" if off < 1e-4 else f"off by {number(off)}", "equal, skipped")


def _scaled_closure(peer: Adapter, *, backward_first: bool) -> Outcome:
    model = Vector(1.0, 1.0)
    session = peer.build(model, SGD)
    before = model.w.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    try:
        session.scaler_closure(scaler, lambda: model.w.sum(), backward_first=backward_first)
    except Exception as error:
        return Outcome(True, type(error).__name__, "an error or x 1")
    moved = float((before - model.w.detach())[0]) / 0.1
    return Outcome(abs(moved - 1) < 1e-3, f"update x {moved:.0f}", "an error or x 1")


@statement("C17b")
def scaler_with_closure(peer: Adapter) -> Outcome:
    """Return the size of the step in units of the right one; scale 1,024."""
    return _scaled_closure(peer, backward_first=False)


@statement("C17c")
def scaler_with_closure_after_backward(peer: Adapter) -> Outcome:
    """Run a backward first: the scaler then finds gradients to unscale, and raises no error of its own."""
    return _scaled_closure(peer, backward_first=True)
