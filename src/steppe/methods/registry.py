"""The registry of methods: every module of this package that defines a `CARD`."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from steppe import methods
from steppe._engine.hints import checked
from steppe._engine.signatures import show_signature
from steppe.methods._card import MethodCard

__all__ = ["CARDS", "FUNCTIONS"]

# Modules of this package that hold no method; this one cannot be imported while it is being executed.
_NOT_METHODS = frozenset({"cards", "registry"})


def _find_cards() -> Iterator[MethodCard]:
    for module in pkgutil.iter_modules(methods.__path__):
        if module.name.startswith("_") or module.name in _NOT_METHODS:
            continue
        card = getattr(importlib.import_module(f"{methods.__name__}.{module.name}"), "CARD", None)
        if not isinstance(card, MethodCard) or card.name != module.name:
            raise TypeError(
                f"steppe/methods/{module.name}.py defines no CARD of that name, so the method would be missing from "
                f"the registry: add CARD = MethodCard(name={module.name!r}, ...), or begin the file's name with _"
            )
        yield card


CARDS: Mapping[str, MethodCard] = MappingProxyType(
    {card.name: card for card in sorted(_find_cards(), key=lambda card: (card.name != "sam", card.name))}
)
"""The card of every method by name: SAM first, then in alphabetical order."""


def _named(card: MethodCard) -> Callable[..., Any]:
    """Return the function of a card with its whole signature, checked: its options are those of what it returns."""
    made = inspect.signature(card.function).return_annotation
    show_signature(card.function, card.function, like=made.__init__)
    return checked(card.function, f"steppe.variants.{card.name}")


FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {name: _named(card) for name, card in CARDS.items() if card.function.__name__ == name and not card.needs_adapters}
)
"""The functions of :mod:`steppe.variants`; methods that are a closure or a rule have none, nor those for adapters."""
