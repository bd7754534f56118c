"""Save and restore random generators: the global ones, and those that modules hold."""

import ctypes
import random
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch


class Generators:
    """The global random generators: torch's on the CPU and on ``devices``, Python's and NumPy's."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        accelerators = {d for d in devices if d.type not in ("cpu", "meta")}
        self._devices = [d for d in accelerators if torch.get_device_module(d).is_available()]
        self._numpy = _NumPyGenerator()

    def save(self) -> dict[str | torch.device, Any]:
        """Return the current states."""
        states: dict[str | torch.device, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        # Not imported: a program without NumPy has no such generator.
        if (numpy := sys.modules.get("numpy")) is not None:
            states["numpy"] = self._numpy.get_state(numpy)
        for device in self._devices:
            states[device] = torch.get_device_module(device).get_rng_state(device)
        return states

    def seed(self, seed: int) -> None:
        """Seed them all."""
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        for device in self._devices:
            module = torch.get_device_module(device)
            with module.device(device) if hasattr(module, "device") else nullcontext():  # MPS has one device only
                module.manual_seed(seed)

    def restore(self, states: dict[str | torch.device, Any]) -> None:
        """Restore the states that :meth:`save` returned."""
        torch.set_rng_state(states["torch"])
        random.setstate(states["python"])
        if "numpy" in states:
            self._numpy.set_state(sys.modules["numpy"], states["numpy"])
        for device in self._devices:
            torch.get_device_module(device).set_rng_state(states[device], device)


class _NumPyGenerator:
    """NumPy's global generator, whose state is only copied after a draw: a copy takes 45 us, more than all the others.

    Each draw changes the memory of the bit generator, with one exception: the Gaussian that the draw of another one
    has left in the state. The copy of a state that holds one is not used again.
    """

    def __init__(self) -> None:
        self._state: Any = None
        self._memory = b""
        """The memory of the bit generator in this state; empty if it does not show each draw."""

    def get_state(self, numpy: ModuleType) -> Any:
        if not self._memory or _memory(numpy) != self._memory:
            self._remember(numpy, numpy.random.get_state())
        return self._state

    def set_state(self, numpy: ModuleType, state: Any) -> None:
        if state is not self._state or not self._memory or _memory(numpy) != self._memory:
            numpy.random.set_state(state)
            self._remember(numpy, state)

    def _remember(self, numpy: ModuleType, state: Any) -> None:
        self._state, self._memory = state, b""
        if isinstance(state, tuple):  # of MT19937, NumPy's default
            _, key, position, has_gaussian, _ = state
            memory = key.tobytes() + int(position).to_bytes(4, sys.byteorder)
            self._memory = memory if not has_gaussian and memory == _memory(numpy) else b""


def _memory(numpy: ModuleType) -> bytes:
    """Return the key and the position of NumPy's global generator as they are in memory."""
    if not hasattr(numpy.random, "get_bit_generator"):  # before NumPy 1.24
        return b""
    bits = numpy.random.get_bit_generator()
    return ctypes.string_at(bits.ctypes.state_address, 2500) if type(bits) is numpy.random.MT19937 else b""


# A generator that a module holds.


def is_generator(value: Any) -> bool:
    """True if the value is a generator of torch, Python or NumPy."""
    if isinstance(value, torch.Generator | random.Random):
        return not isinstance(value, random.SystemRandom)
    # Not imported: a program without NumPy has no such generator.
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, numpy.Generator | numpy.RandomState | numpy.BitGenerator)


def get_state(generator: Any) -> Any:
    """Return the state of such a generator."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "get_state"):  # RandomState
        return generator.get_state()
    return getattr(generator, "bit_generator", generator).state


def set_state(generator: Any, state: Any) -> None:
    """Set the state that :func:`get_state` returned."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state
