import io
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from executing import DEMO, FIELDS, EventRecorder, assert_same, jobs, start_process, within_an_epoch, worker
from rich.console import Console
from tiny import CPU, RecordingReporter, command_line, dataset, make_task, options, recipe

from steppe.experiments.config.recipe import Run
from steppe.experiments.execution import cpus
from steppe.experiments.execution.executor import ExecutionOptions, Job
from steppe.experiments.execution.launch import InProcessExecutor, LocalExecutor, start_executor
from steppe.experiments.training.stopping import Stop


class Killer(EventRecorder):
    """Kills SAM's first process at its second step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.killed = folder, 0
        self.workers: set[int] = set()

    def begin(self, run: Run, *rest: object) -> None:
        super().begin(run, *rest)
        self.workers.add(worker(self.folder / run.name))

    def step(self, run: Run, *rest: object) -> None:
        super().step(run, *rest)
        steps = sum(call[:2] == ("step", run) for call in self.all)
        if run.name == "sam-seed0" and steps == 2 and not self.killed:
            self.killed = worker(self.folder / run.name)
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.slow
def test_parallel_runs_have_the_bits_of_sequential_ones_also_after_a_worker_is_killed(
    undisturbed: Path, tmp_path: Path
) -> None:
    given = {**FIELDS, **DEMO, "seeds": 2, "checkpoint_seconds": 0.0}
    making, console, killer = make_task(robustness=True), Console(file=io.StringIO(), width=300), Killer(tmp_path)
    before = set(multiprocessing.active_children())  # of other tests
    with start_executor(recipe(**given), ExecutionOptions(runs_at_once=2), console) as executor:
        outcomes = list(executor.run(jobs(tmp_path, **given), making, tmp_path, killer, Stop()))
        (tmp_path / "sgd-seed1" / "checkpoint.pt").write_bytes(b"no checkpoint")
        again = list(executor.run(jobs(tmp_path, **given), making, tmp_path, RecordingReporter(), Stop()))
    assert [bool(outcome.error) for outcome in outcomes] == [False] * 4
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.startswith("sam-seed0: its worker died (it was ended by SIGKILL, ")
    assert printed.count("\n") == 1
    first, second, *_ = (call[0] for call in killer.all if call[0] in ("begin", "end"))
    assert (first, second) == ("begin", "begin")  # both at a time
    (*_, resumed) = (call for call in killer.all if call[0] == "begin" and call[1].name == "sam-seed0")  # type: ignore[attr-defined]
    assert resumed[2] > 0  # type: ignore[operator]
    assert len(killer.workers) == 3  # for five beginnings: a process takes one run after the other
    assert [outcome.job.run.name for outcome in again if outcome.error] == ["sgd-seed1"]
    assert_same(tmp_path, undisturbed)
    assert not list(tmp_path.glob(".stop*"))
    left = {path.name for path in (tmp_path / "sam-seed0").iterdir() if path.suffix != ".draft"}  # removed in an hour
    assert left == {".lock", "checkpoint.pt", "metrics.jsonl"}
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.slow
def test_outcomes_have_the_jobs_that_were_given_also_in_a_relative_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields, folder = {"epochs": 1, "eval_every": 1, "seeds": 1}, Path("run")
    with start_executor(recipe(**fields), ExecutionOptions(runs_at_once=2), Console()) as executor:
        outcomes = list(executor.run(jobs(folder, **fields), make_task(), folder, RecordingReporter(), Stop()))
    assert {outcome.job for outcome in outcomes} == set(jobs(folder, **fields))


@pytest.mark.slow
def test_unexpected_error_in_a_worker_is_raised_with_its_traceback(tmp_path: Path) -> None:
    broken = dataset()
    broken.train.images.resize_(0, 1, 28, 28)  # as many labels as before
    before = set(multiprocessing.active_children())
    with (
        pytest.raises(RuntimeError, match=r"a worker failed:(.|\n)*train\("),
        start_executor(recipe(), ExecutionOptions(runs_at_once=2), Console()) as executor,
    ):
        list(executor.run(jobs(tmp_path), broken, tmp_path, RecordingReporter(), Stop()))
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.slow
def test_stopped_and_killed_runs_resume_to_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    runs = (out := tmp_path / "run") / "runs"
    process = start_process(out, "--runs-at-once", "2")
    within_an_epoch(runs / "sam-seed0", process)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the workers too
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    loading, _, message = errors.splitlines()
    assert loading == "Loading PyTorch ..."
    assert message.startswith("Stopped. To resume: steppe compare demo ")
    assert not list(out.glob(".stop*"))
    process = start_process(out, "--runs-at-once", "2")
    within_an_epoch(runs / "sam-seed0", process)
    process.kill()
    process.communicate(timeout=200)  # which reads until the last worker has ended too
    assert len(torch.load(runs / "sam-seed0" / "checkpoint.pt", weights_only=True)["records"]) < 4  # at once
    assert command_line(message.partition("steppe ")[2].replace("at-once 2", "at-once 1").split(), draws=False) == 0
    assert_same(runs, undisturbed)


def test_next_job_is_taken_only_when_the_last_one_has_ended(tmp_path: Path) -> None:
    taken: list[str] = []

    def watched() -> Iterator[Job]:
        for job in jobs(tmp_path, seeds=2, epochs=2):
            taken.append(job.run.name)
            yield job

    outcomes = InProcessExecutor(recipe(), CPU).run(watched(), make_task(), tmp_path, RecordingReporter(), Stop())
    assert taken == []
    assert next(outcomes).job.run.name == "sgd-seed0"
    assert taken == ["sgd-seed0"]
    assert [outcome.job.run.name for outcome in outcomes] == ["sam-seed0", "sgd-seed1", "sam-seed1"]


def test_failed_run_does_not_end_the_others_and_is_reported_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "demo", *options(seeds=2, out=tmp_path / "run")]
    damaged = tmp_path / "run" / "runs" / "sgd-seed0" / "checkpoint.pt"
    assert command_line(words, draws=False) == 0
    damaged.write_bytes(b"no checkpoint")
    (tmp_path / "run" / "runs" / "sam-seed1" / "checkpoint.pt").unlink()
    capsys.readouterr()
    assert command_line(words, draws=False) == 1
    out, err = capsys.readouterr()
    assert "SAM seed 1  standardized epoch 4/4" in out
    assert "SAM against SGD" in out
    assert err.count("\n") == 1
    assert f"the checkpoint {damaged} is damaged" in err


@pytest.mark.parametrize(
    ("words", "answer"), [("--on ray", "Start steppe without torchrun"), ("--runs-at-once 2", "Leave one of them out")]
)
def test_torchrun_cannot_be_combined_with_several_runs_at_a_time(
    words: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line(["compare", *options(out=tmp_path / "run", norm="group"), *words.split()]) == 1
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("requested", "threads", "max_runs", "wanted"),
    [(None, 1, None, 4), (None, 2, None, 2), (None, 8, None, 1), (None, 1, 3, 3), (6, 2, None, 6), (6, 1, 1, 1)],
)
def test_as_many_runs_at_a_time_as_the_cpus_have_room_for(
    requested: int | None, threads: int, max_runs: int | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "available", lambda: 4)
    with start_executor(
        recipe(threads=threads), ExecutionOptions(runs_at_once=requested), Console(), max_runs=max_runs
    ) as executor:
        assert isinstance(executor, LocalExecutor) == (wanted > 1)
        assert not isinstance(executor, LocalExecutor) or executor._capacity() == wanted
