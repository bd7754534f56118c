"""Gradients that are not finite, accumulated or clipped: C18, C19, C20."""

import math
import warnings

import torch
import torch.nn.functional as F

from conformance.adapters.base import Adapter, Base
from conformance.outcome import Outcome
from conformance.statements.problems import MOMENTUM, Vector, batch, flat, number, tiny, train
from conformance.statements.registry import statement


@statement("C18")
def not_finite_gradients(peer: Adapter) -> Outcome:
    """Make the gradients NaN in both passes of the first step, and, in another run, in its second pass only."""
    lost = 0.0
    for bad in ({1, 2}, {2}):
        model, calls = Vector(1.0, 2.0), []
        session = peer.build(model, MOMENTUM)

        def loss(model=model, calls=calls, bad=bad):
            calls.append(1)
            return model.w.square().sum() * (math.nan if len(calls) in bad else 1.0)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                session.step(loss)
        lost = max(lost, float((~model.w.isfinite()).float().mean()))
    return Outcome(lost == 0, f"{100 * lost:.0f} % NaN", "0 % NaN")


@statement("C19")
def micro_batches(peer: Adapter) -> Outcome:
    """Use three micro-batches per step, in float64."""
    one_batch, parts = tiny(torch.float64), tiny(torch.float64)
    one, three = peer.build(one_batch, MOMENTUM, 0.2), peer.build(parts, MOMENTUM, 0.2)
    for step in range(4):
        x, y = batch(step, dtype=torch.float64)
        one.step(lambda x=x, y=y: F.cross_entropy(one_batch(x), y))
        three.step(
            *(lambda x=mx, y=my: F.cross_entropy(parts(x), y) for mx, my in zip(x.chunk(3), y.chunk(3), strict=True))
        )
    off = float((flat(one_batch) - flat(parts)).abs().max())
    return Outcome(off < 1e-6, f"off by {number(off)}", "off by < 1e-6")


@statement("C20")
def clipping(peer: Adapter) -> Outcome:
    """Clip to norm 0.01, with plain SGD and lr = 1: the step is no longer than that."""
    model = tiny()
    before = flat(model)
    train(peer.build(model, Base(torch.optim.SGD, {"lr": 1.0}), clip=0.01), 1)
    moved = float((flat(model) - before).norm())
    return Outcome(moved < 0.0101, f"step {number(moved)}", "step <= 0.01")
