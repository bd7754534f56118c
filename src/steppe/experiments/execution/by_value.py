"""Send objects together with the user's code that they need, to machines that have no copy of it."""

import pickle
import site
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Run
from steppe.experiments.entry_points import load_entry_point
from steppe.experiments.execution.executor import MakeTask
from steppe.experiments.execution.pretraining import NamedTask, OneTask

_OURS = __name__.partition(".")[0]


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
    """Pack the function that makes tasks; a task of a module comes along with its data, as it is in this process.

    One that cannot be pickled is left as it is: other processes then import it by its name.
    """
    if not isinstance(make_task, NamedTask):
        return pack(make_task)
    try:
        return pack(OneTask(make_task.task))
    except Exception:  # a lock, an open file, or anything else
        return make_task


def pack_run(run: Run) -> Any:
    """Pack a run; methods that are functions of a user's module come along."""
    comparison = run.recipe.comparison
    comparison = replace(comparison, methods=tuple(map(_with_function, comparison.methods)))
    return pack(replace(run, method=_with_function(run.method), recipe=replace(run.recipe, comparison=comparison)))


def _with_function(method: MethodSpec) -> MethodSpec:
    if method.function is not None or ":" not in method.name:
        return method
    return replace(method, function=load_entry_point("methods", method.name))


def _is_users(module: ModuleType) -> bool:
    """True for a module that was not installed and is neither of Python nor of this package."""
    file, name = getattr(module, "__file__", None), getattr(module, "__name__", "")
    if not file or sys.modules.get(name) is not module or name.partition(".")[0] in ("__main__", _OURS):
        return False
    path = Path(file)
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    return not installed and not any(path.is_relative_to(folder) for folder in _installed())


@cache
def _installed() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return *(Path(paths[key]) for key in ("stdlib", "platstdlib", "purelib", "platlib")), Path(
        site.getusersitepackages()
    )
