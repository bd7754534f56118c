"""What a user names as "package.module:name": a model, data, a loss that live in code of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from steppe.experiments.errors import ExperimentError

__all__ = ["called", "check_name", "named", "reason"]


def check_name(option: str, name: str) -> None:
    """Raise ValueError where it cannot be a name.

    >>> check_name("model", "nets.py:resnet")
    Traceback (most recent call last):
        ...
    ValueError: model='nets.py:resnet': write package.module:name, as in an import and without .py
    """
    module, _, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if not all(part.isidentifier() for part in parts) or module.endswith(".py"):
        raise ValueError(f"{option}={name!r}: write package.module:name, as in an import and without .py")


def named(option: str, name: str) -> Any:
    """Import it, from the current folder first, as `python -m` does.

    Raises ExperimentError when there is no such module or name, or when importing it fails.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # and leave it there: a factory may import when it is called
    module, _, attribute = name.partition(":")
    try:
        return reduce(getattr, attribute.split("."), importlib.import_module(module))
    except ModuleNotFoundError as error:
        missing = error.name or module
        inside = "" if module == missing or module.startswith(f"{missing}.") else f", which {module} imports"
        raise ExperimentError(
            f"--{option} {name}: there is no module {missing}{inside}: it is looked for in the current folder "
            f"({here}) and among what is installed"
        ) from error
    except AttributeError as error:
        if module not in sys.modules:  # it was the module's own code that failed
            raise ExperimentError(f"--{option} {name}: importing {module} raised {reason(error)}") from error
        raise ExperimentError(
            f"--{option} {name}: {module} ({getattr(sys.modules[module], '__file__', None)}) has no {attribute}"
        ) from error
    except Exception as error:
        raise ExperimentError(f"--{option} {name}: importing {module} raised {reason(error)}") from error


def called(option: str, name: str, factory: Callable[[], Any]) -> Any:
    """Call it without arguments; ExperimentError when that fails."""
    try:
        return factory()
    except Exception as error:
        raise ExperimentError(f"--{option} {name}: calling it raised {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What was raised, in a line.

    >>> reason(KeyError("x"))
    "KeyError: 'x'"
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
