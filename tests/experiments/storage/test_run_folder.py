import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import image_record, recipe, train_run

from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.run_folder import METRICS, RunFolder

RECORD = image_record(4, 4, 20, 288, 1.0, 0.5, 80.0, 0.7, 70.0, 10.0, 1.5, 100.0).to_json()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim(recipe(), 1)
    return folder


def test_same_configuration_can_be_claimed_again(folder: RunFolder) -> None:
    folder.claim(recipe(), 1)
    assert folder.recipe() == recipe()


@pytest.mark.parametrize("other", [{"lr": 0.5}, {"first_seed": 1}], ids=["another configuration", "another seed"])
def test_run_of_another_comparison_is_refused_by_every_reader(
    folder: RunFolder, other: dict[str, object], tmp_path: Path
) -> None:
    run, foreign = next(iter(recipe().runs())), next(iter(recipe(**other).runs()))
    train_run(foreign, tmp_path / "foreign")
    shutil.copytree(tmp_path / "foreign", folder.run(run))
    with pytest.raises(ExperimentError, match=r"checkpoint.pt belongs to another run or another configuration .*Dele"):
        folder.results(recipe())
    shutil.rmtree(folder.run(run))
    train_run(run, folder.run(run))
    assert folder.results(recipe())[run]


def test_folder_of_a_search_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format": "steppe tuning, version 2", "recipe": {}}))
    way_out = r"choose another folder with --out\. `steppe plot .*` shows the search and the com"
    with pytest.raises(ExperimentError, match=rf"is the folder of a search .*{way_out}"):
        RunFolder(tmp_path).recipe()


def test_methods_and_seeds_can_be_added(folder: RunFolder) -> None:
    more = recipe(seeds=3, methods=("sgd", "sam", "asam"), out=Path("elsewhere"))
    folder.claim(more, 1)
    assert folder.recipe() == more


def test_other_configuration_raises_with_every_difference(folder: RunFolder) -> None:
    with pytest.raises(ExperimentError) as error:
        folder.claim(recipe(lr=0.5, width=3, seeds=2), 2)
    text = str(error.value)
    for part in ("lr was 0.05 and is 0.5", "width was 2 and is 3", "processes was 1 and is 2", "--out"):
        assert part in text
    assert "seeds" not in text
    assert folder.recipe() == recipe()


def test_foreign_folder_raises_and_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("unchanged")
    with pytest.raises(ExperimentError, match="not a run folder and not empty"):
        RunFolder(tmp_path).claim(recipe(), 1)
    with pytest.raises(ExperimentError, match="is a file"), RunFolder(tmp_path / "thesis.tex").locked():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', '{"recipe": 3}'])
def test_damaged_configuration_raises(content: str, folder: RunFolder) -> None:
    (folder.path / "config.json").write_text(content)
    with pytest.raises(ExperimentError, match=r"config.json is damaged, of another version"):
        folder.claim(recipe(), 1)


def test_folder_of_another_version_is_refused_unchanged_and_says_what_reads_it(folder: RunFolder) -> None:
    config = folder.path / "config.json"
    values = json.loads(config.read_text())
    written = values["format"]
    config.write_text(json.dumps(values | {"format": "steppe run folder, version 2"}))
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    for use in (folder.recipe, lambda: folder.claim(recipe(), 1)):
        with pytest.raises(ExperimentError, match=f"'steppe run folder, version 2', .* reads '{written}'") as caught:
            use()
        assert "environment.json beside it names the version" in str(caught.value)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_configuration_with_an_unknown_field_raises(folder: RunFolder) -> None:
    config = json.loads((folder.path / "config.json").read_text())
    config["recipe"]["color"] = "red"
    (folder.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExperimentError, match="color"):
        folder.recipe()


def test_lock_is_exclusive_until_it_is_released(folder: RunFolder) -> None:
    with folder.locked(), pytest.raises(ExperimentError, match="another process is working in"), folder.locked():
        pass
    with folder.locked():
        pass


@pytest.mark.parametrize("damage", ["", '{"epoch": 1', "half", "another", "missing"])
def test_damaged_metrics_are_replaced_by_the_records_of_the_checkpoint(
    damage: str, folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    sgd, sam = recipe().runs()
    records = train_run(sgd, folder.run(sgd))
    assert folder.results(recipe()) == {sgd: records, sam: []}
    assert not caplog.text
    metrics = folder.run(sgd) / METRICS
    whole = metrics.read_text()
    other = whole.replace('"test_accuracy": ', '"test_accuracy": 1')
    metrics.write_text({"half": whole.splitlines()[0], "another": other}.get(damage, damage))
    if damage == "missing":
        metrics.unlink()
    assert folder.results(recipe()) == {sgd: records, sam: []}
    assert f"{metrics} is missing, damaged or incomplete: the records of the checkpoint" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        '{"epoch": 1',
        "[]",
        "null",
        json.dumps(RECORD | {"gap": None}),
        json.dumps(RECORD | {"steps": 2.5}),
        json.dumps(RECORD | {"test_loss": "0.5"}),
        json.dumps(RECORD | {"test_loss": True}),
        json.dumps(RECORD | {"seconds": 10**400}),
        json.dumps({k: v for k, v in RECORD.items() if k != "gap"}),
        json.dumps(RECORD | {"color": "red"}),
        f"{json.dumps(RECORD)}\n{json.dumps(RECORD)}",
        "[" * 100_000,
    ],
)
def test_damaged_metrics_without_a_checkpoint_raise(line: str, folder: RunFolder) -> None:
    sgd, _ = recipe().runs()
    folder.run(sgd).mkdir(parents=True)
    (folder.run(sgd) / METRICS).write_text(line)
    with pytest.raises(ExperimentError, match=r"metrics.jsonl is damaged.*: run the comparison again") as error:
        folder.results(recipe())
    assert "\n" not in str(error.value)


def test_measured_values_that_are_not_finite_are_results(folder: RunFolder) -> None:
    sgd, _ = recipe().runs()
    folder.run(sgd).mkdir(parents=True)
    (folder.run(sgd) / METRICS).write_text(json.dumps(RECORD | {"train_loss": math.nan, "test_loss": math.inf}))
    (record,) = folder.results(recipe())[sgd]
    assert math.isnan(record["train_loss"])
    assert record["test_loss"] == math.inf


@pytest.mark.slow
def test_lock_is_released_when_its_process_is_killed_and_can_be_waited_for(folder: RunFolder) -> None:
    program = (
        "import sys, time; from pathlib import Path; from steppe.experiments.storage.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(folder.path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(ExperimentError, match="another process is working in"), folder.locked(timeout=0.1):
            pass
        process.kill()
        with folder.locked(timeout=60):
            pass
