"""Buffers and random numbers after the second pass: C14, C15."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from conformance.adapters.base import Adapter
from conformance.outcome import Outcome
from conformance.statements.problems import SGD, ZERO_LR, Vector, batch, conv, differing, train
from conformance.statements.registry import statement


def _buffers(peer: Adapter, norm: Callable[[int], nn.Module]) -> Outcome:
    model, twin = conv(norm), conv(norm)
    train(peer.build(model, ZERO_LR, 2.0), 3)
    train(peer.plain(twin, ZERO_LR), 3)
    with torch.no_grad():  # rounding is the subject of C6
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.copy_(q)
    wrong = differing(model, twin)
    near = [
        k for k in wrong if torch.allclose(model.state_dict()[k].double(), twin.state_dict()[k].double(), 1e-5, 1e-6)
    ]
    if near == wrong:
        return Outcome(True, "none differ", "none differ")
    return _outcome(model, twin)


def _outcome(model: nn.Module, twin: nn.Module) -> Outcome:
    """Compare the buffers with those after ordinary passes."""
    short = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
    wrong = sorted({short[name.rsplit(".", 1)[-1]] for name in differing(model, twin)})
    return Outcome(not wrong, f"{', '.join(wrong)} differ" if wrong else "none differ", "none differ")


@statement("C14a")
def batch_norm(peer: Adapter) -> Outcome:
    """Use BatchNorm without its counter, which C14b measures."""

    def norm(channels: int) -> nn.Module:
        layer = nn.BatchNorm2d(channels)
        layer.num_batches_tracked = None
        return layer

    return _buffers(peer, norm)


@statement("C14b")
def cumulative_batch_norm(peer: Adapter) -> Outcome:
    """Use BatchNorm with its counter, by which it averages over all batches."""
    return _buffers(peer, lambda channels: nn.BatchNorm2d(channels, momentum=None))


@statement("C14c")
def instance_norm(peer: Adapter) -> Outcome:
    """Use InstanceNorm with running statistics, without its counter."""

    def norm(channels: int) -> nn.Module:
        layer = nn.InstanceNorm2d(channels, track_running_stats=True)
        layer.num_batches_tracked = None
        return layer

    return _buffers(peer, norm)


@statement("C14d")
def batch_norm_after_exception(peer: Adapter) -> Outcome:
    """Check that an ordinary training pass afterwards changes the running mean."""
    model = conv()
    session, calls = peer.build(model, SGD), []

    def loss():
        calls.append(1)
        x, y = batch(0)
        value = F.cross_entropy(model(x), y)
        if len(calls) == 2:
            raise ZeroDivisionError
        return value

    try:
        session.step(loss)
    except ZeroDivisionError:
        model.train()
    before = model[1].running_mean.clone()
    model(batch(1)[0] + 3)
    moved = not torch.equal(before, model[1].running_mean)
    return Outcome(moved, "learning" if moved else "frozen", "learning")


@statement("C15a")
def same_dropout_masks(peer: Adapter) -> Outcome:
    """Use 1,024 entries and probability 0.5."""
    model, seen = Vector(like=torch.ones(1024)), []

    def loss():
        seen.append(F.dropout(torch.ones(1024), 0.5))
        return (model.w * seen[-1]).sum()

    peer.build(model, ZERO_LR).step(loss)
    equal = float((seen[0] == seen[1]).float().mean())
    return Outcome(equal == 1, f"{100 * equal:.0f} % equal", "100 % equal")


@statement("C15b")
def random_state(peer: Adapter) -> Outcome:
    """Compare the states of the generator after the step."""
    after = []
    for build in (lambda m: peer.build(m, ZERO_LR), lambda m: peer.plain(m, ZERO_LR)):
        model = Vector(like=torch.ones(64))
        session = build(model)
        torch.manual_seed(3)
        session.step(lambda model=model: (model.w * F.dropout(torch.ones(64), 0.5)).sum())
        after.append(torch.get_rng_state())
    equal = torch.equal(*after)
    return Outcome(equal, "same" if equal else "different", "same")
