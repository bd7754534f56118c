"""The methods, one file each: paper, rule, named function, and the `CARD` by which the registry finds it.

A method is loaded when it is used: ``steppe.methods.gsam``.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name not in __dir__():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))})
