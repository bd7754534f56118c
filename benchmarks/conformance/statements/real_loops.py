"""What was found by running other people's training loops: C28 to C37."""

import copy
import re
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from conformance.adapters.base import Adapter, Base, Session
from conformance.outcome import Outcome
from conformance.statements.problems import (
    MOMENTUM,
    SGD,
    ZERO_LR,
    Vector,
    batch,
    conv,
    flat,
    interrupt_second_pass,
    number,
    same,
    tiny,
    train,
)
from conformance.statements.registry import statement


class WithMomentumEncoder(nn.Module):
    """A network whose forward moves a second one, without gradients, towards it (MoCo, BYOL, a mean teacher)."""

    def __init__(self) -> None:
        super().__init__()
        self.online = tiny()
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Move the target halfway to the trained network, and return the outputs of the latter."""
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
                    slow.lerp_(fast + 1, 0.5)  # + 1, so that a second move is seen where lr is 0, too
        return self.online(x)


class WithGrowingBuffer(nn.Module):
    """A network whose forward appends to a buffer (a memory of past means, the observers of quantization)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()
        self.register_buffer("means", torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Append the mean of the batch."""
        if self.training:
            self.means = torch.cat([self.means, x.mean().reshape(1)])
        return self.inner(x)


class WithGenerator(nn.Module):
    """A network that draws its noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()
        self.generator = torch.Generator().manual_seed(0)
        self.drawn: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the noise."""
        self.drawn.append(torch.randn(x.shape, generator=self.generator))
        return self.inner(x + self.drawn[-1])


@statement("C28a")
def momentum_encoder(peer: Adapter) -> Outcome:
    """Compare the target with that of ordinary steps, with lr = 0."""
    model, twin = WithMomentumEncoder(), WithMomentumEncoder()
    train(peer.build(model, ZERO_LR), 3)
    train(peer.plain(twin, ZERO_LR), 3)
    off = float((flat(model.target) - flat(twin.target)).abs().max())
    return Outcome(off < 1e-6, f"off by {number(off)}", "off by < 1e-06")


@statement("C28b")
def growing_buffer(peer: Adapter) -> Outcome:
    """Count the entries after three steps."""
    model = WithGrowingBuffer()
    train(peer.build(model, SGD), 3)
    return Outcome(len(model.means) == 3, f"{len(model.means)} entries", "3 entries")


@statement("C28c")
def own_generator(peer: Adapter) -> Outcome:
    """Compare the noise of the two passes of a step."""
    model = WithGenerator()
    train(peer.build(model, SGD), 1)
    equal = torch.equal(*model.drawn[-2:])
    return Outcome(equal, "equal" if equal else "different", "equal")


@statement("C29")
def step_after_exception(peer: Adapter) -> Outcome:
    """Interrupt the second pass of a step, then compare the next step with that of a run without that step."""
    model, twin = tiny(), tiny()
    session = peer.build(model, MOMENTUM)
    try:
        interrupt_second_pass(session, model, KeyboardInterrupt)
    except KeyboardInterrupt:
        session.optimizer.zero_grad()
    train(session, 1, 1)
    train(peer.build(twin, MOMENTUM), 1, 1)
    off = float((flat(model) - flat(twin)).abs().max())
    return Outcome(off == 0, f"off by {number(off)}", "off by 0")


def engine_copy(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Copy the optimizer's attributes into an object of a derived class, as the setup of Lightning Fabric does."""
    kept = {key: value for key, value in vars(optimizer).items() if key not in ("state_dict", "step", "zero_grad")}
    methods = {"step": lambda _, closure=None: optimizer.step() if closure is None else optimizer.step(closure)}
    made = object.__new__(type("Copied", (type(optimizer),), methods))
    made.__dict__.update(kept)
    return made


@statement("C30")
def copied_by_an_engine(peer: Adapter) -> Outcome:
    """Compare five steps through such a copy with those through the optimizer itself."""
    model, twin = tiny(), tiny()
    session = peer.build(model, MOMENTUM)
    session.optimizer = engine_copy(session.optimizer)
    train(session, 5)
    train(peer.build(twin, MOMENTUM), 5)
    off = float((flat(model) - flat(twin)).abs().max())
    return Outcome(off == 0, f"off by {number(off)}", "off by 0")


class Switching(torch.optim.SGD):
    """A base with ``train()`` and ``eval()``, as schedule-free optimizers have."""

    calls: ClassVar[list[str]] = []

    def train(self, mode: bool = True) -> None:
        """Record the call."""
        self.calls.append("train" if mode else "eval")

    def eval(self) -> None:
        """Record the call."""
        self.calls.append("eval")


@statement("C31")
def train_and_eval(peer: Adapter) -> Outcome:
    """Call both methods of the optimizer that takes the steps."""
    session = peer.build(tiny(), Base(Switching, {"lr": 0.1}))
    train(session, 1)
    Switching.calls.clear()
    session.optimizer.eval()
    session.optimizer.train()
    reached = Switching.calls == ["eval", "train"]
    return Outcome(reached, "reached" if reached else "not reached", "reached")


@statement("C32")
def second_network(peer: Adapter) -> Outcome:
    """Let the loss call a network in training mode that the optimizer was not given, and look for a warning."""
    model, other, twin = tiny(), conv(), conv()
    session = peer.build(model, SGD)
    x, y = batch(0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        session.step(lambda: F.cross_entropy(model(x) + other(x), y))
    twin(x)
    if same(other[1].running_mean, twin[1].running_mean):
        return Outcome(True, "one pass", "one pass, or a warning")
    return Outcome(bool(seen), "two passes, a warning" if seen else "two passes, silent", "one pass, or a warning")


@statement("C33a")
def closure_without_backward(peer: Adapter) -> Outcome:
    """Return the loss from the closure without a backward pass, as other packages ask for."""
    model = Vector(3.0, 4.0)
    session: Session = peer.build(model, SGD)
    try:
        session.optimizer.step(lambda: model.w.square().sum())
    except Exception as error:
        return Outcome(True, type(error).__name__, "SAM's step, or an error")
    moved = not torch.equal(model.w.detach(), torch.tensor([3.0, 4.0]))
    return Outcome(moved, "trained" if moved else "nothing trained", "SAM's step, or an error")


class Retained:
    """A loss whose graph serves several backward passes."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss

    def backward(self) -> None:
        """Run the backward pass, and retain the graph."""
        self.loss.backward(retain_graph=True)

    def detach(self) -> torch.Tensor:
        """Return the value."""
        return self.loss.detach()


@statement("C33b")
def graph_of_the_first_pass(peer: Adapter) -> Outcome:
    """Compute the loss before the step, with a graph that does not hold the weights, and let the passes return it."""
    model = Vector(3.0, 4.0)
    session = peer.build(model, SGD)
    loss = Retained((model.w * torch.tensor([1.0, 2.0])).sum())
    expected = "an error, or a warning"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            session.step(lambda: loss)
        except Exception as error:
            return Outcome(True, type(error).__name__, expected)
    return Outcome(bool(seen), "a warning" if seen else "SAM disabled, silent", expected)


@statement("C34")
def activation_checkpointing(peer: Adapter) -> Outcome:
    """Compare three steps with recomputed activations with three without; return the larger difference."""
    off = 0.0
    for reentrant in (False, True):
        model, twin = tiny(torch.float64), tiny(torch.float64)

        def forward(x: torch.Tensor, model: nn.Module = model, reentrant: bool = reentrant) -> torch.Tensor:
            return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

        train(peer.build(model, MOMENTUM, 0.2), 3, forward=forward)
        train(peer.build(twin, MOMENTUM, 0.2), 3)
        off = max(off, float((flat(model) - flat(twin)).abs().max()))
    return Outcome(off < 1e-12, f"off by {number(off)}", "off by < 1e-12")


@statement("C35")
def assigned_radius(peer: Adapter) -> Outcome:
    """Assign ``optimizer.rho``, and measure how far the second pass is from w."""
    model, seen = Vector(3.0, 4.0), []
    session = peer.build(model, SGD, 0.1)
    try:
        session.optimizer.rho = 0.5
    except AttributeError:
        return Outcome(True, "AttributeError", "0.5, or an error")

    def loss():
        seen.append(model.w.detach().clone())
        return model.w.square().sum()

    session.step(loss)
    distance = float((seen[1] - seen[0]).norm())
    return Outcome(abs(distance - 0.5) < 1e-4, number(distance), "0.5, or an error")


@statement("C36")
def lost_in_rounding(peer: Adapter) -> Outcome:
    """Use a radius far below the spacing of the weights; look for warnings and hints that an ordinary radius lacks."""
    expected = "a warning, an error or a report"
    ordinary, _ = _warnings_and_report(peer, 0.05)
    try:
        seen, hint = _warnings_and_report(peer, 1e-12)
    except Exception as error:
        return Outcome(True, type(error).__name__, expected)
    if seen - ordinary:
        return Outcome(True, "a warning", expected)
    return Outcome(bool(hint), "a hint in the report" if hint else "silent", expected)


def _warnings_and_report(peer: Adapter, rho: float) -> tuple[set[str], str]:
    """Return the warnings of 20 steps, without their numbers, and the report's hints."""
    model = Vector(1.0, -1.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        session = peer.build(model, SGD, rho)
        for _ in range(20):
            session.step(lambda: model.w.exp().sum())
    return {re.sub(r"[0-9]", "", str(w.message)) for w in seen}, session.report()


@statement("C37")
def typed(peer: Adapter) -> Outcome:
    """Look for the marker file of PEP 561 beside the imported package."""
    package = Path(sys.modules[peer.package].__file__).parent
    found = (package / "py.typed").is_file()
    return Outcome(found, "py.typed" if found else "no py.typed", "py.typed")
