"""Runs whose averaged weights are measured: as a method, `sgd+ema`, and as a control beside the plain base."""

from pathlib import Path

import pytest
import torch
from tiny import recipe, run_of, train_run, training_of, untimed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Run
from steppe.experiments.storage.run_folder import CHECKPOINT
from steppe.experiments.training.stopping import Stopped
from stops import StopAfter


def checkpoint(folder: Path) -> dict[str, object]:
    found: dict[str, object] = torch.load(folder / CHECKPOINT, weights_only=True)
    return found


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_average_leaves_the_weights_of_the_training_unchanged(method: str, tmp_path: Path) -> None:
    train_run(run_of(method), tmp_path / "plain")
    train_run(run_of(f"{method}+ema"), tmp_path / "averaged")
    plain, averaged = (checkpoint(tmp_path / name)["model"] for name in ("plain", "averaged"))
    assert all(torch.equal(plain[key], averaged[key]) for key in plain)  # type: ignore[index, union-attr]


def test_averaged_run_is_measured_with_the_averaged_weights(tmp_path: Path) -> None:
    plain, averaged = (train_run(run_of(method), tmp_path / method)[-1] for method in ("sgd", "sgd+ema"))
    assert averaged["test_loss"] != plain["test_loss"]
    weights = checkpoint(tmp_path / "sgd+ema")["average"]
    state = {key.removeprefix("module."): t for key, t in weights.items() if key.startswith("module.")}  # type: ignore[attr-defined]
    again = training_of(run_of("sgd"))
    again.network.load_state_dict(state)
    assert again._evaluate(again.samples["test"], lambda: None)["loss"] == pytest.approx(
        averaged["test_loss"], rel=1e-4
    )


def test_ema_is_that_of_torch_over_the_steps(tmp_path: Path) -> None:
    training = training_of(run_of("sgd+ema"))
    reference = AveragedModel(training.network, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    for step, batch in enumerate(training.rest_of_epoch()):
        training.step(batch)
        if step:
            reference.multi_avg_fn = get_ema_multi_avg_fn(min(0.999, (1 + step) / (10 + step)))
        reference.update_parameters(training.network)
    ours, theirs = training.average.module.parameters(), reference.module.parameters()  # type: ignore[union-attr]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["sam+swa", "sgd+ema"])
def test_stopped_averaged_run_resumes_to_the_same_bits(method: str, tmp_path: Path) -> None:
    whole = train_run(run_of(method), tmp_path / "whole")
    with pytest.raises(Stopped):
        train_run(run_of(method), tmp_path / "parts", stop=StopAfter(7))
    assert untimed(train_run(run_of(method), tmp_path / "parts")) == untimed(whole)


def test_plain_base_has_its_averaged_weights_measured_at_the_end(tmp_path: Path) -> None:
    base, sam = recipe(methods=("sgd", "sam"), seeds=1).runs()
    *others, last = train_run(base, tmp_path / "base")
    assert "test_accuracy (ema)" in last.measures
    assert all("test_accuracy (ema)" not in other.measures for other in others)
    assert "test_accuracy (ema)" not in train_run(sam, tmp_path / "sam")[-1].measures


def reordered(before: tuple[str, ...], after: tuple[str, ...], method: str) -> tuple[Run, Run]:
    """The run of a method as it was begun, and as it is when other methods are compared."""
    began, goes_on = (recipe(methods=methods, seeds=1) for methods in (before, after))
    return Run(began, MethodSpec.parse(method), 0), Run(goes_on, MethodSpec.parse(method), 0)


ORDERS = [
    (("sgd",), ("sgd", "sam")),
    (("sam", "sgd"), ("sgd", "sam")),
    (("sgd", "sam"), ("sam", "sgd")),
    (("sgd", "sam"), ("sgd",)),
]


@pytest.mark.parametrize(("before", "after"), ORDERS)
def test_finished_run_is_kept_when_methods_are_added_or_reordered(
    before: tuple[str, ...], after: tuple[str, ...], tmp_path: Path
) -> None:
    began, goes_on = reordered(before, after, "sgd")
    whole = train_run(began, tmp_path / "run")
    saved = (tmp_path / "run" / CHECKPOINT).read_bytes()
    assert train_run(goes_on, tmp_path / "run") == whole
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == saved


@pytest.mark.parametrize(("before", "after"), ORDERS)
def test_stopped_run_goes_on_as_it_began_when_methods_are_added_or_reordered(
    before: tuple[str, ...], after: tuple[str, ...], tmp_path: Path
) -> None:
    began, goes_on = reordered(before, after, "sgd")
    whole = train_run(began, tmp_path / "whole")
    with pytest.raises(Stopped):
        train_run(began, tmp_path / "parts", stop=StopAfter(13))  # after all points of the grid but the last
    assert untimed(train_run(goes_on, tmp_path / "parts"))[-1] == untimed(whole)[-1]


def test_first_method_is_measured_in_every_way_after_as_many_steps_and_with_averaged_weights(tmp_path: Path) -> None:
    sgd, sam = recipe(epochs=4, eval_every=1, methods=("sgd", "sam")).runs()
    noise = "test_accuracy under gaussian_noise"
    found = {
        run.method.name: {
            record.standardized_epoch: {name for name in record.measures if name.startswith(noise)}
            for record in train_run(run, tmp_path / run.name, robustness=True)
        }
        for run in (sgd, sam)
    }
    assert found == {
        "sgd": {1: set(), 2: {noise}, 3: set(), 4: {noise, f"{noise} (ema)"}},
        "sam": {1: set(), 2: set(), 3: set(), 4: {noise}},
    }


def test_averaged_weights_are_measured_as_those_of_a_run_that_evaluates_them(tmp_path: Path) -> None:
    plain, averaged = (
        train_run(run_of(method), tmp_path / method, robustness=True)[-1] for method in ("sgd", "sgd+ema")
    )
    for name in ("test_accuracy", "test_accuracy under corruptions", "test_calibration error"):
        assert plain[f"{name} (ema)"] == pytest.approx(averaged[name], rel=1e-6)
