"""The experiments: comparisons of methods at equal compute, on a task of one's own or on built-in images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steppe.experiments.data.accuracy import accuracy
    from steppe.experiments.execution.logs import Log, LoggedRun
    from steppe.experiments.measuring.flatness_result import FlatnessResult
    from steppe.experiments.report.comparison_result import ComparisonResult
    from steppe.experiments.tasks.task import Metric, Task
    from steppe.experiments.tuning.search_result import SearchResult
    from steppe.experiments.user_api import compare, measure, tune

__all__ = [
    "ComparisonResult",
    "FlatnessResult",
    "Log",
    "LoggedRun",
    "Metric",
    "SearchResult",
    "Task",
    "accuracy",
    "compare",
    "measure",
    "tune",
]

_HOMES = {
    **dict.fromkeys(("Log", "LoggedRun"), "steppe.experiments.execution.logs"),
    **dict.fromkeys(("Metric", "Task"), "steppe.experiments.tasks.task"),
    **dict.fromkeys(("compare", "measure", "tune"), "steppe.experiments.user_api"),
    "ComparisonResult": "steppe.experiments.report.comparison_result",
    "accuracy": "steppe.experiments.data.accuracy",
    "FlatnessResult": "steppe.experiments.measuring.flatness_result",
    "SearchResult": "steppe.experiments.tuning.search_result",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
