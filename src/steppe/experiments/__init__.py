"""The experiments: comparisons of methods at equal compute, on a task of one's own or on built-in images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steppe.experiments.tasks.task import Metric, Task, accuracy
    from steppe.experiments.user_api import ComparisonResult, compare

__all__ = ["ComparisonResult", "Metric", "Task", "accuracy", "compare"]

_HOMES = {
    **dict.fromkeys(("Metric", "Task", "accuracy"), "steppe.experiments.tasks.task"),
    **dict.fromkeys(("ComparisonResult", "compare"), "steppe.experiments.user_api"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
