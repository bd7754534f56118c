"""Made-up trials, and the result of a search with them."""

from pathlib import Path

from tiny import image_record, recipe

from steppe.experiments.tuning.options import TuningOptions
from steppe.experiments.tuning.result import TrialResult, TuningResult
from steppe.experiments.tuning.search_space import spaces


def result(number: int, rho: float, *accuracies: float, method: str = "sam") -> TrialResult:
    runs = tuple(image_record(4, 2, 10, 100, 2.0, 0.1, 99.0, 0.5, a, 99.0 - a, 1.0, 1.0) for a in accuracies)
    values = {"rho": rho} if method != "sgd" else {}
    return TrialResult(method, number, values, "complete", runs)


def tuning_result(*results: TrialResult, low: float = 0.01, high: float = 1.0, **fields: object) -> TuningResult:
    given = recipe(**({"seeds": 3} | fields))
    found = spaces(given, [f"rho={low}..{high}"], baseline=True)
    return TuningResult(given, TuningOptions(), found, Path("runs/demo-tune"), results)
