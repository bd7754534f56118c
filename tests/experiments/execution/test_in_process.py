from collections.abc import Iterator
from pathlib import Path

import pytest
from executing import jobs
from tiny import CPU, RecordingReporter, command_line, dataset, options, recipe

from steppe.experiments.execution.executor import Job
from steppe.experiments.execution.in_process import InProcessExecutor
from steppe.experiments.training.stopping import Stop


def test_next_job_is_taken_only_when_the_last_one_has_ended(tmp_path: Path) -> None:
    taken: list[str] = []

    def watched() -> Iterator[Job]:
        for job in jobs(tmp_path, seeds=2, epochs=2):
            taken.append(job.run.name)
            yield job

    outcomes = InProcessExecutor(recipe(), CPU).run(watched(), dataset(), tmp_path, RecordingReporter(), Stop())
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
