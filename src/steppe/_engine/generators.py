"""Save and restore random generators: the global ones, and those that modules hold."""

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch


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
