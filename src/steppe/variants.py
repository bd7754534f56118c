"""The named methods as functions: ``steppe.variants.sam``, ``asam``, ``gsam``, ...

Each function is defined in the file of its method in ``steppe.methods``; ``steppe methods`` lists them. For static
type checkers, scripts/make_variants.py writes the same names to variants.pyi.
"""

from collections.abc import Callable
from typing import Any

from steppe.methods.registry import CARDS, FUNCTIONS

__all__ = list(FUNCTIONS)

globals().update(FUNCTIONS)


def __getattr__(name: str) -> Callable[..., Any]:
    if (card := CARDS.get(name)) is not None:
        raise AttributeError(f"{name!r} is no function of steppe.variants. It is used so:\n\n{card.usage}")
    raise AttributeError(f"there is no method {name!r}: steppe.variants has {', '.join(__all__)}")
