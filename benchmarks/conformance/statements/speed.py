"""Synchronization, compilation and the number of operations: C25, C26, C27."""

from collections.abc import Callable

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.adapters.base import Adapter, Base, Session
from conformance.outcome import NotApplicable, Outcome
from conformance.statements.problems import FUSED, MOMENTUM, SGD, conv, train
from conformance.statements.registry import statement


class LossWithGradients:
    """A loss whose backward writes given gradients: a CPU build of torch has no autograd for CUDA tensors."""

    def __init__(self, model: nn.Module, gradients: list[torch.Tensor]) -> None:
        self.model, self.gradients = model, gradients

    def backward(self) -> None:
        """Write the gradients."""
        for p, g in zip(self.model.parameters(), self.gradients, strict=True):
            p.grad = g

    def detach(self) -> "LossWithGradients":
        """Return itself, which has no graph."""
        return self

    def __add__(self, _: object) -> "LossWithGradients":
        return self


class Operations(TorchDispatchMode):
    """Counts operations at the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith("prim.") and "detach" not in str(func):  # queries and views do no work
            self.count += 1
        return func(*args, **(kwargs or {}))


def _on_fake_cuda(build: Callable[[nn.Module, Base], Session], tensors: int, base: Base) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.ParameterList([nn.Parameter(torch.empty(3, 5, device="cuda")) for _ in range(tensors)])
        session = build(model, base)
        gradients = [torch.ones_like(p) for p in model]
        session.step(lambda: LossWithGradients(model, gradients))
        with Operations() as operations:
            session.step(lambda: LossWithGradients(model, gradients))
    return operations.count


@statement("C25")
def no_synchronization(peer: Adapter) -> Outcome:
    """Use fake CUDA tensors, which raise when a value is read on the host."""
    try:
        for base in (SGD, MOMENTUM):
            _on_fake_cuda(peer.build, 3, base)
    except Exception as error:
        return Outcome(False, f"{type(error).__name__}", "no read")
    return Outcome(True, "no read", "no read")


@statement("C26")
def no_recompilation(peer: Adapter) -> Outcome:
    """Take five steps with torch.compile."""
    torch._dynamo.reset()
    counters.clear()
    model = conv()
    compiled = torch.compile(model, backend="aot_eager")
    session = peer.build(model, MOMENTUM)
    try:
        train(session, 1, forward=compiled)
        first = counters["stats"]["unique_graphs"]
        train(session, 4, 1, forward=compiled)
        more = counters["stats"]["unique_graphs"] - first
    finally:
        torch._dynamo.reset()
    if not first:
        raise NotApplicable("nothing was compiled")
    return Outcome(more == 0, f"{more} more", "0 more")


@statement("C27")
def operations(peer: Adapter) -> Outcome:
    """Count perturbing and restoring without the base's own step, with fake CUDA tensors."""
    few, many = (_on_fake_cuda(peer.build, n, FUSED) - _on_fake_cuda(peer.plain, n, FUSED) for n in (10, 100))
    return Outcome(many == few, f"{few} for 10, {many} for 100", "equal")
