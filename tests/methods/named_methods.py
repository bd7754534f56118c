"""The methods of the registry, built by their named functions for short runs."""

import inspect
from collections.abc import Callable

import torch

import steppe
from steppe import testing
from steppe.methods.registry import CARDS, FUNCTIONS
from support import BASES

TOTAL_STEPS = 20


def build(name: str, base: str = "momentum", **arguments) -> Callable[[torch.nn.Module], steppe.SAM]:
    """Return model -> optimizer, for a method that wraps a base optimizer."""
    given = {"rho": 0.1, **CARDS[name].short_arguments(total_steps=TOTAL_STEPS), **arguments}
    return lambda model: FUNCTIONS[name](BASES[base](model.parameters()), **given, model=model)


def passes_per_step(name: str, **arguments) -> float:
    return testing.passes_per_step(build(name, **arguments), TOTAL_STEPS)


WRAPPERS = [name for name, f in FUNCTIONS.items() if next(iter(inspect.signature(f).parameters)) == "base_optimizer"]
"""The methods that wrap a base optimizer; the others are optimizers of their own, or terms in the loss."""
RULE_METHODS = [name for name in WRAPPERS if type(build(name)(testing.Net())) is steppe.SAM]
"""The methods that are rules of :class:`steppe.SAM`; the other wrappers have a step of their own."""
