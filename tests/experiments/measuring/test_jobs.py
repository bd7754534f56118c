import io
import os
import signal

import pytest
from rich.console import Console

from steppe.experiments.errors import ExperimentError
from steppe.experiments.measuring.jobs import Progress, run_jobs


def squared(job: int, progress: Progress) -> int:
    progress("squaring", 1)
    if job < 0:
        raise ExperimentError(f"{job} is negative")
    return job * job


def test_results_have_the_order_of_the_jobs() -> None:
    console = Console(file=io.StringIO(), width=200)
    assert run_jobs(squared, {f"job {n}": n for n in range(4)}, 1, console) == [0, 1, 4, 9]
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.partition(":")[0] for line in lines] == [f"job {n}" for n in range(4)]
    assert lines[-1].endswith("(4 of 4)")
    assert run_jobs(squared, {}, 2, console) == []


def test_first_error_of_a_job_is_raised() -> None:
    with pytest.raises(ExperimentError, match="-1 is negative"):
        run_jobs(squared, {"bad": -1, "good": 1}, 1, Console(quiet=True))


def killed(job: int, progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_worker_processes_return_the_same_results_and_errors() -> None:
    console = Console(file=io.StringIO(), width=200)
    assert run_jobs(squared, {f"job {n}": n for n in range(3)}, 2, console) == [0, 1, 4]
    lines = sorted(console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert [line.partition(":")[0] for line in lines] == ["job 0", "job 1", "job 2"]
    with pytest.raises(ExperimentError, match="-1 is negative"):
        run_jobs(squared, {"bad": -1, "good": 1}, 2, console)
    with pytest.raises(ExperimentError, match=r"measures (first|second) died \(it was ended by SIGKILL.*--processes 1"):
        run_jobs(killed, {"first": 1, "second": 2}, 2, console)
