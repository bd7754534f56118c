"""What a pass must look after: buffers (running statistics), random generators, other parameters' gradients."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steppe._tensors.dtensor import local
from steppe._tensors.ops import copy_, reuse


class Buffers:
    """The buffers of a model at one moment: which tensors they were, and what was in them.

    Everything that a module registers is covered: BatchNorm in all its forms, spectral norm, EvoNorm, codebooks,
    counters. Nothing is switched off, so a module that is saved, or an exception that is raised, finds the model as
    it is. State that a module keeps outside its buffers is out of reach.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._values: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Remember the buffers as they are now; the storage of an earlier take is reused."""
        self._places = [(m._buffers, dict(m._buffers)) for m in self._model.modules() if m._buffers]
        now = {t for _, entries in self._places for t in entries.values() if t is not None}
        self._values = {b: reuse(self._values.get(b), like=local(b)) for b in now if b in self._values or _writable(b)}
        copy_(list(self._values.values()), list(self._values))

    @torch.no_grad()
    def restore(self) -> None:
        """Make the buffers what they were when :meth:`take` was called: the same tensors with the same values."""
        for place, entries in self._places:
            if place.keys() != entries.keys() or any(place[k] is not t for k, t in entries.items()):
                place.clear()
                place.update(entries)
        if self._places:
            copy_([local(b) for b in self._values], list(self._values.values()))

    def forget(self) -> None:
        """Make :meth:`restore` do nothing until the next :meth:`take`."""
        self._places = []


def _writable(buffer: Tensor) -> bool:
    """Whether a pass could have written into it: not a lazy one yet to be made, not an expanded one."""
    return not is_lazy(buffer) and not any(
        stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
    )


@contextmanager
def frozen_stats(model: nn.Module) -> Iterator[None]:
    """Keep every buffer of ``model`` unchanged by what happens in the ``with`` block.

    Batch statistics are used as the modules' modes say; only their traces in the buffers (running mean and variance,
    ``num_batches_tracked``, power iterations, ...) are undone at the end, also on an exception. For code that drives
    its own second pass; :class:`steppe.SAM` with ``model=`` does this by itself.

    >>> bn = torch.nn.BatchNorm1d(2)
    >>> with frozen_stats(bn):
    ...     _ = bn(torch.randn(8, 2))
    >>> bn.num_batches_tracked
    tensor(0)
    """
    buffers = Buffers(model)
    buffers.take()
    try:
        yield
    finally:
        buffers.restore()


class Generators:
    """The states of the global random generators: torch's on the CPU and on ``devices``, Python's and NumPy's."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        accelerators = {d for d in devices if d.type not in ("cpu", "meta")}
        self._devices = [d for d in accelerators if torch.get_device_module(d).is_available()]

    def take(self) -> dict[str | torch.device, Any]:
        """Return the states as they are now."""
        states: dict[str | torch.device, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if (numpy := sys.modules.get("numpy")) is not None:
            states["numpy"] = numpy.random.get_state()
        for device in self._devices:
            states[device] = torch.get_device_module(device).get_rng_state(device)
        return states

    def restore(self, states: dict[str | torch.device, Any]) -> None:
        """Make the generators what they were when ``states`` were taken."""
        torch.set_rng_state(states["torch"])
        random.setstate(states["python"])
        if "numpy" in states:
            sys.modules["numpy"].random.set_state(states["numpy"])
        for device in self._devices:
            torch.get_device_module(device).set_rng_state(states[device], device)


class Bystanders:
    """Parameters of the model that this optimizer does not own: a second pass must not add to their gradients."""

    def __init__(self, model: nn.Module, owned: Iterable[Tensor]) -> None:
        ours = set(owned)
        self._parameters = [p for p in model.parameters() if p not in ours]
        self._gradients: list[Tensor | None] = []

    def take(self) -> None:
        """Remember their gradients as they are now."""
        self._gradients = [p.grad for p in self._parameters]

    def clear(self) -> None:
        """Leave them without gradients, for the second pass to make its own."""
        for p in self._parameters:
            p.grad = None

    def restore(self) -> None:
        """Give them the gradients that they had when :meth:`take` was called."""
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        self._gradients = []


class Protection:
    """Lets two passes leave what one ordinary pass would have left, and the second see what the first one saw.

    The second pass starts from the generators' states and the buffers that the first one started from, so that it
    evaluates the same function at w + e; after it, both are what the first pass made of them.
    """

    def __init__(self, model: nn.Module | None, owned: Iterable[Tensor], *, replay_rng: bool) -> None:
        owned = list(owned)
        self._generators = Generators(p.device for p in owned) if replay_rng else None
        self._before = Buffers(model) if model is not None else None
        self._after = Buffers(model) if model is not None else None
        self._bystanders = Bystanders(model, owned) if model is not None else None
        self._states_before: dict[str | torch.device, Any] | None = None
        self._states_after: dict[str | torch.device, Any] | None = None
        self._second = False

    def first_pass(self) -> None:
        """Remember where the first pass starts."""
        self.mark_generators()
        if self._before is not None:
            self._before.take()

    def mark_generators(self) -> None:
        """Remember the generators only, where it is not sure that a pass starts here."""
        self._states_before = self._generators.take() if self._generators is not None else None
        if self._before is not None:
            self._before.forget()

    def second_pass(self) -> None:
        """Remember where the first pass ended, and go back to where it started."""
        if self._generators is not None:
            self._states_after = self._generators.take()
        if self._after is not None and self._bystanders is not None:
            self._after.take()
            self._bystanders.take()
        self._second = True  # from here on, whatever happens, end() undoes it
        if self._generators is not None and self._states_before is not None:
            self._generators.restore(self._states_before)
        if self._before is not None and self._bystanders is not None:
            self._before.restore()
            self._bystanders.clear()

    def end(self) -> None:
        """Leave what the first pass left; without a second pass, do nothing."""
        if not self._second:
            return
        if self._generators is not None and self._states_after is not None:
            self._generators.restore(self._states_after)
        if self._after is not None and self._bystanders is not None:
            self._after.restore()
            self._bystanders.restore()
        self._second = False
