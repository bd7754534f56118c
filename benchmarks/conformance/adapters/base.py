"""The base class of adapters, and the closure protocol of torch.optim, which most implementations share."""

import importlib.metadata
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from conformance.outcome import Limitation, NotApplicable, Outcome


@dataclass(frozen=True)
class Base:
    """The class and the options of a base optimizer."""

    cls: type
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, params: Any, state: dict | None = None) -> Any:
        """Build the base optimizer, and load a checkpoint of it if one is given."""
        optimizer = self.cls(params, **self.options)
        if state is not None:
            optimizer.load_state_dict(state)
        return optimizer


class Session:
    """A model in training, with the loop of the implementation's documentation.

    ``step(loss)`` takes a function that runs the forward only and returns the loss. It returns the loss at w that the
    user gets. Several losses are micro-batches of one step.
    """

    def __init__(self, model: Any, optimizer: Any, base: Any = None, *, clip: float | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.base = base
        self.clip = clip
        self.schedulers: list[Any] = []

    @property
    def scheduled(self) -> Any:
        """The optimizer that the documentation passes to a learning-rate scheduler."""
        return self.optimizer

    def schedule(self, make: Callable[[Any], Any]) -> None:
        """Attach a learning-rate scheduler, which steps after every step."""
        self.schedulers.append(make(self.scheduled))

    def step(self, *losses: Callable[[], Any]) -> Any:
        """Take one step."""
        value = self.take(losses)
        for scheduler in self.schedulers:
            scheduler.step()
        return value

    def take(self, losses: tuple[Callable[[], Any], ...]) -> Any:
        """Take the optimizer's step; here an ordinary one, without SAM."""
        value = self.closure(losses)()
        self.optimizer.step()
        return value

    def closure(self, losses: tuple[Callable[[], Any], ...], scale: Callable[[Any], Any] | None = None):
        """Return the ordinary closure of torch.optim: zero_grad, forward, backward, return the loss."""

        def closure():
            self.optimizer.zero_grad()
            values = []
            for loss in losses:
                value = loss() if len(losses) == 1 else loss() / len(losses)
                (scale(value) if scale else value).backward()
                values.append(value)
            if self.clip is not None:
                from torch.nn.utils import clip_grad_norm_

                clip_grad_norm_(self.model.parameters(), self.clip)
            return values[0] if len(values) == 1 else sum(v.detach() for v in values)

        return closure

    def bare(self, loss: Callable[[], Any]) -> Any:
        """Call ``step(closure)`` with the ordinary closure and nothing before it."""
        return self.optimizer.step(self.closure((loss,)))

    def scaled(self, scaler: Any, loss: Callable[[], Any]) -> None:
        """Take a step with a loss scaler, as documented."""
        raise NotApplicable("its documentation shows no use of a loss scaler")

    def scaler_closure(self, scaler: Any, loss: Callable[[], Any], *, backward_first: bool) -> None:
        """Call ``scaler.step(optimizer, closure)``, which torch's scaler does not support."""
        closure = self.closure((loss,), scaler.scale)
        if backward_first:
            closure()
        scaler.step(self.optimizer, closure)

    def report(self) -> str:
        """Return what the optimizer's own report finds suspicious; empty without one."""
        return ""

    def save(self) -> Any:
        """Return everything that is needed to resume, except the weights."""
        return {"optimizer": self.optimizer.state_dict(), "schedulers": [s.state_dict() for s in self.schedulers]}

    def load(self, state: Any) -> None:
        """Load a saved state into a new session, whose schedulers are attached already."""
        self.optimizer.load_state_dict(state["optimizer"])
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)


class FirstAndSecond(Session):
    """``first_step`` and ``second_step`` around the user's own passes; schedulers are attached to the base."""

    zero_grad_last: ClassVar[bool] = True
    """True if the documentation clears the gradients in ``second_step``, False if before the first pass."""

    @property
    def scheduled(self) -> Any:
        """The base, as in the classic implementation's README."""
        return self.optimizer.base_optimizer

    def take(self, losses: tuple[Callable[[], Any], ...]) -> Any:
        """Take one step."""
        if not self.zero_grad_last:
            self.optimizer.zero_grad()
        self.before_first_pass()
        loss = self.backward(losses)
        self.optimizer.first_step(zero_grad=True)
        self.before_second_pass()
        self.backward(losses)
        if self.clip is not None:
            from torch.nn.utils import clip_grad_norm_

            clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.second_step(zero_grad=self.zero_grad_last)
        return loss

    def before_first_pass(self) -> None:
        """Call a helper that the documentation has here; none by default."""

    def before_second_pass(self) -> None:
        """Call a helper that the documentation has here; none by default."""

    def backward(self, losses: tuple[Callable[[], Any], ...]) -> Any:
        """Run forward and backward over all micro-batches; return the loss."""
        total = 0.0
        for loss in losses:
            value = loss() if len(losses) == 1 else loss() / len(losses)
            value.backward()
            total = value.detach() + total
        return total


@dataclass(frozen=True)
class Cheaper:
    """A cheaper method of an implementation: its session, its name, and its documented passes per step."""

    session: Session
    name: str
    passes: float


class Adapter(ABC):
    """One implementation and how it is used."""

    title: ClassVar[str]
    distribution: ClassVar[str]
    docs: ClassVar[str]
    usage: ClassVar[str]
    not_applicable: ClassVar[Mapping[str, str]] = {}
    """Statements that have no meaning for this implementation, with the reasons."""
    limitations: ClassVar[Mapping[str, Limitation]] = {}
    """Statements that fail according to the implementation's own documentation."""
    own_statements: ClassVar[Mapping[str, Callable[[], Outcome]]] = {}
    """Functions that measure statements for an implementation outside torch, in place of the common ones."""

    @property
    def package(self) -> str:
        """The name that is imported."""
        return self.distribution

    @property
    def version(self) -> str:
        """The installed version."""
        return importlib.metadata.version(self.distribution)

    @abstractmethod
    def build(
        self, model: Any, base: Base, rho: float = 0.05, *, clip: float | None = None, state: dict | None = None
    ) -> Session:
        """Build SAM around ``base``; ``state`` is a checkpoint of the plain base optimizer to resume from."""

    def plain(self, model: Any, base: Base) -> Session:
        """Build the base optimizer without SAM, in the same loop."""
        return Session(model, base.make(model.parameters()))

    def cheaper(self, model: Any, base: Base, interval: int) -> Cheaper:
        """Build the implementation's method with fewer passes."""
        raise NotApplicable("has SAM only")


def quiet() -> None:
    """Silence warnings of third parties during their import, which are not a subject of the table."""
    warnings.simplefilter("ignore")
