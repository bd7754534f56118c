"""Send objects together with the user's code that they need, to machines that have no copy of it."""

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import cloudpickle  # type: ignore[import-untyped]

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Run
from steppe.experiments.entry_points import load_entry_point
from steppe.experiments.execution.executor import MakeTask
from steppe.experiments.execution.prepared_task import NamedTask, OneTask

T = TypeVar("T")


@dataclass(frozen=True)
class Packed:
    """An object in bytes; unpickled, it is the object itself."""

    content: bytes

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self.content,)


def pack(thing: Any) -> Packed:
    """Pickle an object, with the functions and classes of the user's modules by value."""
    registered = [module for module in list(sys.modules.values()) if _is_users(module)]
    for module in registered:
        cloudpickle.register_pickle_by_value(module)
    try:
        return Packed(cloudpickle.dumps(thing))
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def pack_task(make_task: MakeTask) -> Packed | MakeTask:
    """Pack the function that makes tasks; a task of a module comes along with its data, as it is in this process."""
    return _pack_or_name(OneTask(make_task.task) if isinstance(make_task, NamedTask) else make_task, make_task)


def pack_run(run: Run) -> Any:
    """Pack a run; methods that are functions of a user's module come along."""
    comparison = run.recipe.comparison
    comparison = replace(comparison, methods=tuple(map(_with_function, comparison.methods)))
    packed = replace(run, method=_with_function(run.method), recipe=replace(run.recipe, comparison=comparison))
    return _pack_or_name(packed, run)


def _pack_or_name(thing: Any, by_name: T) -> Packed | T:
    """Pack `thing`; if it holds a lock, an open file or the like, other processes import `by_name` by its names."""
    try:
        return pack(thing)
    except Exception:  # of any kind, from the user's own classes
        return by_name


def _with_function(method: MethodSpec) -> MethodSpec:
    if method.function is not None or ":" not in method.name:
        return method
    return replace(method, function=load_entry_point("methods", method.name))


def _is_users(module: ModuleType) -> bool:
    """True for a module that is neither installed nor of Python."""
    file, name = getattr(module, "__file__", None), getattr(module, "__name__", "")
    if not file or sys.modules.get(name) is not module:
        return False
    top, installed = name.partition(".")[0], {"site-packages", "dist-packages"}.intersection(Path(file).parts)
    return not installed and top not in _known_names()


@cache
def _known_names() -> frozenset[str]:
    """The top-level modules of Python and of installed packages, also those that are installed for development."""
    return sys.stdlib_module_names | packages_distributions().keys() | {"__main__", __name__.partition(".")[0]}
