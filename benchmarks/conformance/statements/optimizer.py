"""The method itself, and the interface of torch's optimizers: C0, C4, C5, C8, C9, C10."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from conformance.adapters.base import Adapter, Base
from conformance.outcome import Outcome
from conformance.statements.problems import MOMENTUM, SGD, Vector, batch, conv, differing, flat, number, tiny, train
from conformance.statements.registry import statement

Rule = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], float], list[torch.Tensor]]
"""The perturbation from weights, gradients and rho."""


def normalized(weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """Return the perturbation of SAM's paper."""
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    return [rho * g / norm for g in gradients]


@statement("C0")
def follows_the_paper(peer: Adapter) -> Outcome:
    """Compare 20 steps with the paper's rule, written with autograd."""
    return compare_with_rule(peer, normalized)


def compare_with_rule(peer: Adapter, rule: Rule) -> Outcome:
    """Compare 20 steps with those of a rule, written with autograd."""
    model, twin = tiny(torch.float64), tiny(torch.float64)
    session = peer.build(model, MOMENTUM, 0.2)
    train(session, 20)
    params, base = list(twin.parameters()), MOMENTUM.make(twin.parameters())
    for step in range(20):
        x, y = batch(step, dtype=torch.float64)
        g = torch.autograd.grad(F.cross_entropy(twin(x), y), params)
        perturbed = copy.deepcopy(twin)
        with torch.no_grad():
            for p, e in zip(perturbed.parameters(), rule(params, g, 0.2), strict=True):
                p += e
        update = torch.autograd.grad(F.cross_entropy(perturbed(x), y), list(perturbed.parameters()))
        for p, t in zip(params, update, strict=True):
            p.grad = t
        base.step()
    off = float((flat(model) - flat(twin)).abs().max())
    return Outcome(off < 1e-7, f"off by {number(off)}", "off by < 1e-7")


@statement("C4a")
def step_hooks(peer: Adapter) -> Outcome:
    """Register step hooks on the object that is given to schedulers, and count their calls."""
    session = peer.build(tiny(), SGD)
    seen: Counter[str] = Counter()
    train(session, 1)
    session.scheduled.register_step_pre_hook(lambda *_: seen.update(["pre"]))
    session.scheduled.register_step_post_hook(lambda *_: seen.update(["post"]))
    train(session, 3, 1)
    return Outcome(seen == {"pre": 3, "post": 3}, f"{seen['pre']} + {seen['post']} calls", "3 + 3 calls")


@statement("C4b")
def schedulers(peer: Adapter) -> Outcome:
    """Attach schedulers as documented, and count their warnings."""
    messages: list[str] = []
    for make in (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10, cycle_momentum=False),
    ):
        session = peer.build(tiny(), MOMENTUM)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            session.schedule(make)
            train(session, 3)
        messages += [str(w.message) for w in caught if "scheduler" in str(w.message)]
    return Outcome(not messages, f"{len(messages)} warnings", "0 warnings")


@statement("C5")
def adadelta(peer: Adapter) -> Outcome:
    """Compute the decay from the running average after one step, (1 - decay) g^2 with g = 1."""
    model = Vector(1.0, 1.0)
    session = peer.build(model, Base(torch.optim.Adadelta, {}), 0.05)
    session.step(lambda: model.w.sum())
    states = [session.base.state[p] for p in model.parameters()]
    decay = 1 - float(states[0]["square_avg"][0])
    return Outcome(abs(decay - 0.9) < 1e-6, f"decay {number(decay)}", "decay 0.9")


@statement("C8a")
def two_passes(peer: Adapter) -> Outcome:
    """Take the documented step, and compare the returned loss with that of the first pass."""
    model, losses = tiny(), []
    session = peer.build(model, SGD, 0.5)
    x, y = batch(0)

    def loss():
        value = F.cross_entropy(model(x), y)
        losses.append(float(value.detach()))
        return value

    returned = session.step(loss)
    places = {"at w": losses[0], "at w + e": losses[-1]}
    value = None if returned is None else float(returned)
    place = next((name for name, at in places.items() if value is not None and abs(value - at) < 1e-6), str(value))
    return Outcome(len(losses) == 2 and place == "at w", f"{len(losses)}, {place}", "2, at w")


@statement("C8b")
def cheaper_method(peer: Adapter) -> Outcome:
    """Count the passes of 20 steps, with k = 5."""
    method = peer.cheaper(tiny(), SGD, 5)
    calls = []
    for step in range(20):
        x, y = batch(step)
        method.session.step(lambda x=x, y=y: (calls.append(1), F.cross_entropy(method.session.model(x), y))[1])
    passes = len(calls) / 20
    expected = f"{method.passes:.2g} per step"
    return Outcome(abs(passes - method.passes) < 1e-9, f"{method.name}: {passes:.2g} per step", expected)


@statement("C9a")
def ordinary_closure(peer: Adapter, rule: Rule = normalized) -> Outcome:
    """Take two steps with the ordinary closure; the second starts with the gradients of the first in .grad."""
    model, twin = Vector(3.0, 4.0), Vector(3.0, 4.0)
    session = peer.build(model, SGD, 0.5)
    c = torch.tensor([1.0, 0.2])
    reference = twin.w.detach().clone()
    calls = 0
    try:
        for d in (c, c.flip(0)):
            seen = []
            session.bare(lambda d=d, seen=seen: (seen.append(1), (d * model.w.square()).sum())[1])
            calls = len(seen)
            g = 2 * d * reference
            (e,) = rule([reference], [g], 0.5)
            reference -= 0.1 * 2 * d * (reference + e)
    except Exception as error:
        return Outcome(True, type(error).__name__, "SAM's step or an error")
    off = float((model.w.detach() - reference).abs().max())
    passes = "1 pass" if calls == 1 else f"{calls} passes"
    return Outcome(off < 1e-5, passes if off < 1e-5 else f"{passes}, off by {number(off)}", "SAM's step or an error")


@statement("C9b")
def invalid_radius(peer: Adapter) -> Outcome:
    """Build with an invalid radius and take one step."""
    accepted = []
    for rho in (-1.0, math.nan, math.inf):
        try:
            train(peer.build(tiny(), SGD, rho), 1)
        except Exception:
            continue
        accepted.append(str(rho))
    return Outcome(not accepted, f"{', '.join(accepted)} accepted" if accepted else "all rejected", "all rejected")


def _rho_zero(peer: Adapter, dropout: float) -> Outcome:
    model, twin = conv(dropout=dropout), conv(dropout=dropout)
    for session in (peer.build(model, MOMENTUM, 0.0), peer.plain(twin, MOMENTUM)):
        torch.manual_seed(7)
        train(session, 6)
    off = float((flat(model) - flat(twin)).abs().max())
    wrong = differing(model, twin)
    measured = f"weights off by {number(off)}" if off else ("weights equal, buffers not" if wrong else "equal")
    return Outcome(not wrong, measured, "equal")


@statement("C10a")
def rho_zero(peer: Adapter) -> Outcome:
    """Compare weights and buffers after six steps."""
    return _rho_zero(peer, 0.0)


@statement("C10b")
def rho_zero_with_dropout(peer: Adapter) -> Outcome:
    """Compare weights and buffers after six steps."""
    return _rho_zero(peer, 0.3)
