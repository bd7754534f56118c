import json
import os
from pathlib import Path

import pytest
from tiny import recipe, train_run

from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.files import write_atomically
from steppe.experiments.storage.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim(recipe(), 1)
    return folder


def test_the_same_configuration_may_go_on(folder: RunFolder) -> None:
    folder.claim(recipe(), 1)
    assert folder.recipe() == recipe()


def test_runs_may_be_added(folder: RunFolder) -> None:
    more = recipe(seeds=3, methods=("sgd", "sam", "asam"), out=Path("elsewhere"))
    folder.claim(more, 1)
    assert folder.recipe() == more


def test_another_configuration_is_refused_naming_every_difference(folder: RunFolder) -> None:
    with pytest.raises(ExperimentError) as error:
        folder.claim(recipe(lr=0.5, width=3, seeds=2), 2)
    text = str(error.value)
    for part in ("lr was 0.05 and is 0.5", "width was 2 and is 3", "processes was 1 and is 2", "--out"):
        assert part in text
    assert "seeds" not in text
    assert folder.recipe() == recipe()


def test_somebody_elses_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ExperimentError, match="not a run folder and not empty"):
        RunFolder(tmp_path).claim(recipe(), 1)
    with pytest.raises(ExperimentError, match="is a file"), RunFolder(tmp_path / "thesis.tex").locked():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', '{"recipe": 3}'])
def test_a_damaged_configuration_is_refused(content: str, folder: RunFolder) -> None:
    (folder.path / "config.json").write_text(content)
    with pytest.raises(ExperimentError, match=r"config.json is damaged or of another version"):
        folder.claim(recipe(), 1)


def test_a_configuration_with_a_field_of_another_version_is_refused(folder: RunFolder) -> None:
    config = json.loads((folder.path / "config.json").read_text())
    config["recipe"]["color"] = "red"
    (folder.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExperimentError, match="color"):
        folder.recipe()


def test_two_cannot_work_in_one_folder(folder: RunFolder) -> None:
    with folder.locked(), pytest.raises(ExperimentError, match="another process is working in"), folder.locked():
        pass
    with folder.locked():
        pass


def test_results_are_read_back_and_a_damaged_line_is_an_error(folder: RunFolder) -> None:
    sgd, sam = recipe().runs()
    records = train_run(sgd, folder.run(sgd))
    assert folder.results(recipe()) == {sgd: records, sam: []}
    (folder.run(sgd) / "metrics.jsonl").write_text('{"epoch": 1')
    with pytest.raises(ExperimentError, match=r"metrics.jsonl is damaged"):
        folder.results(recipe())


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
