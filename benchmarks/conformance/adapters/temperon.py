"""temperon: ``Temperon(base, total_steps, tail_frac, rho)`` and ``step(closure)``, as in its README."""

from typing import ClassVar

from temperon import Temperon

from conformance.adapters.base import Adapter, Base, Cheaper, Session
from conformance.outcome import Limitation

README = "https://github.com/MStamatis/temperon#readme"


class TemperonSession(Session):
    """One closure, called once per pass; schedulers are attached to the base."""

    @property
    def scheduled(self):
        """The base, as in the README."""
        return self.base

    def take(self, losses):
        """Take one step."""
        return self.optimizer.step(self.closure(losses))


class TemperonAdapter(Adapter):
    """SAM in a tail of the run; with ``tail_frac=1`` in all of it."""

    title = "temperon"
    distribution = "temperon"
    docs = README
    usage = (
        "`Temperon(base, total_steps, tail_frac=1.0, rho)` and `step(closure)`; schedules on the base; clipping in the "
        "closure."
    )
    limitations: ClassVar = {"C19": Limitation("gradient accumulation is not supported yet", README)}

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build around an instance."""
        inner = base.make(model.parameters(), state)
        return TemperonSession(model, Temperon(inner, total_steps=100, tail_frac=1.0, rho=rho), inner, clip=clip)

    def cheaper(self, model, base: Base, interval: int):
        """Build SAM in the last part of the run."""
        inner = base.make(model.parameters())
        optimizer = Temperon(inner, total_steps=20, tail_frac=1 / interval, rho=0.05)
        return Cheaper(TemperonSession(model, optimizer, inner), f"tail_frac={1 / interval:.2g}", 1 + 1 / interval)


ADAPTER = TemperonAdapter()
