"""benchmarks/gpu/train.py: a training is interrupted anywhere and resumed to the same bits."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
from gpu_support import arguments, write_result

from evidence.recipes import EVIDENCE, WRONG_LABELS
from gpu import measurements, rehearsal, table, train
from gpu.device_results import DeviceResults
from gpu.measurements import WITHOUT_GRAPHS, Training
from results import Result
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.errors import ExperimentError
from steppe.experiments.training.stopping import Stopped

NOT_INSTALLED = ("tyro", "ray", "optuna", "expecttest", "selenium", "tensorboard", "lightning")
"""Packages that a machine with a GPU does not need."""


@pytest.fixture
def hidden_packages(tmp_path, monkeypatch):
    """Child processes that cannot import NOT_INSTALLED."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {NOT_INSTALLED}:\n"
        "            raise ImportError(f'{name} is hidden')\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    done = subprocess.run([sys.executable, "-c", "import tyro"], capture_output=True, text=True, check=False)
    assert "tyro is hidden" in done.stderr


@pytest.fixture
def shallow(monkeypatch):
    """Networks of two blocks and few images, in this process."""
    tiny.shallow(monkeypatch)
    monkeypatch.setattr(train, "_TINY_IMAGES", 128)


def without_times(runs):
    """Remove from runs what differs between any two of them."""
    for run in runs:
        for record in run["records"]:
            del record["seconds"], record["images_per_second"]
        for measured in run.get("flatness", {}).values():
            del measured["seconds"]
    return runs


def planned(name: str) -> Training:
    (training,) = [each.training for each in measurements.measurements() if each.name == name]
    return training


@pytest.mark.slow
@pytest.mark.usefixtures("hidden_packages")
def test_interrupted_rehearsal_has_the_bits_of_an_uninterrupted_training(tmp_path, capsys):
    assert rehearsal.rehearse(["article-0"], keep=tmp_path / "kept") == 0
    output = capsys.readouterr().out
    assert "article-0: not finished" in output
    assert "| SAM | 3 | 2.00 |" in output, "the table is rendered"
    assert "1 of 1 measurements, 2 figures" in output
    found = json.loads((tmp_path / "kept" / "a-rehearsal" / "article-0.json").read_text())
    assert found["command"] == "python benchmarks/gpu/run.py --only article-0"
    assert found["data"]["calls"] == 2, "it was stopped once"
    straight = train.TrainingRuns("article-0", train.tiny(planned("article-0")), DeviceResults(arguments(tmp_path)))
    straight.train()
    expected = straight.result()
    assert without_times(found["data"]["runs"]) == without_times(expected["runs"])
    assert found["data"]["recipes"] == expected["recipes"]
    sgd, sam = expected["runs"]
    assert (list(sgd["flatness"]), list(sam["flatness"])) == (["2"], ["2", "3"]), "at equal compute and at the end"
    assert sam["flatness"]["2"]["measures"]["lambda_max"] != sam["flatness"]["3"]["measures"]["lambda_max"]
    assert not list(straight.folder.rglob("checkpoint.pt")), "weights are deleted when everything is measured"


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_flatness_at_equal_compute_is_that_of_a_run_that_ends_there(tmp_path):
    longer = train.tiny(replace(planned("article-0"), methods=("sam",)))
    found = []
    for name, training in (("longer", longer), ("shorter", replace(longer, extra_epochs=0))):
        runs = train.TrainingRuns(name, training, DeviceResults(arguments(tmp_path)))
        runs.train()
        found.append(runs.result()["runs"][0]["flatness"]["2"]["measures"])
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("checkpoint_lost", [False, True])
def test_interruption_during_flatness_loses_nothing(tmp_path, monkeypatch, checkpoint_lost):
    def interrupted(*args, **kwargs):
        raise Stopped(signal.SIGTERM)

    training = train.tiny(replace(planned("article-0"), methods=("sam",)))
    device = DeviceResults(arguments(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(train, "flatness", interrupted)
        with pytest.raises(Stopped):
            train.TrainingRuns("interrupted", training, device).train()
    (checkpoint,) = device.run_folder("interrupted").rglob("checkpoint.pt")
    if checkpoint_lost:
        checkpoint.unlink()
    found = []
    for name in ("interrupted", "straight"):
        runs = train.TrainingRuns(name, training, device)
        runs.train()
        found.append(without_times(runs.result()["runs"]))
    assert found[0] == found[1]
    assert "failed" not in str(found[0])


@pytest.mark.usefixtures("shallow")
def test_failed_run_does_not_stop_the_others(tmp_path, monkeypatch):
    device = DeviceResults(arguments(tmp_path))
    runs = train.TrainingRuns("two", train.tiny(Training(("sgd", "sam"))), device)
    real = train.train

    def fail_for_sgd(run, *args):
        if str(run.method) == "sgd":
            raise ExperimentError("it diverged")
        return real(run, *args)

    monkeypatch.setattr(train, "train", fail_for_sgd)
    runs.train()
    sgd, sam = runs.result()["runs"]
    assert sgd["failed"] == "it diverged"
    assert [record["standardized_epoch"] for record in sam["records"]] == [1, 2]


def test_fastest_working_loop_is_used_and_kept(tmp_path):
    device = DeviceResults(arguments(tmp_path, tiny=False))

    def configuration(name: str) -> dict:
        return train.TrainingRuns(name, Training(), device).plan["configuration"]

    assert configuration("nothing measured") == {"channels_last": True}
    fastest = {"amp": True, "channels_last": False, "compile": False, "cuda_graphs": True, "fused": True}
    write_result(device, "loop", {"fastest": fastest})
    first = configuration("article-0")
    assert first == {"amp": True, "channels_last": False, "cuda_graphs": True}
    write_result(device, "loop", {"fastest": {**fastest, "amp": False, "compile": True, "cuda_graphs": False}})
    assert configuration("article-0") == first, "another configuration would lose the checkpoint"
    assert configuration("article-1") == {"amp": False, "channels_last": False}, "no graphs without the compiler"
    (device.run_folder("article-0") / WITHOUT_GRAPHS).touch()
    plain = configuration("article-0")
    assert plain == {"amp": False, "channels_last": False, "cuda_graphs": False}
    write_result(device, "loop", {"fastest": None})
    assert configuration("article-0") == plain


def test_number_of_epochs_fits_the_time(tmp_path):
    device = DeviceResults(arguments(tmp_path, tiny=False))
    ends = [
        {"records": [{"seconds": 75.0, "standardized_epoch": 150}]},
        {"records": [{"seconds": 625.0, "standardized_epoch": 200}]},
    ]
    training = Training(("sgd", "sam"), minutes=10, eval_every=10)  # two seconds per pass: 300 passes, 150 each
    write_result(device, "article-0", {"runs": ends})
    assert train.TrainingRuns("enough", training, device).plan["epochs"] == 150
    fewer = train.TrainingRuns("fewer", replace(training, methods=("sgd", "sam", "asam")), device).plan
    assert fewer["epochs"] == 100
    assert "100 of 150 standardized epochs, for 10 minutes at 2 s per pass" in fewer["fewer_epochs"]
    write_result(device, "fewer", fewer)
    assert train.TrainingRuns("same", replace(training, same_epochs_as="fewer"), device).plan["epochs"] == 100


def test_controls_count_by_their_part_of_the_time(tmp_path):
    device = DeviceResults(arguments(tmp_path, tiny=False))
    write_result(device, "article-0", {"runs": [{"records": [{"seconds": 300.0, "standardized_epoch": 150}]}]})
    training = Training(("sgd", "sam"), recipe="annealed", minutes=10, eval_every=1)  # 300 passes for 2 1/2 runs
    assert train.TrainingRuns("controlled", training, device).plan["epochs"] == 120


@pytest.mark.parametrize("name", measurements.EVIDENCE)
def test_evidence_differs_from_the_recipe_by_its_size(tmp_path, name):
    runs = train.TrainingRuns(f"{name}-1", planned(f"{name}-1"), DeviceResults(arguments(tmp_path, tiny=False)))
    recipe, article = (RECIPES[each][0] for each in (name, "article"))
    found = dict(runs.recipes())
    for setting, fields in planned(f"{name}-1").settings.items():
        chosen, usual = found[setting].options(), recipe.options()
        changed = {option for option, value in chosen.items() if value != usual[option]} - set(fields)
        size = {"dataset", "batch_size", *(() if name == "vit" else ("width", "stem_stride"))}
        about_runs = {"epochs", "eval_every", "first_seed", "seeds", "device", "amp", "cuda_graphs", "threads"}
        assert size <= changed <= size | about_runs | {"channels_last"}
        assert {option: chosen[option] for option in size} == {option: article.options()[option] for option in size}
        assert {option: chosen[option] for option in fields} == fields
        methods = [*recipe.comparison.methods, *recipe.controls()]
        assert [(run.method, run.seed) for run in found[setting].runs()] == [(method, 1) for method in methods]


def test_wrong_labels_are_those_of_the_evidence():
    options = {setting: ("--label-noise", str(share)) for setting, share in WRONG_LABELS.items()}
    assert options == {setting: tuple(found) for setting, found in EVIDENCE["noisy-labels"].settings.items()}


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_runs_and_controls_are_measured_on_corrupted_images_and_rendered(tmp_path):
    training = train.tiny(replace(planned("vit-0"), settings={"": {}, "20 % wrong": {"label_noise": 0.2}}))
    sam = str(RECIPES["vit"][0].comparison.methods[1])
    runs = train.TrainingRuns("vit-0", training, DeviceResults(arguments(tmp_path)))
    runs.train()
    found = runs.result()
    assert [run["method"] for run in found["runs"]] == ["adamw", sam, "adamw@1/2"] * 2
    assert all("test_accuracy under corruptions" in run["records"][-1] for run in found["runs"])
    text = table.training([Result("vit-0", "a device", False, "2026-11-29", "run.py", "2.13.0", {}, found)])
    label = MethodSpec.parse(sam).label
    assert text.count(f"| {label} | 2 | 2.00 |") == 2
    assert text.count(f"{label} at equal steps") == 2
    assert text.count("| method | all corrupted |") == 2
    assert "20 % wrong training labels" in text
    assert "#" not in text


def test_presets_are_trained_with_their_specs(monkeypatch):
    assert measurements.measurements()[-1].training.methods[:2] == ("sgd", "sam")
    assert measurements.measurements()[-1].training.methods[2:] == measurements.PRESETS
    monkeypatch.setattr(measurements, "PRESETS", ("preset:rho=0.1,interval=5",))
    (presets,) = [each for each in measurements.measurements() if each.name == "presets"]
    train.register()
    passes = [MethodSpec.parse(method).passes for method in presets.training.methods]
    assert passes == [1, 2, pytest.approx(1.2)]
