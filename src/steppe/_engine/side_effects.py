"""Protect buffers, random generators and other parameters' gradients from the second pass."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steppe._tensors.dtensor import local
from steppe._tensors.in_place import copy_, reuse


class Buffers:
    """A snapshot of a model's buffers: which tensors they are, and their values.

    It covers every registered buffer: BatchNorm in all its forms, spectral norm, EvoNorm, codebooks, counters. Nothing
    in the model is switched off, so that a module saved midway, or an exception, leaves the model as it is. State
    outside of registered buffers is not covered.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._entries: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._values: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def save(self) -> None:
        """Save the buffers; the storage of an earlier snapshot is reused."""
        self._entries = [(m._buffers, dict(m._buffers)) for m in self._model.modules() if m._buffers]
        now = {t for _, entries in self._entries for t in entries.values() if t is not None}
        self._values = {b: reuse(self._values.get(b), like=local(b)) for b in now if b in self._values or _writable(b)}
        copy_(list(self._values.values()), list(self._values))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers of :meth:`save`: the same tensors with the same values."""
        for current, entries in self._entries:
            if current.keys() != entries.keys() or any(current[k] is not t for k, t in entries.items()):
                current.clear()
                current.update(entries)
        if self._entries:
            copy_([local(b) for b in self._values], list(self._values.values()))

    def discard(self) -> None:
        """Make :meth:`restore` do nothing until the next :meth:`save`."""
        self._entries = []


def _writable(buffer: Tensor) -> bool:
    """True if a pass could have written into the buffer: it is neither uninitialized (lazy) nor expanded."""
    return not is_lazy(buffer) and not any(
        stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
    )


@contextmanager
def frozen_stats(model: nn.Module) -> Iterator[None]:
    """Keep every buffer of ``model`` unchanged by the ``with`` block.

    Modules use batch statistics as their modes say. At the end of the block, also on an exception, their buffers are
    restored: running mean and variance, ``num_batches_tracked``, power iterations, ... For code that drives its own
    second pass; :class:`steppe.SAM` with ``model=`` needs no such care.

    Args:
        model: The module whose buffers are kept.

    Example:
        >>> bn = torch.nn.BatchNorm1d(2)
        >>> with frozen_stats(bn):
        ...     _ = bn(torch.randn(8, 2))
        >>> bn.num_batches_tracked
        tensor(0)
    """
    buffers = Buffers(model)
    buffers.save()
    try:
        yield
    finally:
        buffers.restore()


class Generators:
    """The global random generators: torch's on the CPU and on ``devices``, Python's and NumPy's."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        accelerators = {d for d in devices if d.type not in ("cpu", "meta")}
        self._devices = [d for d in accelerators if torch.get_device_module(d).is_available()]

    def save(self) -> dict[str | torch.device, Any]:
        """Return the current states."""
        states: dict[str | torch.device, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        # Not imported: a program without NumPy has no such generator.
        if (numpy := sys.modules.get("numpy")) is not None:
            states["numpy"] = numpy.random.get_state()
        for device in self._devices:
            states[device] = torch.get_device_module(device).get_rng_state(device)
        return states

    def restore(self, states: dict[str | torch.device, Any]) -> None:
        """Restore the states that :meth:`save` returned."""
        torch.set_rng_state(states["torch"])
        random.setstate(states["python"])
        if "numpy" in states:
            sys.modules["numpy"].random.set_state(states["numpy"])
        for device in self._devices:
            torch.get_device_module(device).set_rng_state(states[device], device)


class OtherGradients:
    """Gradients of the model's parameters that this optimizer does not own; a second pass must not add to them."""

    def __init__(self, model: nn.Module, owned: Iterable[Tensor]) -> None:
        ours = set(owned)
        self._parameters = [p for p in model.parameters() if p not in ours]
        self._gradients: list[Tensor | None] = []

    def save(self) -> None:
        """Save the current gradients."""
        self._gradients = [p.grad for p in self._parameters]

    def clear(self) -> None:
        """Clear them, so that the second pass makes gradients of its own."""
        for p in self._parameters:
            p.grad = None

    def restore(self) -> None:
        """Restore the gradients of :meth:`save`."""
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        self._gradients = []


class SideEffects:
    """Gives two passes the side effects of one ordinary pass.

    The second pass starts from the generator states and the buffers from which the first one started, so that it
    evaluates the same function at w + e. After it, both are what the first pass left.
    """

    def __init__(self, model: nn.Module | None, owned: Iterable[Tensor], *, replay_rng: bool) -> None:
        owned = list(owned)
        self._generators = Generators(p.device for p in owned) if replay_rng else None
        self._before = Buffers(model) if model is not None else None
        self._after = Buffers(model) if model is not None else None
        self._others = OtherGradients(model, owned) if model is not None else None
        self._states_before: dict[str | torch.device, Any] | None = None
        self._states_after: dict[str | torch.device, Any] | None = None
        self._in_second_pass = False

    def begin_first_pass(self) -> None:
        """Save the state from which the first pass starts."""
        self.mark_generators()
        if self._before is not None:
            self._before.save()

    def mark_generators(self) -> None:
        """Save the generators only: a first pass may start here (the classic API has no call before it)."""
        self._states_before = self._generators.save() if self._generators is not None else None
        if self._before is not None:
            self._before.discard()

    def begin_second_pass(self) -> None:
        """Save the state in which the first pass ended, and restore the one from which it started."""
        if self._generators is not None:
            self._states_after = self._generators.save()
        if self._after is not None and self._others is not None:
            self._after.save()
            self._others.save()
        self._in_second_pass = True  # set before anything is changed: end_second_pass() undoes an interrupt below, too
        if self._generators is not None and self._states_before is not None:
            self._generators.restore(self._states_before)
        if self._before is not None and self._others is not None:
            self._before.restore()
            self._others.clear()

    def end_second_pass(self) -> None:
        """Restore the state in which the first pass ended; without a second pass, do nothing."""
        if not self._in_second_pass:
            return
        if self._generators is not None and self._states_after is not None:
            self._generators.restore(self._states_after)
        if self._after is not None and self._others is not None:
            self._after.restore()
            self._others.restore()
        self._in_second_pass = False
