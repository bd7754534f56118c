from pathlib import Path

import pytest
from executing import FakeRay, train_on_ray


def test_run_whose_worker_dies_repeatedly_fails_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(sam_seed0=4, sgd_seed1=3)
    outcomes, printed = train_on_ray(ray, tmp_path, monkeypatch)
    assert ray.most_at_once == 2
    assert sorted(outcome.job.run.name for outcome in outcomes) == ["sam-seed0", "sam-seed1", "sgd-seed0", "sgd-seed1"]
    (failed,) = [outcome for outcome in outcomes if outcome.error is not None]
    assert failed.job.run.name == "sam-seed0"
    assert "its worker died 4 times, the last time because The worker was killed." in str(failed.error)
    assert printed.count("its worker died (The worker was killed)") == 6
    assert (
        "sgd-seed1: its worker died (The worker was killed); another one resumes it from its checkpoint, retry 3"
        in printed
    )


def test_run_that_fails_by_itself_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sam-seed1").mkdir()
    (tmp_path / "sam-seed1" / "checkpoint.pt").write_bytes(b"no checkpoint")
    outcomes, printed = train_on_ray(FakeRay(), tmp_path, monkeypatch)
    assert [bool(outcome.error) for outcome in outcomes] == [False, False, False, True]
    assert "is damaged" in str(outcomes[-1].error)
    assert printed == ""
