import io
import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import MEASURED
from user_code import BUDGET, CODE, data, go, loss, measured_names, net, user_folder, weights, written

from steppe.experiments.errors import ExperimentError
from steppe.experiments.figures import flatness as flatness_figures
from steppe.experiments.measuring import jobs, user_model
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.experiments.measuring.user_model import UserModel, measure_user_model
from steppe.flatness import Budget, Objective

__all__ = ["measured_names", "user_folder"]  # fixtures


def test_file_of_weights_is_measured_with_all_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_model, "draw", flatness_figures.draw)
    output = go(weights=weights(1))
    found = written("w1")
    assert set(found["measures"]) == MEASURED
    assert found["measures"]["loss"]["value"] == pytest.approx(loss(1), rel=1e-6)
    assert (
        found["settings"].items()
        >= {"samples": 30, "model": "user_module:net", "data": "user_module:pair", "m": 4}.items()
    )
    assert max(map(len, output.splitlines())) <= 80
    summary = Path("flatness", "summary.md").read_text()
    value = f"{found['measures']['gradient_norm']['value']:.4g}"
    assert f"| gradient norm | {value} |  |" in summary
    trace = found["measures"]["trace"]
    assert f"| Hessian trace | {trace['value']:.4g} ± {trace['error']:.2g} |" in summary
    assert any(line.split()[:3] == ["gradient", "norm", value] for line in output.splitlines())
    assert Path("flatness", "figures", "spectra.png").exists()


def test_network_is_measured_as_its_factory_makes_it_without_weights() -> None:
    go()
    first = written("net")["measures"]
    torch.rand(1)
    go(out=Path("again"))  # a factory that draws its weights draws the same ones
    assert json.loads(Path("again", "net.json").read_text())["measures"] == first
    go("ready_made")
    assert written("ready_made")["measures"]["loss"]["value"] != first["loss"]["value"]


@pytest.mark.parametrize("given", ["dataset", "loader"])
def test_datasets_and_loaders_give_the_same_data_as_tensors(given: str) -> None:
    go(data=given, weights=weights(1))
    found = written("w1")
    assert found["settings"]["samples"] == 30
    assert found["measures"]["loss"]["value"] == pytest.approx(loss(1), rel=1e-6)


def test_samples_are_drawn_by_the_seed_from_tensors_and_datasets_alike() -> None:
    (w,) = weights(1)
    go(weights=(w,), samples=10)
    first = written("w1")
    go(weights=(w,), samples=10, data="dataset")
    assert first["settings"]["samples"] == 10
    assert written("w1")["measures"]["loss"]["value"] == pytest.approx(first["measures"]["loss"]["value"], rel=1e-6)
    chosen = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:10]
    x, y = data()
    there = Objective(net(1), (x[chosen], y[chosen]), loss=F.cross_entropy)
    assert first["measures"]["loss"]["value"] == pytest.approx(float(there.loss()), rel=1e-6)


def test_m_is_limited_to_the_batch_size() -> None:
    console = Console(quiet=True)
    given = UserModel("user_module:net", "user_module:loader", weights=weights(1))
    measure_user_model(given, MeasuringOptions(budget=Budget(**{**vars(BUDGET), "m": 64})), console)
    assert written("w1")["settings"]["m"] == 7


def test_own_evaluation_takes_batches_of_any_form() -> None:
    go(data="dicts", evaluate="of_dicts", weights=weights(1))
    found = written("w1")
    assert found["measures"]["loss"]["value"] == pytest.approx(loss(1), rel=1e-6)
    assert not any(name.startswith("normalized") for name in found["measures"])


@pytest.mark.parametrize(
    ("evaluate", "further", "message"),
    [
        ("with_outputs", "gauss_newton,fisher,by_layer", None),
        ("of_dicts", "fisher", r"^w1: .*needs the model's outputs.*return \(loss, outputs\)"),
        ("of_dicts", "adam_sharpness", "^w1: adam_sharpness .* measure the runs of a folder"),
    ],
)
def test_further_measures_of_files_or_an_error_before_the_first(
    evaluate: str, further: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = UserModel("user_module:net", "user_module:dicts", weights(1), evaluate=f"user_module:{evaluate}")
    options = MeasuringOptions(budget=Budget(**{**vars(BUDGET), "further": further}), processes=1)
    if message is None:
        console = Console(file=io.StringIO(), width=80)
        measure_user_model(given, options, console)
        found = written("w1")["measures"]
        assert {"gauss_newton", "fisher_trace", "lambda_max/0"} <= found.keys()
        row = f"| 0: largest eigenvalue | {found['lambda_max/0']['value']:.4g} ± "
        assert row in Path("flatness", "summary.md").read_text()
        assert "0: largest eigenvalue" in console.file.getvalue()  # type: ignore[attr-defined]
    else:
        monkeypatch.setattr(jobs, "measure_job", lambda job, progress: pytest.fail("the measurement has begun"))
        with pytest.raises(ExperimentError, match=message):
            measure_user_model(given, options, Console(quiet=True))


@pytest.mark.parametrize(
    ("model", "given", "by", "there"),
    [
        ("net", "pair", "torch.nn.functional:cross_entropy", True),
        ("net", "pair", "torch.nn:CrossEntropyLoss", True),
        ("net", "real_targets", "torch.nn.functional:cross_entropy", True),
        ("net", "real_targets", "torch.nn:MSELoss", False),
        ("two_classes", "in_two_classes", "torch.nn.functional:cross_entropy", False),
    ],
)
def test_normalized_logits_are_measured_for_classifiers_only(
    model: str, given: str, by: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_normalized: list[bool] = []

    def measure(objective: Objective, budget: Budget, *, normalized: Objective | None, optimizer: None) -> None:
        given_normalized.append(normalized is not None)
        raise ValueError("enough")

    monkeypatch.setattr(jobs, "measure", measure)
    with pytest.raises(ExperimentError, match="enough"):
        go(model, given, loss=by)
    assert given_normalized == [there]


@pytest.mark.slow
def test_measures_of_the_same_weights_data_and_settings_are_kept(measured_names: list[str]) -> None:
    files = weights(1, 2)
    go(weights=files)
    go(weights=files)
    assert measured_names == ["w1", "w2"]
    torch.save(net(7).state_dict(), files[0])
    go(weights=files)
    assert measured_names == ["w1", "w2", "w1"]
    go(weights=files, samples=20)
    assert measured_names[3:] == ["w1", "w2"]
    Path("user_module.py").write_text(CODE.replace("manual_seed(5)", "manual_seed(6)"))
    del sys.modules["user_module"]
    go(weights=files, samples=20)
    assert measured_names[5:] == ["w1", "w2"]


def test_foreign_files_are_not_overwritten() -> None:
    Path("flatness").mkdir()
    Path("flatness", "summary.md").write_text("# My thesis")
    with pytest.raises(ExperimentError, match=r"summary\.md is not of steppe measure and would be lost.*--out"):
        go()
    assert Path("flatness", "summary.md").read_text() == "# My thesis"
    for content in ('{"mine": 1}', "{", "[]"):
        Path("other").mkdir(exist_ok=True)
        Path("other", "net.json").write_text(content)
        with pytest.raises(ExperimentError, match=r"net\.json is damaged, of another version or not of steppe"):
            go(out=Path("other"))
        assert Path("other", "net.json").read_text() == content


def test_verdict_against_a_reference_is_paired() -> None:
    files = weights(1, 2, 3, 4)
    output = go(weights=files[:2], against=files[2:], names=("SAM", "SGD"), width=200)
    summary = Path("flatness", "summary.md").read_text()
    values = [written(f"w{seed}")["measures"]["trace"]["value"] for seed in (1, 2, 3, 4)]
    difference = (values[0] - values[2] + values[1] - values[3]) / 2
    (row,) = [line for line in output.splitlines() if line.startswith("Hessian trace")]
    assert f" {difference:+.3g} " in row
    assert "SAM's minima against SGD's, 2 paired runs: " in output
    for text in (output, summary):
        assert "Flatter does not mean better" in text
    assert "## SAM against SGD" in summary
    assert all(f"## w{seed}\n" in summary for seed in (1, 2, 3, 4))


def test_several_files_are_summarized_by_mean_and_standard_deviation() -> None:
    output = go(weights=weights(1, 2))
    a, b = (written(f"w{seed}")["measures"]["loss"]["value"] for seed in (1, 2))
    (line,) = [line.split() for line in output.splitlines() if line.startswith("loss ")]
    assert line[1:4] == [f"{(a + b) / 2:.4g}", "±", f"{abs(a - b) / math.sqrt(2):.2g}"]
    assert "2 files" in " ".join(line)


def test_files_of_the_same_name_are_named_by_their_folders() -> None:
    for folder, seed in (("sam", 1), ("sgd", 2)):
        Path(folder).mkdir()
        torch.save(net(seed).state_dict(), Path(folder, "best.pt"))
    go(weights=(Path("sam/best.pt"),), against=(Path("sgd/best.pt"),))
    assert written("sam-best")["measures"]["loss"]["value"] == pytest.approx(loss(1), rel=1e-6)
    assert written("sgd-best")["measures"]["loss"]["value"] == pytest.approx(loss(2), rel=1e-6)


def test_equal_files_raise() -> None:
    one, other = weights(1, 2)
    Path("copy.pt").write_bytes(one.read_bytes())
    for given in ({"weights": (one, Path("copy.pt"))}, {"weights": (one, other), "against": (Path("copy.pt"), one)}):
        with pytest.raises(ExperimentError, match=r"is the same as w1\.pt: a run that counts twice"):
            go(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "user_module.py:net"},
            "model='user_module.py:net': name the module as in an import, user_module:net",
        ),
        ({"data": "user_module"}, "data='user_module': write package.module:name"),
        ({"evaluate": "a:b", "loss": "c:d"}, "give one of them"),
        ({"against": (Path("a"),)}, "1 files, and 0 are given with --weights.*pairs"),
        ({"names": ("a", "a")}, "the two names must differ"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UserModel(**{"model": "a:b", "data": "a:b", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere:net"}, r"--model nowhere:net: there is no module nowhere, neither in the current folder"),
        ({"model": "user_module.deeper:net"}, "--model user_module.deeper:net: there is no module user_module.deeper"),
        ({"model": "careless:net"}, "there is no module not_installed_anywhere, which careless imports"),
        ({"model": "failing:net"}, "importing failing raised AttributeError: 'NoneType'"),
        ({"model": "user_module:missing"}, r"user_module \(.*user_module.py\) has no missing"),
        ({"model": "user_module:calls"}, "user_module:calls is int, neither a network nor a function"),
        ({"model": "user_module:nothing"}, "gives str, and a torch.nn.Module is needed"),
        ({"model": "user_module:broken"}, "calling it raised KeyError: 'first line"),
        ({"data": "user_module:broken"}, "--data user_module:broken: calling it raised KeyError"),
        ({"data": "user_module:restless"}, "gives other samples each time.*augmentation"),
        (
            {"data": "user_module:fading"},
            r"^net: data: two passes had different samples \(30 and 30 of them\).*augmentation",
        ),
        ({"data": "user_module:uneven"}, "tensors of 30 and 29 entries"),
        ({"data": "user_module:dicts"}, "an item is dict, and a loss takes .inputs, targets.: give with --evaluate"),
        ({"data": "user_module:ragged"}, "cannot be put into one batch .RuntimeError.*collate_fn"),
        ({"data": "user_module:stream"}, "one after the other: put a DataLoader around"),
        ({"data": "user_module:once"}, "gives list_iterator, which can be iterated over only once"),
        ({"data": "user_module:a_dict"}, "gives dict: give a tuple of tensors"),
        ({"data": "user_module:a_number"}, "gives int: give a tuple of tensors"),
        ({"data": "user_module:not_a_number"}, "^net: The loss at the weights themselves is nan"),
        (
            {"data": "user_module:real_targets", "loss": "user_module:missing"},
            "--loss user_module:missing: user_module .* has no missing",
        ),
        ({"loss": "user_module:calls"}, "--loss user_module:calls is int, and no function"),
        (
            {"loss": "user_module:each"},
            r"net: the loss of user_module:net on user_module:pair: .*shape .16,., but it must be the mean loss",
        ),
        (
            {"model": "user_module:Tied", "data": "user_module:real_targets"},
            "^Tied: the loss of user_module:Tied on .*: RuntimeError: ",
        ),
        (
            {"model": "user_module:once_differentiable"},
            "^once_differentiable: An operation .* has no second derivative",
        ),
    ],
)
def test_error_in_the_user_code_is_reported_on_one_line(options: dict[str, Any], message: str) -> None:
    given = UserModel(**{"model": "user_module:net", "data": "user_module:pair", **options})
    with pytest.raises(ExperimentError, match=message) as raised:
        measure_user_model(given, MeasuringOptions(batch_size=16, budget=BUDGET), Console(quiet=True))
    assert "\n" not in str(raised.value)


def test_cause_of_an_error_is_kept() -> None:
    with pytest.raises(ExperimentError) as raised:
        go("broken")
    assert isinstance(raised.value.__cause__, KeyError)


def test_random_factory_gives_the_same_data_each_time() -> None:
    state = torch.get_rng_state()
    go(data="drawn", weights=weights(1, 2))
    torch.set_rng_state(state)
    first = written("w1")["inputs"]["data_sha256"]
    torch.rand(5)
    go(data="drawn", weights=weights(3), out=Path("again"))
    assert json.loads(Path("again", "w3.json").read_text())["inputs"]["data_sha256"] == first


def test_job_can_be_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    files = weights(1)
    go(weights=files)
    measure_job, found = jobs.measure_job, written("w1")
    monkeypatch.setattr(
        jobs, "measure_job", lambda job, progress: measure_job(pickle.loads(pickle.dumps(job)), progress)
    )
    go(weights=files, out=Path("again"))
    again = json.loads(Path("again", "w1.json").read_text())
    assert {**again, "seconds": 0, "checksum": ""} == {**found, "seconds": 0, "checksum": ""}
    monkeypatch.undo()
    assert pickle.loads(pickle.dumps(jobs.measure_job)) is jobs.measure_job
