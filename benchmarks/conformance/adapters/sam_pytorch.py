"""sam-pytorch: ``SAM(params, base)`` and ``step(closure)``, as in its docstrings."""

from typing import ClassVar

from sam import SAM

from conformance.adapters.base import Adapter, Base, Session

DOCS = "https://github.com/tourdeml/sam"


class OneClosure(Session):
    """One closure, called once per pass. The user schedules and saves the base."""

    @property
    def scheduled(self):
        """The base, because the wrapper's groups have the radius only."""
        return self.base

    def take(self, losses):
        """Take one step."""
        return self.optimizer.step(self.closure(losses))

    def save(self):
        """Return the states of both optimizers."""
        return {**super().save(), "base": self.base.state_dict()}

    def load(self, state):
        """Load the states of both optimizers."""
        self.base.load_state_dict(state["base"])
        super().load(state)


class SamPytorch(Adapter):
    """github.com/tourdeml/sam."""

    title = "sam-pytorch"
    distribution = "sam-pytorch"
    docs = DOCS
    usage = "`SAM(params, base, rho)` and `step(closure)`; schedules on the base; both optimizers are saved."
    not_applicable: ClassVar = dict.fromkeys(("C10a", "C10b"), "rejects rho = 0 with a clear error")

    @property
    def package(self):
        """The name that is imported."""
        return "sam"

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build around an instance."""
        inner = base.make(model.parameters(), state)
        return OneClosure(model, SAM(model.parameters(), inner, rho=rho), inner, clip=clip)


ADAPTER = SamPytorch()
