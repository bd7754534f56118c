"""`steppe measure RUN`: what it writes, when it measures again, and that it measures what was trained, as it was."""

import dataclasses
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import CPU, dataset, recipe

from steppe.experiments.config.recipe import Run
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import Dataset, Split, load, normalize
from steppe.experiments.data.few_shot import few_shot
from steppe.experiments.data.label_noise import mislabeled
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution import pool
from steppe.experiments.execution.pool import Tell, pooled
from steppe.experiments.measuring import measure
from steppe.experiments.measuring.measure import FLATNESS, Measuring, Sampling, measure_run, measured, verdicts
from steppe.experiments.models.preact_resnet import preact_resnet18
from steppe.experiments.storage.files import write_json
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS, RunFolder
from steppe.experiments.training.pretraining import with_start
from steppe.experiments.training.run import train
from steppe.experiments.training.sharpness import flatness_sample
from steppe.flatness import FAMILIES, Budget, Objective

EFFORT = Budget(
    m=8, steps=1, restarts=1, pairs=2, top=2, tol=0.5, probes=2, density_probes=1, density_steps=3, points=3
)
HOW = Measuring(Sampling(samples=24), EFFORT, processes=1)
OPTIONS: dict[str, Any] = {"width": 1, "epochs": 2, "seeds": 2, "shots": 4, "label_noise": 0.25}
NAMES = ["sgd-seed0", "sam-seed0", "sgd-seed1", "sam-seed1"]


def trained_folder(path: Path, images: Dataset, **fields: object) -> RunFolder:
    ours, folder = recipe(**OPTIONS | fields), RunFolder(path)
    with folder.locked():
        folder.claim(ours, 1)
    for run in ours.runs():
        train(run, folder.run(run), images, CPU)
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained and measured."""
    folder = trained_folder(tmp_path_factory.mktemp("measure") / "run", dataset())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda name, data_dir=None: dataset())
        measure_run(folder.path, HOW, Console(quiet=True))
    return folder.path


@pytest.fixture
def path(once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy for each test, with the data that it was trained on."""
    monkeypatch.setattr(data, "load", lambda name, data_dir=None: dataset())
    return Path(shutil.copytree(once, tmp_path / "run"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what would be measured; nothing is, or the test would take long."""
    names: list[str] = []

    def line(job: Any, tell: Tell) -> dict[str, Any]:
        names.append(job.name)
        return {"a": job.other.method, "b": job.run.method, "seed": job.run.seed, "new": True}

    def run(job: Any, tell: Tell) -> None:
        names.append(job.name)
        time.sleep(0.01)
        (RunFolder(job.path).run(job.run) / FLATNESS).touch()

    monkeypatch.setattr(measure, "_measure", run)
    monkeypatch.setattr(measure, "_line", line)
    return names


def quietly(path: Path, how: Measuring = HOW) -> None:
    measure_run(path, how, Console(quiet=True))


def written(path: Path, *names: str) -> dict[str, Any]:
    return json.loads(path.joinpath(*names, FLATNESS).read_text())  # type: ignore[no-any-return]


def network(path: Path, run: Run) -> torch.nn.Module:
    """As its checkpoint has it, read without the code under test."""
    made = preact_resnet18(run.recipe.width, stem_stride=run.recipe.stem_stride, norm=run.recipe.norm)
    state = torch.load(RunFolder(path).run(run) / CHECKPOINT, weights_only=True)
    made.load_state_dict(state["model"])
    return made


def objective(path: Path, run: Run, split: Split) -> Objective:
    return Objective(network(path, run), (normalize(split.images), split.labels), loss=F.cross_entropy)


def trained_on(run: Run) -> Split:
    return flatness_sample(mislabeled(few_shot(dataset().train, 4, run.seed), 0.25, run.seed), 24, run.seed)


def same(path: Path, other: Path) -> bool:
    return [p.read_bytes() for p in sorted(path.rglob(FLATNESS))] == [
        p.read_bytes() for p in sorted(other.rglob(FLATNESS))
    ]


def test_a_file_for_each_run_with_every_measure(path: Path) -> None:
    for name in NAMES:
        found = written(path, "runs", name)
        assert found["format"] == "steppe flatness, version 1"
        assert found["settings"].items() >= HOW.settings().items()
        assert set(found["measures"]) == {name for family in FAMILIES.values() for name in family.measures}
        assert all(m.keys() <= {"value", "error", "note"} for m in found["measures"].values())
        assert len(found["eigenvalues"]["values"]) == len(found["eigenvalues"]["residuals"]) == 2
        assert (
            [len(row) for row in found["density"]["nodes"]] == [len(row) for row in found["density"]["weights"]] == [3]
        )
        assert found["density"]["n"] == found["settings"]["parameters"]
        for surface in ("landscape", "eigen_landscape"):
            assert [len(row) for row in found[surface]["losses"]] == [3] * len(found[surface]["axis"])


def test_and_one_for_the_lines_between_them(path: Path) -> None:
    lines = written(path)["lines"]
    assert [(line["a"], line["b"], line["seed"]) for line in lines] == [("sgd", "sam", 0), ("sgd", "sam", 1)]


def test_contenders_are_compared_run_by_run(path: Path) -> None:
    folder = RunFolder(path)
    (verdict,) = (v.json() for v in verdicts(folder.recipe(), measured(folder, folder.recipe())))
    assert (verdict["method"], verdict["reference"], verdict["runs"]) == ("sam", "sgd", 2)
    values = {name: written(path, "runs", name)["measures"] for name in NAMES}
    assert len(verdict["measures"]) > 10
    for found_of in verdict["measures"]:
        pairs = [(values[f"sam-seed{s}"], values[f"sgd-seed{s}"]) for s in (0, 1)]
        differences = [ours[found_of["name"]]["value"] - theirs[found_of["name"]]["value"] for ours, theirs in pairs]
        assert found_of["difference"]["mean"] == pytest.approx(sum(differences) / 2), found_of["name"]
    assert verdict["sentence"].startswith("SAM's minima against SGD's, 2 paired runs: ")


def test_it_is_measured_on_what_was_trained_on(path: Path) -> None:
    for run in RunFolder(path).recipe().runs():
        loss = float(objective(path, run, trained_on(run)).loss())
        assert written(path, "runs", run.name)["measures"]["loss"]["value"] == pytest.approx(loss, rel=1e-6)
        clean = flatness_sample(few_shot(dataset().train, 4, run.seed), 24, run.seed)
        assert float(objective(path, run, clean).loss()) != pytest.approx(loss, rel=1e-5)


def test_a_line_ends_at_the_losses_of_its_two_networks(path: Path) -> None:
    runs = {run.name: run for run in RunFolder(path).recipe().runs()}
    for line in written(path)["lines"]:
        assert line["reestimated"]
        assert (line["axis"][0], line["axis"][-1], len(line["axis"])) == (0.0, 1.0, len(line["train"]))
        for end, method in ((0, "sgd"), (-1, "sam")):
            run = runs[f"{method}-seed{line['seed']}"]
            for split, on in (("train", trained_on(run)), ("test", flatness_sample(dataset().test, 24, 0))):
                there = objective(path, run, on)
                loss = float(there.loss(buffers=there.statistics()))
                assert line[split][end] == pytest.approx(loss, rel=1e-6), (run.name, split)


def test_what_is_measured_is_not_measured_again(path: Path, once: Path, asked: list[str]) -> None:
    quietly(path)
    assert asked == []
    assert same(path, once)


def test_with_other_settings_it_is_and_its_lines_too(path: Path, asked: list[str]) -> None:
    for how in (
        dataclasses.replace(HOW, sampling=Sampling(samples=20)),
        dataclasses.replace(HOW, sampling=Sampling(samples=24, batch_norm="train")),
        dataclasses.replace(HOW, budget=dataclasses.replace(EFFORT, rho=0.1)),
    ):
        asked.clear()
        quietly(path, how)
        assert asked == [*NAMES, "sgd-seed0 to sam-seed0", "sgd-seed1 to sam-seed1"]


def test_a_run_that_was_trained_on_since_is_measured_again(path: Path, asked: list[str]) -> None:
    time.sleep(0.01)
    (path / "runs" / "sgd-seed1" / CHECKPOINT).touch()
    quietly(path)
    assert asked == ["sgd-seed1", "sgd-seed1 to sam-seed1"]
    assert [line.get("new", False) for line in written(path)["lines"]] == [False, True]


def test_lines_of_a_measurement_that_was_cut_short_are_made_anew(path: Path, asked: list[str]) -> None:
    time.sleep(0.01)
    for file in (path / "runs").rglob(FLATNESS):  # every run has been measured again; then the machine went down
        file.touch()
    quietly(path)
    assert asked == ["sgd-seed0 to sam-seed0", "sgd-seed1 to sam-seed1"]


def test_lines_begin_at_the_reference_of_now(path: Path, asked: list[str]) -> None:
    folder = RunFolder(path)
    folder.claim(dataclasses.replace(folder.recipe(), methods=("sam", "sgd")), 1)
    quietly(path)
    assert asked == ["sam-seed0 to sgd-seed0", "sam-seed1 to sgd-seed1"]
    assert [(line["a"], line["b"]) for line in written(path)["lines"]] == [("sam", "sgd")] * 2
    found = written(path)
    found["lines"][0]["a"] = "asam"  # the reference of before, with three methods
    write_json(path / FLATNESS, found)
    asked.clear()
    quietly(path)
    assert asked == ["sam-seed0 to sgd-seed0"]


def test_a_run_that_is_not_finished_is_left_out_and_told_of(path: Path, asked: list[str]) -> None:
    metrics = path / "runs" / "sam-seed1" / METRICS
    metrics.write_text("")
    console = Console(file=io.StringIO(), width=200)
    measure_run(path, HOW, console)
    assert "Not finished, so not measured: sam-seed1" in console.file.getvalue()  # type: ignore[attr-defined]
    assert [line["seed"] for line in written(path)["lines"]] == [0]
    for file in path.rglob(METRICS):
        file.write_text("")
    with pytest.raises(ExperimentError, match="no finished runs.*steppe compare"):
        quietly(path)


def test_numbers_of_different_settings_are_not_compared(path: Path) -> None:
    file = path / "runs" / "sam-seed1" / FLATNESS
    changed = written(path, "runs", "sam-seed1")
    changed["settings"]["rho"] = 0.1
    write_json(file, changed)
    folder = RunFolder(path)
    with pytest.raises(ExperimentError, match="measured in different ways.*cannot be compared.*steppe measure"):
        verdicts(folder.recipe(), measured(folder, folder.recipe()))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "steppe flatness, version 1"}', "\x00"])
def test_a_damaged_file_is_named(path: Path, content: str) -> None:
    file = path / "runs" / "sgd-seed0" / FLATNESS
    file.write_text(content)
    with pytest.raises(ExperimentError, match=r"sgd-seed0.flatness\.json is damaged or of another version.*delete it"):
        quietly(path)


def test_damaged_lines_are_made_anew(path: Path, asked: list[str]) -> None:
    (path / FLATNESS).write_text("{")
    quietly(path)
    assert asked == ["sgd-seed0 to sam-seed0", "sgd-seed1 to sam-seed1"]
    assert [line["seed"] for line in written(path)["lines"]] == [0, 1]


def test_without_trained_runs_there_is_nothing_to_measure(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim(recipe(), 1)
    with pytest.raises(ExperimentError, match="no finished runs.*run steppe compare first"):
        quietly(folder.path)
    with pytest.raises(ExperimentError, match="not a run folder"):
        quietly(tmp_path)


@pytest.mark.parametrize(
    "error", [FloatingPointError("the loss is nan"), ValueError("m=0"), RuntimeError("no\nsecond")]
)
def test_what_cannot_be_measured_is_one_clear_line(
    path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(measure, "measure", fails)
    (path / "runs" / "sam-seed0" / FLATNESS).unlink()
    with pytest.raises(ExperimentError, match=f"^sam-seed0: {' '.join(str(error).split())}$") as raised:
        quietly(path)
    assert raised.value.__cause__ is error


def test_fewer_images_than_were_asked_for_are_said_to_be_fewer(path: Path) -> None:
    for run in RunFolder(path).recipe().runs():
        if run.name != "sgd-seed0":
            shutil.rmtree(RunFolder(path).run(run))
    how = dataclasses.replace(HOW, sampling=Sampling(), budget=dataclasses.replace(EFFORT, m=64, points=0))
    quietly(path, how)
    found = written(path, "runs", "sgd-seed0")
    assert (found["settings"]["samples"], found["settings"]["m"]) == (40, 40)
    assert found["measures"]["m_sharpness"]["value"] == found["measures"]["sharpness"]["value"]
    before = (path / "runs" / "sgd-seed0" / FLATNESS).stat().st_mtime_ns
    quietly(path, how)
    assert (path / "runs" / "sgd-seed0" / FLATNESS).stat().st_mtime_ns == before


@pytest.mark.slow
def test_another_process_measures_the_same_and_what_it_finds_is_kept_where_one_fails(tmp_path: Path) -> None:
    # theirs is the real sample: they load it themselves
    folder = trained_folder(tmp_path / "run", load("sample"), shots=1, seeds=1, label_noise=0.0)
    other = Path(shutil.copytree(folder.path, tmp_path / "other"))
    how = dataclasses.replace(HOW, sampling=Sampling(samples=10))
    quietly(folder.path, how)
    damaged = other / "runs" / "sam-seed0" / CHECKPOINT
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-100])
    with pytest.raises(ExperimentError, match=r"sam-seed0.checkpoint\.pt is damaged"):
        quietly(other, dataclasses.replace(how, processes=2))
    ours, theirs = (written(at, "runs", "sgd-seed0") for at in (folder.path, other))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert not (other / FLATNESS).exists()


@pytest.fixture
def own_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "load", lambda name, data_dir=None: dataset())
    ours = recipe(backbone="own", pretrain_on="sample", pretrain_epochs=1, dataset="digits", width=1, epochs=1)
    ours = dataclasses.replace(ours, methods=("sgd",), channels_last=True, eval_every=1)
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), measure.start(ours, measure.ExecutionOptions(), Console(quiet=True)) as executor:
        folder.claim(ours, 1)
        images = with_start(dataset(), executor, folder.path, Console(quiet=True))
    (run,) = ours.runs()
    train(run, folder.run(run), images, CPU)
    yield folder
    torch.set_num_threads(1)


def test_a_backbone_is_the_one_that_was_trained_from_on_any_number_of_threads(
    own_backbone: RunFolder, once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored: list[torch.nn.Module] = []

    def restore(job: Any, tell: Tell) -> None:
        restored.append(measure._restored(job, job.run).network)
        shutil.copy(once / "runs" / "sgd-seed0" / FLATNESS, RunFolder(job.path).run(job.run) / FLATNESS)

    monkeypatch.setattr(measure, "_measure", restore)
    torch.set_num_threads(2)
    console = Console(file=io.StringIO(), width=200)
    measure_run(own_backbone.path, HOW, console)
    assert "Pretraining" not in console.file.getvalue()  # type: ignore[attr-defined]
    (run,) = own_backbone.recipe().runs()
    state = torch.load(own_backbone.run(run) / CHECKPOINT, weights_only=True)["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in restored[0].state_dict().items())


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"batch_size": -1}])
def test_samples_are_at_least_one(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*at least one"):
        Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="processes=0"):
        Measuring(processes=0)


# Several at a time


def squared(job: int, tell: Tell) -> int:
    tell("squaring", 1)
    if job < 0:
        raise ExperimentError(f"{job} is negative")
    return job * job


def test_results_come_in_the_order_of_the_jobs() -> None:
    console = Console(file=io.StringIO(), width=200)
    assert pooled(squared, [(f"job {n}", n) for n in range(4)], 1, console) == [0, 1, 4, 9]
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.partition(":")[0] for line in lines] == [f"job {n}" for n in range(4)]
    assert lines[-1].endswith("(4 of 4)")
    assert pooled(squared, [], 2, console) == []


def test_an_error_of_a_job_is_the_error_of_all() -> None:
    with pytest.raises(ExperimentError, match="-1 is negative"):
        pooled(squared, [("bad", -1), ("good", 1)], 1, Console(quiet=True))


def test_what_comes_late_of_a_job_that_is_done_leaves_no_line() -> None:
    screen = pool._Screen(2, Console(file=io.StringIO(), force_terminal=True, width=100))
    screen.say("a", "climbing", 1)
    screen.say("b", "climbing", 1)
    screen.done("a")
    screen.say("a", "climbing", 2)
    assert list(screen._tasks) == ["b"]
