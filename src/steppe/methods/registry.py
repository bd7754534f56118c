"""The registry of methods: every module of this package that defines a `CARD`."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from steppe import methods
from steppe.methods._card import MethodCard

__all__ = ["CARDS"]


_NO_METHODS = frozenset({"cards", "registry"})


def _cards() -> list[MethodCard]:
    names = [module.name for module in pkgutil.iter_modules(methods.__path__) if not module.name.startswith("_")]
    modules = [importlib.import_module(f"{methods.__name__}.{name}") for name in names if name not in _NO_METHODS]
    return [card for module in modules if isinstance(card := getattr(module, "CARD", None), MethodCard)]


CARDS: Mapping[str, MethodCard] = MappingProxyType(
    {card.name: card for card in sorted(_cards(), key=lambda card: (card.name != "sam", card.name))}
)
"""The card of every method by name: SAM first, then in alphabetical order."""
