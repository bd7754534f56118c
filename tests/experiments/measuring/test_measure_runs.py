"""`steppe measure RUN`: its files, the conditions for a new measurement, and the restored runs."""

import dataclasses
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import CPU, MEASURED, dataset, recipe, train_run, whole

from steppe.experiments.analysis.verdicts import FLATNESS, read_flatness, verdicts
from steppe.experiments.config.recipe import Run
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import Dataset, Split, load, normalize
from steppe.experiments.data.sampling import FLATNESS_SAMPLE, few_shot, generator, mislabeled
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.execution.launch import start_executor
from steppe.experiments.execution.prepared_task import prepare_task
from steppe.experiments.measuring import jobs, measure_runs
from steppe.experiments.measuring.jobs import MeasuringOptions, Progress
from steppe.experiments.measuring.measure_runs import LineJob, RunJob
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.storage import checkpoint_file
from steppe.experiments.storage.files import write_json
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS, RunFolder
from steppe.experiments.training.run import train
from steppe.flatness import EmpiricalFisher, GaussNewton, Objective, eigenvalues

BUDGET = dataclasses.replace(tiny.BUDGET, points=3)
OPTIONS = MeasuringOptions(samples=24, budget=BUDGET, processes=1)
FIELDS: dict[str, Any] = {"width": 1, "epochs": 2, "seeds": 2, "shots": 4, "label_noise": 0.25}
NAMES = ["sgd-seed0", "sam-seed0", "sgd-seed1", "sam-seed1"]


def trained_folder(path: Path, images: Dataset, **fields: object) -> RunFolder:
    ours, folder = recipe(**FIELDS | fields), RunFolder(path)
    with folder.locked():
        folder.claim(ours, 1)
    for run in ours.runs():
        train_run(run, folder.run(run), images)
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, trained and measured."""
    folder = trained_folder(tmp_path_factory.mktemp("measure") / "run", dataset())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda name, data_dir=None: dataset())
        measure_quietly(folder.path)
    return folder.path


@pytest.fixture
def path(once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run folder, with the data of its training."""
    monkeypatch.setattr(data, "load", lambda name, data_dir=None: dataset())
    return Path(shutil.copytree(once, tmp_path / "run"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the jobs; nothing is measured, which would take long."""
    names: list[str] = []

    def line(job: LineJob, progress: Progress) -> dict[str, Any]:
        names.append(job.name)
        a, b, seed = job.key
        losses = {"axis": [0.0, 1.0], "train": [1.0, 2.0], "test": [1.0, None], "reestimated": True}
        return {"a": a, "b": b, "seed": seed, **losses, "new": True}

    def run(job: RunJob, progress: Progress) -> None:
        names.append(job.name)
        time.sleep(0.01)
        job.path.touch()

    monkeypatch.setattr(jobs, "measure_job", run)
    monkeypatch.setattr(measure_runs, "measure_line", line)
    return names


def measure_quietly(path: Path, options: MeasuringOptions = OPTIONS) -> None:
    measure_runs.measure_runs(path, options, Console(quiet=True))


def written(path: Path, *names: str) -> dict[str, Any]:
    """Read a file without its checksum, so that it can be changed and written again."""
    content: dict[str, Any] = json.loads(path.joinpath(*names, FLATNESS).read_text())
    del content["checksum"]
    return content


def forget_records(run: Path) -> None:
    """Make a run one that has not been measured yet."""
    (run / METRICS).write_text("")
    state = torch.load(run / CHECKPOINT, weights_only=True)
    checkpoint_file.save(run / CHECKPOINT, state["owner"], state | {"records": []})


def network(path: Path, run: Run) -> torch.nn.Module:
    """Return the network of a checkpoint, read without the code under test."""
    made = PreActResNet18(run.recipe.model.width, stem_stride=run.recipe.model.stem_stride, norm=run.recipe.model.norm)
    state = torch.load(RunFolder(path).run(run) / CHECKPOINT, weights_only=True)
    made.load_state_dict(state["model"])
    return made


def objective(path: Path, run: Run, split: Split) -> Objective:
    return Objective(network(path, run), (normalize(split.images), split.labels), loss=F.cross_entropy)


def sample(split: Split, seed: int) -> Split:
    drawn = torch.randperm(len(split), generator=generator(seed, FLATNESS_SAMPLE))[:24]
    return split.select(drawn.sort().values)


def trained_on(run: Run) -> Split:
    return sample(mislabeled(few_shot(dataset().train, 4, run.seed), 0.25, run.seed), run.seed)


def same(path: Path, other: Path) -> bool:
    return [p.read_bytes() for p in sorted(path.rglob(FLATNESS))] == [
        p.read_bytes() for p in sorted(other.rglob(FLATNESS))
    ]


def test_every_run_has_a_file_with_every_measure(path: Path) -> None:
    for name in NAMES:
        found = written(path, "runs", name)
        assert found["format"] == "steppe flatness, version 1"
        assert found["settings"].items() >= OPTIONS.settings().items()
        assert set(found["measures"]) == MEASURED
        assert all(m.keys() <= {"value", "error", "note"} for m in found["measures"].values())
        assert len(found["eigenvalues"]["values"]) == len(found["eigenvalues"]["residuals"]) == 2
        assert (
            [len(row) for row in found["density"]["nodes"]] == [len(row) for row in found["density"]["weights"]] == [3]
        )
        assert found["density"]["n"] == found["settings"]["parameters"]
        for surface in ("landscape", "eigen_landscape"):
            assert [len(row) for row in found[surface]["losses"]] == [3] * len(found[surface]["axis"])


def test_run_folder_has_a_file_with_the_lines_between_its_runs(path: Path) -> None:
    lines = written(path)["lines"]
    assert [(line["a"], line["b"], line["seed"]) for line in lines] == [("sgd", "sam", 0), ("sgd", "sam", 1)]


def test_methods_are_compared_by_pairs_of_runs(path: Path) -> None:
    folder = RunFolder(path)
    (verdict,) = (v.json() for v in verdicts(folder.recipe(), read_flatness(folder, folder.recipe())))
    assert (verdict["method"], verdict["reference"], verdict["runs"]) == ("sam", "sgd", 2)
    values = {name: written(path, "runs", name)["measures"] for name in NAMES}
    assert len(verdict["measures"]) > 10
    for found_of in verdict["measures"]:
        pairs = [(values[f"sam-seed{s}"], values[f"sgd-seed{s}"]) for s in (0, 1)]
        differences = [ours[found_of["name"]]["value"] - theirs[found_of["name"]]["value"] for ours, theirs in pairs]
        assert found_of["difference"]["mean"] == pytest.approx(sum(differences) / 2), found_of["name"]
    assert verdict["sentence"].startswith("SAM's minima against SGD's, 2 paired runs: ")


def test_flatness_is_measured_on_the_images_and_labels_of_the_training(path: Path) -> None:
    for run in RunFolder(path).recipe().runs():
        loss = float(objective(path, run, trained_on(run)).loss())
        assert written(path, "runs", run.name)["measures"]["loss"]["value"] == pytest.approx(loss, rel=1e-6)
        unchanged = sample(few_shot(dataset().train, 4, run.seed), run.seed)
        assert float(objective(path, run, unchanged).loss()) != pytest.approx(loss, rel=1e-5)


def test_line_ends_at_the_losses_of_its_two_networks(path: Path) -> None:
    runs = {run.name: run for run in RunFolder(path).recipe().runs()}
    for line in written(path)["lines"]:
        assert line["reestimated"]
        assert (line["axis"][0], line["axis"][-1], len(line["axis"])) == (0.0, 1.0, len(line["train"]))
        for end, method in ((0, "sgd"), (-1, "sam")):
            run = runs[f"{method}-seed{line['seed']}"]
            for split, on in (("train", trained_on(run)), ("test", sample(dataset().test, 0))):
                there = objective(path, run, on)
                loss = float(there.loss(buffers=there.statistics()))
                assert line[split][end] == pytest.approx(loss, rel=1e-6), (run.name, split)


def test_measured_runs_are_not_measured_again(path: Path, once: Path, measured: list[str]) -> None:
    measure_quietly(path)
    assert measured == []
    assert same(path, once)


def test_runs_and_lines_are_measured_again_with_other_settings(path: Path, measured: list[str]) -> None:
    for options in (
        dataclasses.replace(OPTIONS, samples=20),
        dataclasses.replace(OPTIONS, batch_norm="train"),
        dataclasses.replace(OPTIONS, budget=dataclasses.replace(BUDGET, rho=0.1)),
    ):
        measured.clear()
        measure_quietly(path, options)
        assert measured == [*NAMES, "sgd-seed0 to sam-seed0", "sgd-seed1 to sam-seed1"]


def test_run_that_was_trained_further_is_measured_again(path: Path, measured: list[str]) -> None:
    time.sleep(0.01)
    (path / "runs" / "sgd-seed1" / CHECKPOINT).touch()
    measure_quietly(path)
    assert measured == ["sgd-seed1", "sgd-seed1 to sam-seed1"]
    assert [line.get("new", False) for line in written(path)["lines"]] == [False, True]


def test_lines_are_measured_again_after_an_interrupted_measurement(path: Path, measured: list[str]) -> None:
    time.sleep(0.01)
    for file in (path / "runs").rglob(FLATNESS):  # as if all runs had been measured again before a kill
        file.touch()
    measure_quietly(path)
    assert measured == ["sgd-seed0 to sam-seed0", "sgd-seed1 to sam-seed1"]


def test_lines_begin_at_the_present_reference(path: Path, measured: list[str]) -> None:
    folder = RunFolder(path)
    folder.claim(folder.recipe().replace(methods=("sam", "sgd")), 1)
    measure_quietly(path)
    assert measured == ["sam-seed0 to sgd-seed0", "sam-seed1 to sgd-seed1"]
    assert [(line["a"], line["b"]) for line in written(path)["lines"]] == [("sam", "sgd")] * 2
    found = written(path)
    found["lines"][0]["a"] = "asam"  # the former reference, of three methods
    write_json(path / FLATNESS, found)
    measured.clear()
    measure_quietly(path)
    assert measured == ["sam-seed0 to sgd-seed0"]


def test_unfinished_run_is_left_out_and_named(path: Path, measured: list[str]) -> None:
    forget_records(path / "runs" / "sam-seed1")
    console = Console(file=io.StringIO(), width=200)
    measure_runs.measure_runs(path, OPTIONS, console)
    assert "Not finished, so not measured: sam-seed1" in console.file.getvalue()  # type: ignore[attr-defined]
    assert [line["seed"] for line in written(path)["lines"]] == [0]
    for file in path.rglob(METRICS):
        forget_records(file.parent)
    with pytest.raises(ExperimentError, match="no finished runs.*steppe compare"):
        measure_quietly(path)


def test_measures_with_different_settings_are_not_compared(path: Path) -> None:
    file = path / "runs" / "sam-seed1" / FLATNESS
    changed = written(path, "runs", "sam-seed1")
    changed["settings"]["rho"] = 0.1
    write_json(file, changed)
    folder = RunFolder(path)
    with pytest.raises(ExperimentError, match="measured in different ways.*cannot be compared.*steppe measure"):
        verdicts(folder.recipe(), read_flatness(folder, folder.recipe()))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "steppe flatness, version 1"}', "\x00"])
def test_damaged_file_is_named(path: Path, content: str) -> None:
    file = path / "runs" / "sgd-seed0" / FLATNESS
    file.write_text(content)
    with pytest.raises(ExperimentError, match=r"sgd-seed0.flatness\.json is damaged, of another version.*delete it"):
        measure_quietly(path)


def test_damaged_lines_are_measured_again(path: Path, measured: list[str]) -> None:
    (path / FLATNESS).write_text("{")
    measure_quietly(path)
    assert measured == ["sgd-seed0 to sam-seed0", "sgd-seed1 to sam-seed1"]
    assert [line["seed"] for line in written(path)["lines"]] == [0, 1]


def test_folder_without_finished_runs_raises(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim(recipe(), 1)
    with pytest.raises(ExperimentError, match="no finished runs.*run steppe compare first"):
        measure_quietly(folder.path)
    with pytest.raises(ExperimentError, match="not a run folder"):
        measure_quietly(tmp_path)


@pytest.mark.parametrize(
    "error", [FloatingPointError("the loss is nan"), ValueError("m=0"), RuntimeError("no\nsecond")]
)
def test_failed_measure_is_reported_on_one_line(path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(jobs, "measure", fails)
    (path / "runs" / "sam-seed0" / FLATNESS).unlink()
    with pytest.raises(ExperimentError, match=f"^sam-seed0: {' '.join(str(error).split())}$") as raised:
        measure_quietly(path)
    assert raised.value.__cause__ is error


def test_samples_are_limited_to_the_training_set_and_recorded(path: Path) -> None:
    for run in RunFolder(path).recipe().runs():
        if run.name != "sgd-seed0":
            shutil.rmtree(RunFolder(path).run(run))
    options = dataclasses.replace(OPTIONS, samples=256, budget=dataclasses.replace(BUDGET, m=64, points=0))
    measure_quietly(path, options)
    found = written(path, "runs", "sgd-seed0")
    assert (found["settings"]["samples"], found["settings"]["m"]) == (40, 40)
    assert found["measures"]["m_sharpness"]["value"] == found["measures"]["sharpness"]["value"]
    before = (path / "runs" / "sgd-seed0" / FLATNESS).stat().st_mtime_ns
    measure_quietly(path, options)
    assert (path / "runs" / "sgd-seed0" / FLATNESS).stat().st_mtime_ns == before


@pytest.mark.slow
def test_gauss_newton_and_fisher_matrices_are_those_of_the_restored_network(path: Path) -> None:
    first, *others = RunFolder(path).recipe().runs()
    for run in others:
        shutil.rmtree(RunFolder(path).run(run))
    budget = dataclasses.replace(BUDGET, points=0, tol=1e-3, further="gauss_newton,fisher")
    measure_quietly(path, dataclasses.replace(OPTIONS, budget=budget))
    found, own = written(path, "runs", first.name)["measures"], objective(path, first, trained_on(first))
    for name, matrix in (("gauss_newton", GaussNewton), ("fisher", EmpiricalFisher)):
        value = float(eigenvalues(matrix(own), tol=1e-3).values[0])
        assert found[name]["value"] == pytest.approx(value, rel=1e-2), name


@pytest.mark.slow
def test_worker_processes_measure_the_same_and_keep_results_when_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(monkeypatch)  # as the workers make the network, and load the sample, themselves
    folder = trained_folder(tmp_path / "run", load("sample"), shots=1, seeds=1, label_noise=0.0)
    other = Path(shutil.copytree(folder.path, tmp_path / "other"))
    options = dataclasses.replace(OPTIONS, samples=10)
    measure_quietly(folder.path, options)
    damaged = other / "runs" / "sam-seed0" / CHECKPOINT
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-100])
    with pytest.raises(ExperimentError, match=r"sam-seed0.checkpoint\.pt is damaged"):
        measure_quietly(other, dataclasses.replace(options, processes=2))
    ours, theirs = (written(path, "runs", "sgd-seed0") for path in (folder.path, other))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert not (other / FLATNESS).exists()


@pytest.fixture
def own_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "load", lambda name, data_dir=None: dataset())
    ours = recipe(backbone="own", pretrain_on="sample", pretrain_epochs=1, dataset="digits", width=1, epochs=1)
    ours = ours.replace(methods=("sgd",), channels_last=True, eval_every=1)
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), start_executor(ours, ExecutionOptions(), Console(quiet=True)) as executor:
        folder.claim(ours, 1)
        made = prepare_task(executor, folder.path, Console(quiet=True))
    (run,) = ours.runs()
    train(run, folder.run(run), made(ours), CPU)
    yield folder
    torch.set_num_threads(1)


def test_backbone_of_the_training_is_restored_on_any_number_of_threads(
    own_backbone: RunFolder, once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored: list[torch.nn.Module] = []

    def restore(job: RunJob, progress: Progress) -> None:
        restored.append(job.restore().network)
        shutil.copy(once / "runs" / "sgd-seed0" / FLATNESS, job.path)

    monkeypatch.setattr(jobs, "measure_job", restore)
    torch.set_num_threads(2)
    console = Console(file=io.StringIO(), width=200)
    measure_runs.measure_runs(own_backbone.path, OPTIONS, console)
    assert "Pretraining" not in console.file.getvalue()  # type: ignore[attr-defined]
    (run,) = own_backbone.recipe().runs()
    state = torch.load(own_backbone.run(run) / CHECKPOINT, weights_only=True)["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in restored[0].state_dict().items())
