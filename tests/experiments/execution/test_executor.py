from pathlib import Path

import pytest
from tiny import recipe

from steppe.experiments.execution.executor import ExecutionOptions, Job, Outcome, failures


def test_failures_counts_and_lists_the_failed_runs() -> None:
    one, two, three = (Job(run, Path()) for run in recipe(methods=("sgd", "sam", "asam")).runs())
    assert failures([Outcome(one), Outcome(two)]) is None
    assert failures([Outcome(one), Outcome(two, "no luck")]) == "no luck"
    text = failures([Outcome(one, "no luck"), Outcome(two), Outcome(three, "no disk")])
    assert text == "2 of 3 runs failed: (1) no luck; (2) no disk"


@pytest.mark.parametrize(
    ("field", "value", "meaning"),
    [("runs_at_once", 0, "at least 1"), ("cpus_per_run", 0, "at least 1"), ("gpus_per_run", -0.5, "at least 0")],
)
def test_invalid_option_is_named_with_its_meaning(field: str, value: float, meaning: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}={value}: .*{meaning}"):
        ExecutionOptions(**{field: value})  # type: ignore[arg-type]


def test_runs_at_once_cannot_be_combined_with_ray() -> None:
    with pytest.raises(ValueError, match="set how much a run takes"):
        ExecutionOptions("ray", runs_at_once=2)
