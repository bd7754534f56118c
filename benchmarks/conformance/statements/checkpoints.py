"""Checkpoints and copies: C1, C2, C3."""

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from conformance.adapters.base import Adapter, Session
from conformance.outcome import Outcome
from conformance.statements.problems import ADAMW, MOMENTUM, SGD, Vector, flat, number, tiny, train
from conformance.statements.registry import statement


def _resumed(peer: Adapter) -> tuple[Session, Vector, float]:
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)

    first, model = Vector(1.0, 1.0), Vector(1.0, 1.0)
    session = peer.build(first, SGD)
    session.schedule(schedule)
    for _ in range(3):
        session.step(lambda: first.w.sum())
    saved = session.save()
    resumed = peer.build(model, SGD)
    resumed.schedule(schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.load(saved)
        before = model.w.detach().clone()
        resumed.step(lambda: model.w.sum())
    return resumed, model, float((before - model.w)[0].detach())


@statement("C1a")
def schedule_after_load(peer: Adapter) -> Outcome:
    """Read the learning rate from the change of the weights: the gradient is 1."""
    session, model, first = _resumed(peer)
    before = model.w.detach().clone()
    session.step(lambda: model.w.sum())
    second = float((before - model.w)[0].detach())
    right = abs(first - 0.0125) < 1e-6 and abs(second - 0.00625) < 1e-6
    return Outcome(right, f"lr {number(first)}, {number(second)}", "lr 0.0125, 0.00625")


@statement("C1b")
def groups_after_load(peer: Adapter) -> Outcome:
    """Write a learning rate into the groups of the optimizer that takes the steps."""
    model = Vector(1.0, 1.0)
    session = peer.build(Vector(1.0, 1.0), SGD)
    session.step(lambda: session.model.w.sum())
    saved = session.save()
    resumed = peer.build(model, SGD)
    resumed.load(saved)
    for group in resumed.optimizer.param_groups:
        group["lr"] = 0.25
    before = model.w.detach().clone()
    resumed.step(lambda: model.w.sum())
    lr = float((before - model.w)[0].detach())
    return Outcome(abs(lr - 0.25) < 1e-6, f"lr {number(lr)}", "lr 0.25")


def _resume_is_exact(build: Callable[[nn.Module], Session], before: int) -> Outcome:
    straight = tiny()
    session = build(straight)
    train(session, before)
    saved, weights = session.save(), copy.deepcopy(straight.state_dict())
    if isinstance(saved, dict):
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=False)
    train(session, 5, before)
    model = tiny()
    resumed = build(model)
    model.load_state_dict(weights)
    resumed.load(saved)
    train(resumed, 5, before)
    off = float((flat(model) - flat(straight)).abs().max())
    return Outcome(off == 0, f"off by {number(off)}", "off by 0")


@statement("C2a")
def resume(peer: Adapter) -> Outcome:
    """Take 4 steps, save and load, take 5 steps; return the worse outcome of two bases."""
    outcomes = [_resume_is_exact(lambda m, b=base: peer.build(m, b), 4) for base in (MOMENTUM, ADAMW)]
    return min(outcomes, key=lambda outcome: outcome.holds)


@statement("C2b")
def resume_cheaper_method(peer: Adapter) -> Outcome:
    """Save between two of the method's perturbed steps."""
    return _resume_is_exact(lambda m: peer.cheaper(m, MOMENTUM, 3).session, 16)


@statement("C2c")
def load_weights_only(peer: Adapter) -> Outcome:
    """Save the optimizer's checkpoint, and load it by torch.load(weights_only=True)."""
    session = peer.build(tiny(), MOMENTUM)
    train(session, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save(session.save()["optimizer"], path)
        torch.load(path, weights_only=True)
    return Outcome(True, "loads", "loads")


@statement("C2d")
def load_base_checkpoint(peer: Adapter) -> Outcome:
    """Load the base after three steps: as the gradient is 1, the fourth step is 0.1 (1 + 0.9 + 0.81 + 0.729)."""
    model = Vector(1.0, 1.0)
    plain = Session(model, MOMENTUM.make(model.parameters()))
    for _ in range(3):
        plain.step(lambda: model.w.sum())
    session = peer.build(model, MOMENTUM, state=plain.optimizer.state_dict())
    before = model.w.detach().clone()
    session.step(lambda: model.w.sum())
    moved = float((before - model.w)[0].detach())
    return Outcome(abs(moved - 0.3439) < 1e-4, f"step {number(moved)}", "step 0.344")


@statement("C3")
def copies(peer: Adapter) -> Outcome:
    """Compare the next steps of copies made by deepcopy and pickle; return the worse outcome."""
    session = peer.build(tiny(), MOMENTUM)
    train(session, 2)
    twins = copy.deepcopy(session), pickle.loads(pickle.dumps(session))
    train(session, 2, 2)
    off = 0.0
    for twin in twins:
        train(twin, 2, 2)
        off = max(off, float((flat(twin.model) - flat(session.model)).abs().max()))
    return Outcome(off == 0, f"off by {number(off)}", "off by 0")
