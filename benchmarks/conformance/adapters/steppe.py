"""Steppe: ``step(closure)``, and explicit passes for clipping and loss scaling, as in its README."""

import steppe
from conformance.adapters.base import Adapter, Base, Cheaper, Session


class SteppeSession(Session):
    """``step(closure)``; with clipping, explicit passes."""

    def take(self, losses):
        """Take one step."""
        if self.clip is None:
            return self.optimizer.step(self.closure(losses))
        clip, self.clip = self.clip, None
        first = None
        for sam_pass in self.optimizer.passes():
            with sam_pass:
                for loss in losses:
                    value = loss() / len(losses)
                    value.backward()
                    first = value if first is None else first
        self.clip = clip
        from torch.nn.utils import clip_grad_norm_

        clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        return first

    def report(self):
        """Return the hints of ``optimizer.report()``."""
        return "; ".join(self.optimizer.report().hints)

    def scaled(self, scaler, loss):
        """Make explicit passes, with the scaler between them and the step."""
        for sam_pass in self.optimizer.passes():
            with sam_pass:
                scaler.scale(loss()).backward()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()


class Steppe(Adapter):
    """The library of this repository."""

    title = "Steppe"
    distribution = "steppe"
    docs = "README.md"
    usage = (
        "`steppe.SAM(base, rho, model=model)` and `step(closure)`; the explicit `passes()` for clipping and scaling."
    )

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build around an instance."""
        inner = base.make(model.parameters(), state)
        return SteppeSession(model, steppe.SAM(inner, rho=rho, model=model), inner, clip=clip)

    def cheaper(self, model, base: Base, interval: int):
        """Build LookSAM."""
        inner = base.make(model.parameters())
        session = SteppeSession(model, steppe.variants.looksam(inner, rho=0.05, interval=interval, model=model), inner)
        return Cheaper(session, "LookSAM", 1 + 1 / interval)


ADAPTER = Steppe()
