import io
import os
import signal
from functools import partial

import pytest
from rich.console import Console

from steppe.experiments.errors import ExperimentError
from steppe.experiments.measuring.jobs import MeasuringOptions, Progress, run_jobs


def squared(job: int, progress: Progress) -> int:
    progress("squaring", 1)
    if job < 0:
        raise ExperimentError(f"{job} is negative")
    return job * job


def test_results_have_the_order_of_the_jobs() -> None:
    console = Console(file=io.StringIO(), width=200)
    assert run_jobs({f"job {n}": partial(squared, n) for n in range(4)}, 1, console) == [0, 1, 4, 9]
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.partition(":")[0] for line in lines] == [f"job {n}" for n in range(4)]
    assert lines[-1].endswith("(4 of 4)")
    assert run_jobs({}, 2, console) == []


def test_first_error_of_a_job_is_raised() -> None:
    with pytest.raises(ExperimentError, match="-1 is negative"):
        run_jobs({"bad": partial(squared, -1), "good": partial(squared, 1)}, 1, Console(quiet=True))


def killed(job: int, progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_worker_processes_return_the_same_results_and_errors() -> None:
    console = Console(file=io.StringIO(), width=200)
    assert run_jobs({f"job {n}": partial(squared, n) for n in range(3)}, 2, console) == [0, 1, 4]
    lines = sorted(console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert [line.partition(":")[0] for line in lines] == ["job 0", "job 1", "job 2"]
    with pytest.raises(ExperimentError, match="-1 is negative"):
        run_jobs({"bad": partial(squared, -1), "good": partial(squared, 1)}, 2, console)
    with pytest.raises(ExperimentError, match=r"measures (first|second) died \(it was ended by SIGKILL.*--processes 1"):
        run_jobs({"first": partial(killed, 1), "second": partial(killed, 2)}, 2, console)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"batch_size": -1}])
def test_samples_and_processes_are_at_least_one(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*at least one"):
        MeasuringOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="processes=0"):
        MeasuringOptions(processes=0)
