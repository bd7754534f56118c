from pathlib import Path

import pytest
from searching import command, tuned
from tiny import recipe

from steppe.experiments.tuning.options import TuningOptions
from steppe.experiments.tuning.search_space import spaces

optuna = pytest.importorskip("optuna")
from steppe.experiments.tuning.studies import Study, open_storage  # noqa: E402  # needs Optuna


def test_trial_is_held_by_one_process_and_resumed_when_that_process_dies(tmp_path: Path) -> None:
    (space,) = spaces(recipe(methods=("sam",)), [], baseline=False)

    def study(storage: optuna.storages.BaseStorage) -> Study:
        return Study(space, storage, tmp_path, TuningOptions(trials=3), depends_on="{}", folder_id=None)

    with open_storage(None, tmp_path) as storage, open_storage(None, tmp_path) as other:
        mine, theirs = study(storage), study(other)
        one, two = mine.take(), theirs.take()
        assert one is not None
        assert two is not None
        assert (one.handle.number, two.handle.number) == (0, 1)
        assert one.recipe != two.recipe
        two.lock.close()  # as the system does when its process is killed
        again, three = mine.take(), mine.take()
        assert again is not None
        assert three is not None
        assert (again.handle.number, three.handle.number) == (1, 2)
        assert again.recipe == two.recipe
        assert theirs.take() is None  # the others are held, and there are three at most
        for trial in (one, again, three):
            trial.lock.close()


def test_storage_that_cannot_be_opened_is_reported_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuned(command(tmp_path / "run", storage="nosuchdb://me:secret@host/db")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--storage nosuchdb://... cannot be used" in error
    assert "secret" not in error
