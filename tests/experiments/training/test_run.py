import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from own_tasks import ON_ANY_MODEL
from tiny import RecordingReporter, dataset, recipe, run_of, train_run, training_of, untimed, whole
from torch import Tensor, nn

from steppe.experiments.config.methods import METHODS
from steppe.experiments.config.recipe import Run
from steppe.experiments.data.datasets import normalize
from steppe.experiments.errors import ExperimentError
from steppe.experiments.models import networks
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS
from steppe.experiments.training.forward import FORWARD_ONLY
from support import rest_is_slow


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / CHECKPOINT, weights_only=True)["model"])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_methods_of_a_seed_share_initial_weights(tmp_path: Path) -> None:
    runs = list(recipe(seeds=2, methods=("sgd", "sam", "asam")).runs())
    first = [training_of(run).network.state_dict() for run in runs]
    assert same(first[0], first[1])
    assert same(first[0], first[2])
    assert not same(first[0], first[3])


class Counted:
    """Counts the images that really go through the networks of all runs in training mode, behind the runs' backs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = Fraction(0)
        monkeypatch.setattr(networks, "PreActResNet18", self.build)

    def build(self, *args: Any, **kwargs: Any) -> nn.Module:
        network = PreActResNet18(*args, **kwargs)
        network.register_forward_pre_hook(self.count)
        return network

    def count(self, model: nn.Module, inputs: tuple[Tensor]) -> None:
        if model.training:
            self.images += len(inputs[0]) * (1 if torch.is_grad_enabled() else FORWARD_ONLY)


@pytest.mark.parametrize("method", ["sgd", "sam", "asam", "msam"])
def test_compute_is_exactly_equal_where_it_divides(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    records = train_run(run_of(method, methods=(method,), eval_every=2), tmp_path)
    assert counted.images == 4 * 72
    assert [(r.standardized_epoch, r.gradient_evaluations) for r in records] == [(2, 2 * 72), (4, 4 * 72)]


# the other half is fast in test_methods_on_tasks.py, which takes the same steps
@pytest.mark.parametrize("method", rest_is_slow(ON_ANY_MODEL, lambda method: ON_ANY_MODEL.index(method) % 2 == 0))
def test_compute_is_equal_within_one_step(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    base = METHODS[method].plain or "sgd"
    run = run_of(method, methods=(method,), base=base, epochs=3, eval_every=2, batch_size=20)
    records = train_run(run, tmp_path)
    beyond_forwards = 3 * 18 if method == "sassha" else 0  # the estimate of the first step; none is due after it
    assert counted.images + beyond_forwards == pytest.approx(records[-1].gradient_evaluations)
    assert [r.standardized_epoch for r in records] == [2, 3]
    for r in records:
        step = 20 * max(2, math.ceil(run.method.passes))
        assert r.standardized_epoch * 72 <= r.gradient_evaluations < r.standardized_epoch * 72 + step
        assert r.passes == pytest.approx(r.gradient_evaluations / (r.epoch * 72))
        assert r.steps == pytest.approx(r.epoch * 4, abs=0.7)


def test_a_run_ends_in_the_middle_of_an_epoch_where_its_compute_is_spent(tmp_path: Path) -> None:
    run = run_of("looksam", methods=("looksam",), epochs=4, eval_every=1)
    records = train_run(run, tmp_path)
    # 14, 14, 15, 14 and 15 images a step; every fifth step pays twice, which is the first of an epoch
    assert [r.gradient_evaluations for r in records] == [86, 157, 229, 300]
    assert [r.steps for r in records] == [5, 9, 13, 17]
    assert [r.epoch for r in records] == [72 / 72, 129 / 72, 187 / 72, 244 / 72]
    assert [r.passes for r in records] == [86 / 72, 157 / 129, 229 / 187, 300 / 244]


def test_a_step_that_crosses_two_points_is_measured_at_both(tmp_path: Path) -> None:
    records = train_run(run_of("sam", batch_size=72, epochs=4, eval_every=1), tmp_path)
    assert [(r.standardized_epoch, r.gradient_evaluations) for r in records] == [(1, 144), (2, 144), (3, 288), (4, 288)]
    assert records[0]["test_loss"] == records[1]["test_loss"]


def test_late_sam_perturbs_in_the_last_part_of_its_compute(tmp_path: Path) -> None:
    late = "late_sam:start=0.5"
    records = train_run(run_of(late, methods=(late,), epochs=6, eval_every=1), tmp_path)
    assert [r.passes for r in records][:2] == [1.0, 1.0]
    assert records[-1].passes == pytest.approx(1.5, abs=0.03)  # 10 plain epochs of 20: 6 = 2 + 2 * 2
    assert records[-1].steps == 20


def test_the_same_seed_gives_the_same_bits_and_sam_is_not_sgd(tmp_path: Path) -> None:
    for method in ("sgd", "sam"):
        run = run_of(method)
        first, second = train_run(run, tmp_path / "a" / method), train_run(run, tmp_path / "b" / method)
        assert untimed(first) == untimed(second)
        assert same(weights(tmp_path / "a" / method), weights(tmp_path / "b" / method))
    assert not same(weights(tmp_path / "a" / "sgd"), weights(tmp_path / "a" / "sam"))


def test_metrics_are_those_of_the_whole_sets(tmp_path: Path) -> None:
    run = run_of("sgd")
    data, last = dataset(), train_run(run, tmp_path)[-1]
    network = training_of(run).network
    network.load_state_dict(weights(tmp_path))
    network.eval()
    with torch.no_grad():
        logits = network(normalize(data.test.images))
    assert last["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, data.test.labels).item(), rel=1e-5)
    assert last["test_accuracy"] == pytest.approx(100 * (logits.argmax(1) == data.test.labels).float().mean().item())
    assert last["gap"] == last["train_accuracy"] - last["test_accuracy"]
    assert last.epoch == 4


def test_training_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(monkeypatch)
    told = RecordingReporter()
    train_run(run_of("sgd", epochs=12, width=4), tmp_path, reporter=told)
    assert told.records[-1]["train_loss"] < 0.8 * told.records[0]["train_loss"]
    assert told.steps[0] == pytest.approx(math.log(10), abs=0.6)  # the loss at w of a step, as a mean over images


@pytest.mark.filterwarnings("ignore:a step was skipped:RuntimeWarning")
@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_a_diverged_run_is_reported_and_leaves_a_usable_folder(method: str, tmp_path: Path) -> None:
    run = run_of(method, lr=1e18)
    with pytest.raises(ExperimentError, match=rf"{method}-seed0 diverged in epoch 1: .* smaller --lr"):
        train_run(run, tmp_path)
    assert (tmp_path / METRICS).read_text() == ""
    with pytest.raises(ExperimentError, match="diverged"):  # and again, rather than a damaged checkpoint
        train_run(run, tmp_path)


def test_bfloat16_and_adamw_and_channels_last_train(tmp_path: Path) -> None:
    odd = recipe(base="adamw", methods=("adamw", "sam"), lr=1e-3, amp=True, channels_last=True, norm="group", epochs=2)
    precise = odd.replace(amp=False)
    for method in odd.comparison.methods:
        rounded, exact = (
            train_run(Run(r, method, 0), tmp_path / f"{method}{r.hardware.amp}")[-1] for r in (odd, precise)
        )
        assert rounded["train_loss"] != exact["train_loss"]
        assert rounded["train_loss"] == pytest.approx(exact["train_loss"], rel=0.1)
