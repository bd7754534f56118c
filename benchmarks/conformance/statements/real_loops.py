"""What was found by running other people's training loops: C28 to C35."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from conformance.adapters.base import Adapter, Session
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


@statement("C33")
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
