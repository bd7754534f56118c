import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CPU, dataset, make_task, recipe, samples, split, train_run, training_of, untimed
from torch import Tensor, nn

from steppe.experiments.data.datasets import Split, normalize
from steppe.experiments.data.sampling import mislabeled
from steppe.experiments.storage.records import read_records
from steppe.experiments.storage.run_folder import CHECKPOINT, METRICS, RunFolder
from steppe.experiments.training import run as training
from steppe.experiments.training.evaluation import flatness_sample, measure_flatness
from steppe.experiments.training.stopping import Stop, Stopped

FIELDS = ("sharpness", "lambda_max", "gradient_norm")


def weights(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / CHECKPOINT, weights_only=True)
    return {**state["model"], "rng": state["rng"], **_flat(state["optimizer"])}


def _flat(state: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{k}.{n}": v for k, s in state["state"].items() for n, v in s.items() if isinstance(v, Tensor)}


# a step of SAM on the whole set crosses two points of the grid at once
@pytest.mark.parametrize(("method", "size", "every"), [("sgd", 16, 4), ("sam", 72, 2)])
def test_measuring_changes_no_bit_of_the_training_and_adds_to_the_records(
    method: str, size: int, every: int, tmp_path: Path
) -> None:
    fields = {"methods": (method,), "eval_every": 1, "momentum": 0.9, "flatness_samples": 16, "batch_size": size}
    (without,), (with_it,) = (list(recipe(**fields, flatness_every=f).runs()) for f in (None, every))
    plain, measured = train_run(without, tmp_path / "plain"), train_run(with_it, tmp_path / "measured")
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "measured")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    others = [{k: v for k, v in r.items() if k not in FIELDS} for r in untimed(measured)]
    assert others == [{k: v for k, v in r.items() if k not in FIELDS} for r in untimed(plain)]
    assert [r.sharpness is not None for r in measured] == [e % every == 0 for e in (1, 2, 3, 4)]
    assert all((r.sharpness is None) == (r.lambda_max is None) == (r.gradient_norm is None) for r in measured)
    lines = [json.loads(line) for line in (tmp_path / "measured" / METRICS).read_text().splitlines()]
    assert [set(FIELDS) <= set(line) for line in lines] == [e % every == 0 for e in (1, 2, 3, 4)]
    # what is not measured is not written: no file of today is read differently from those of before
    assert not any(name in (tmp_path / "plain" / METRICS).read_text() for name in FIELDS)
    assert not any(
        name in record for record in torch.load(tmp_path / "plain" / CHECKPOINT)["records"] for name in FIELDS
    )


def test_records_without_flatness_round_trip_to_the_same_bytes() -> None:
    line = (
        '{"standardized_epoch": 2, "epoch": 2, "steps": 10, "gradient_evaluations": 144, "passes": 1.0, '
        '"train_loss": 2.0, "train_accuracy": 30.0, "test_loss": 2.5, "test_accuracy": 20.0, "gap": 10.0, '
        '"seconds": 1.5, "images_per_second": 96.0}\n'
    )
    (record,) = read_records(line)
    assert record.sharpness is None
    assert json.dumps(record.to_json()) + "\n" == line


def test_a_stopped_run_measures_the_same_sharpness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Soon(Stop):
        """Asked for in the third of four epochs, after the first measurement."""

        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            self.signal = 15
            return self.asked >= 15

    def length(task: object, network: nn.Module, *_: object) -> dict[str, float]:
        return dict.fromkeys(FIELDS, float(sum(p.detach().double().norm() for p in network.parameters())))

    monkeypatch.setattr(training, "measure_flatness", length)  # in less time
    (run,) = recipe(methods=("sgd",), flatness_every=2).runs()
    whole = train_run(run, tmp_path / "whole")
    with pytest.raises(Stopped):
        train_run(run, tmp_path / "stopped", stop=Soon())
    assert (tmp_path / "stopped" / METRICS).read_text().count("lambda_max") == 1
    assert untimed(train_run(run, tmp_path / "stopped")) == untimed(whole)


class Small(nn.Module):
    """Softmax regression on four numbers an image: 50 weights, and a convex loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool, self.norm, self.head = nn.AdaptiveAvgPool2d(2), nn.BatchNorm1d(4), nn.Linear(4, 10)
        for p in self.norm.parameters():
            p.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.pool(images).flatten(1)))
        return logits


TASK = make_task()(recipe())


def whole(data: Split) -> list[tuple[Tensor, ...]]:
    return [samples(data).gather(torch.arange(len(data)))]


def test_values_are_those_of_slow_references() -> None:
    network, sample = Small().double(), split(60, 0)
    images = normalize(sample.images).double()
    network.train()
    network(images)  # statistics that are not those of the sample, so that modes differ
    network.train()
    found = measure_flatness(TASK, Small32(network), whole(sample), 0.3, lambda: None)
    assert network.training
    network.eval()

    def at(flat: Tensor) -> Tensor:
        weight, bias = flat.split((40, 10))
        x = network.norm(network.pool(images).flatten(1))
        return F.cross_entropy(x @ weight.view(10, 4).T + bias, sample.labels)

    w = torch.cat([network.head.weight.detach().flatten(), network.head.bias.detach()])
    gradient, hessian = torch.func.grad(at)(w), torch.autograd.functional.hessian(at, w)
    assert found["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-9)
    assert found["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-2)
    assert found["sharpness"] == pytest.approx(slow_sharpness(at, w, 0.3), rel=1e-3)


class Small32(nn.Module):
    """Takes the experiments' float32 images in float64, so that the reference is not a matter of rounding."""

    def __init__(self, inner: Small) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images.double())
        return logits


def test_a_loss_that_is_not_finite_gives_nan_and_does_not_raise() -> None:
    network = Small32(Small().double())
    with torch.no_grad():
        network.inner.head.weight[0, 0] = math.nan
    found = measure_flatness(TASK, network, whole(split(20, 0)), 0.3, lambda: None)
    assert found.keys() == set(FIELDS)
    assert all(math.isnan(value) for value in found.values())


def test_a_measurement_can_be_stopped() -> None:
    asked: list[int] = []

    def pause() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Stopped(15)

    with pytest.raises(Stopped):
        measure_flatness(TASK, Small32(Small().double()), whole(split(20, 0)), 0.3, pause)


def slow_sharpness(at: Any, w: Tensor, rho: float) -> float:
    """The maximum of L(w + e) - L(w) on the sphere, by many small steps from many places: the loss is convex."""
    best, grad = 0.0, torch.func.grad(at)
    for seed in range(4):
        e = torch.randn(len(w), generator=torch.Generator().manual_seed(seed), dtype=w.dtype)
        e = grad(w) if seed == 0 else e
        for _ in range(300):
            e = e * (rho / e.norm())
            g = grad(w + e)
            e = e + 0.5 * rho * g / g.norm()
        e = e * (rho / e.norm())
        best = max(best, float(at(w + e) - at(w)))
    return best


def test_the_sample_has_the_noisy_labels_and_is_always_the_same() -> None:
    runs = list(recipe(seeds=2, label_noise=0.5, shots=4, flatness_every=2).runs())
    sgd, sam, other, _ = (training_of(run).samples["train"] for run in runs)
    first, again = *flatness_sample(sgd, 15, 0, CPU.device), *flatness_sample(sam, 15, 0, CPU.device)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    fitted = {(i.numpy().tobytes(), int(y)) for i, y in zip(*sgd.gather(torch.arange(len(sgd))), strict=True)}
    drawn = {(i.numpy().tobytes(), int(y)) for i, y in zip(*first, strict=True)}
    assert len(drawn) == 15
    assert drawn <= fitted
    assert not torch.equal(flatness_sample(other, 15, 1, CPU.device)[0][0], first[0])
    assert torch.equal(flatness_sample(sgd, 4000, 0, CPU.device)[0][1], sgd.tensors[1])


def test_flatness_options_are_no_part_of_the_result(tmp_path: Path) -> None:
    assert recipe(flatness_every=2, flatness_samples=9).result_options() == recipe().result_options()
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim(recipe(), 1)
        folder.claim(recipe(flatness_every=4), 1)
    assert folder.recipe().evaluation.flatness_every == 4


@pytest.mark.parametrize(
    ("fields", "meaning"),
    [
        ({"flatness_every": 3, "epochs": 8}, "flatness_every=3: .* multiple of eval_every=2, or at least 8"),
        ({"flatness_every": 0}, "flatness_every=0: standardized epochs"),
        ({"flatness_samples": 0}, "flatness_samples=0: training samples"),
        ({"flatness_every": 2, "rho": 0.0}, "rho=0: sharpness is a maximum"),
    ],
)
def test_an_invalid_value_is_reported_with_its_meaning(fields: dict[str, object], meaning: str) -> None:
    with pytest.raises(ValueError, match=meaning):
        recipe(**fields)


def test_an_interval_beyond_the_compute_measures_at_the_end_only() -> None:
    (run,) = recipe(methods=("sgd",), epochs=7, flatness_every=100).runs()
    assert run.flatness_grid == {7}


def test_a_record_has_the_values_of_its_weights_on_the_noisy_sample(tmp_path: Path) -> None:
    (run,) = recipe(methods=("sgd",), label_noise=0.5, flatness_every=4, flatness_samples=11, rho=0.3, seeds=1).runs()
    *_, last = train_run(run, tmp_path)
    again = training_of(run)
    again.network.load_state_dict(torch.load(tmp_path / CHECKPOINT, weights_only=True)["model"])
    sample = flatness_sample(samples(mislabeled(dataset().train, 0.5, 0)), 11, 0, CPU.device)
    assert measure_flatness(again.task, again.network, sample, 0.3, lambda: None) == {
        name: getattr(last, name) for name in FIELDS
    }
