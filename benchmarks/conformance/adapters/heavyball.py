"""HeavyBall: ``SAMWrapper`` around its own optimizers, with ``step(closure)``, as in its README."""

from typing import ClassVar

import heavyball
import torch

from conformance.adapters.base import Adapter, Base, Session
from conformance.outcome import NotApplicable, Outcome
from conformance.statements.optimizer import compare_with_rule, ordinary_closure
from conformance.statements.problems import flat, tiny, train

heavyball.utils.compile_mode = None  # as in its own tests on a CPU; compiling each small model takes minutes
README = "https://github.com/HomebrewML/HeavyBall#readme"
NOT_NORMALIZED = "its perturbation, ball w^2 g, has no set length, because it is not normalized (C0)"


def inner(params, base: Base):
    """Return HeavyBall's optimizer of the same rule; the wrapper accepts no others."""
    options = {key: value for key, value in base.options.items() if key in ("lr", "betas", "weight_decay")}
    if unknown := base.options.keys() - options.keys() - {"momentum"}:
        raise NotApplicable(f"its optimizers have no option {', '.join(sorted(unknown))}")
    if base.cls is torch.optim.SGD:
        return heavyball.SGD(params, beta=base.options.get("momentum", 0.0), **options)
    if base.cls is torch.optim.AdamW:
        return heavyball.AdamW(params, **options)
    raise NotApplicable(f"wraps its own optimizers, which do not include {base.cls.__name__}")


class HeavyBallSession(Session):
    """One closure, called once per pass; schedulers are attached to the base, because the wrapper has no lr."""

    @property
    def scheduled(self):
        """The base."""
        return self.base

    def take(self, losses):
        """Take one step."""
        return self.optimizer.step(self.closure(losses))


class PlainSession(Session):
    """HeavyBall's optimizer without SAM."""

    def take(self, losses):
        """Take one step."""
        return self.optimizer.step(self.closure(losses))


def asam(weights, gradients, rho):
    """Return the perturbation of the paper that the docstring cites, rho w^2 g / |w g|."""
    norm = torch.sqrt(sum((w * g).square().sum() for w, g in zip(weights, gradients, strict=True)))
    return [rho * w.square() * g / norm for w, g in zip(weights, gradients, strict=True)]


def unnormalized(weights, gradients, rho):
    """Return the perturbation as the code has it."""
    return [rho * w.square() * g for w, g in zip(weights, gradients, strict=True)]


def switches() -> Outcome:
    """Measure C31 with its schedule-free optimizer, whose ``eval()`` exchanges the weights."""
    model = tiny()
    base = heavyball.SFAdamW(model.parameters(), lr=0.01)
    session = HeavyBallSession(model, heavyball.SAMWrapper(model.parameters(), base, ball=0.05), base)
    train(session, 3)
    training = flat(model)
    session.optimizer.eval()
    evaluating = flat(model)
    session.optimizer.train()
    reached = not torch.equal(training, evaluating)
    return Outcome(reached, "reached" if reached else "not reached", "reached")


class HeavyBall(Adapter):
    """github.com/HomebrewML/HeavyBall."""

    title = "HeavyBall"
    distribution = "heavyball"
    docs = README
    usage = (
        "`SAMWrapper(params, wrapped_optimizer, ball=rho)` around its own SGD and AdamW, and `step(closure)`; it "
        "documents ASAM, so C0 compares it with that paper; schedules on the base; `heavyball.utils.compile_mode = "
        "None`, as in its own tests on a CPU, so that its step is not compiled."
    )
    not_applicable: ClassVar = {
        "C2b": "has SAM only",
        "C8b": "has SAM only",
        "C11c": NOT_NORMALIZED,
        "C11d": NOT_NORMALIZED,
        "C16": NOT_NORMALIZED,
        "C25": "meant to be compiled; not compiled, it does not run on fake tensors",
        "C35": NOT_NORMALIZED,
    }
    own_statements: ClassVar = {
        "C0": lambda: compare_with_rule(ADAPTER, asam),
        "C9a": lambda: ordinary_closure(ADAPTER, unnormalized),
        "C31": switches,
    }

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build around an instance."""
        wrapped = inner(list(model.parameters()), base)
        if state is not None:
            raise NotApplicable("wraps its own optimizers, whose checkpoints have another form than torch's")
        return HeavyBallSession(model, heavyball.SAMWrapper(model.parameters(), wrapped, ball=rho), wrapped, clip=clip)

    def plain(self, model, base: Base):
        """Build HeavyBall's optimizer without SAM."""
        return PlainSession(model, inner(list(model.parameters()), base))


ADAPTER = HeavyBall()
