from pathlib import Path

import pytest
from rich.console import Console
from tiny import command_line, options, recipe

from steppe.experiments.execution import cpus
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.execution.launch import start_executor
from steppe.experiments.execution.local import LocalExecutor


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
