"""Integrations with training frameworks, one module each: Lightning, Transformers, Accelerate, Keras, PEFT.

PEFT's has methods for LoRA. All others have the same options: ``method`` wraps the base optimizer, ``rho`` is its
radius, ``log_sharpness`` logs ``perturbed_loss``, L(w + e), and ``sharpness``, L(w + e) - L(w). ``current_pass`` is the
pass that runs now.

A module is imported at its first use, so that no framework is needed for the others.
"""

from importlib import import_module
from types import ModuleType

_MODULES = ("accelerate", "keras", "lightning", "peft", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name!r}: its modules are {', '.join(_MODULES)}")
