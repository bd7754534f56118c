"""The named methods as functions: ``steppe.variants.sam``, ``asam``, ``gsam``, ...

Each function comes from the file of its method in :mod:`steppe.methods`; `steppe methods` lists them.
"""

from collections.abc import Callable
from typing import Any

from steppe.methods.registry import CARDS

__all__ = [name for name, card in CARDS.items() if card.function.__name__ == name]  # pyright: ignore

globals().update({name: CARDS[name].function for name in __all__})


def __getattr__(name: str) -> Callable[..., Any]:
    raise AttributeError(f"there is no method {name!r}: steppe.variants has {', '.join(__all__)}")
