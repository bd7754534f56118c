import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.pool import ProcessPool, Worker, WorkerDied


def add(number: int, other: int, report: Callable[..., None]) -> tuple[int, int]:
    report("adding", number)
    return os.getpid(), number + other


def fail(report: Callable[..., None]) -> None:
    raise ExperimentError("the cause")


def die(report: Callable[..., None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(pool: ProcessPool, worker: Worker) -> None:
    while worker not in pool.wait([worker], 1.0):
        pass


def test_workers_are_reused_report_progress_and_end_with_the_pool() -> None:
    before, reports = set(multiprocessing.active_children()), list[tuple[str, int]]()
    with ProcessPool() as pool:
        pids = set()
        for number in (1, 2):
            worker = pool.submit(partial(add, number, 10), lambda *values: reports.append(values))
            wait_for(pool, worker)
            pid, result = pool.result(worker)
            pids.add(pid)
            assert result == number + 10
    assert len(pids) == 1
    assert reports == [("adding", 1), ("adding", 2)]
    assert set(multiprocessing.active_children()) <= before


def test_killed_worker_fails_its_own_task_only() -> None:
    with ProcessPool() as pool:
        other = pool.submit(partial(add, 1, 1))
        worker = pool.submit(die)
        wait_for(pool, worker)
        with pytest.raises(WorkerDied, match="ended by SIGKILL"):
            pool.result(worker)
        wait_for(pool, other)
        assert pool.result(other)[1] == 2


def die_beside_a_child(path: Path, report: Callable[..., None]) -> None:
    if (child := os.fork()) == 0:  # as the worker of a DataLoader, it has the open files of this process
        time.sleep(600)
    path.write_text(str(child))
    die(report)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there a DataLoader does not fork its workers")
def test_killed_worker_is_noticed_though_a_process_that_it_forked_lives(tmp_path: Path) -> None:
    with ProcessPool() as pool:
        worker = pool.submit(partial(die_beside_a_child, tmp_path / "child"))
        try:
            ended = any(pool.wait([worker], 0.1) for _ in range(200))
            assert ended
            with pytest.raises(WorkerDied, match="ended by SIGKILL"):
                pool.result(worker)
        finally:
            os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_error_with_a_message_for_the_user_is_raised_unchanged() -> None:
    with ProcessPool() as pool:
        worker = pool.submit(fail)
        wait_for(pool, worker)
        with pytest.raises(ExperimentError, match="^the cause$"):
            pool.result(worker)


SLEEPING = """
import sys, time
from functools import partial
from steppe.experiments.execution.pool import ProcessPool
if __name__ == "__main__":
    sys.path.append({folder!r})
    from test_pool import sleeps
    with ProcessPool() as pool:
        worker = pool.submit(sleeps, on_progress=partial(print, flush=True))
        while True:
            pool.wait([worker], 60)
"""


def sleeps(report: Callable[..., None]) -> None:
    report("sleeping")
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_killed_parent(number: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SLEEPING.format(folder=str(Path(__file__).parent)))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sleeping\n"
        process.send_signal(number)
        # it ends only when the worker, which has the same output, has ended too
        assert process.stdout.read() == ""
