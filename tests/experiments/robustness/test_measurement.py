import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steppe.experiments.data.datasets import MEAN, STD, normalize
from steppe.experiments.errors import ExperimentError
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.robustness.calibration import calibration
from steppe.experiments.robustness.corruptions import BLOCK, CORRUPTIONS, corrupt
from steppe.experiments.robustness.measurement import measure
from steppe.flatness.quantization import round_weights

N = BLOCK + 30
OPTIONS = {"mean": MEAN, "std": STD}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (N, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.randint(0, 10, (N,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = PreActResNet18(width=8, stem_stride=2)
    network(torch.randn(64, 1, 8, 8))  # running statistics that are not those at the start
    return network


class Counting(nn.Module):
    """A linear classifier that counts its images, and keeps what it got."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * 64, 10)
        self.register_buffer("seen", torch.zeros(()))
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.inputs.append(x)
        return self.linear(x.flatten(1))


def correct(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return 100 * float((model(inputs).argmax(1) == labels).double().mean())


def test_every_measure_is_that_of_the_model_on_the_whole_set(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    found = measure(model, images, labels, **OPTIONS, corruptions=("shift", "gaussian_noise:5"), bits=(3,), seed=4)
    unit = images.float() / 255
    expected = {"accuracy": correct(model, normalize(images), labels)}
    for name, severity in (("shift", 3), ("gaussian_noise", 5)):
        key = f"accuracy under {name}" + (":5" if severity == 5 else "")
        expected[key] = correct(model, (corrupt(unit, name, severity, seed=4) - MEAN) / STD, labels)
    expected["accuracy under corruptions"] = sum(v for k, v in expected.items() if "under" in k) / 2
    with torch.no_grad():
        calibrated = calibration(model(normalize(images)), labels)
    expected["calibration error"] = 100 * calibrated.error
    expected["negative log-likelihood"] = calibrated.negative_log_likelihood
    expected["Brier score"] = calibrated.brier_score
    with round_weights(model, 3):
        expected["accuracy at 3 bits"] = correct(model, normalize(images), labels)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-5, abs=0.2)  # one image of 530 may be at the edge of two classes
    assert len({round(value, 3) for name, value in found.items() if name.startswith("accuracy")}) > 3


def test_all_corruptions_and_bits_are_measured_by_default(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    found = measure(model, images[:20], labels[:20], **OPTIONS)
    assert {f"accuracy under {name}" for name in CORRUPTIONS} < set(found)
    assert {f"accuracy at {bits} bits" for bits in (8, 4, 3, 2)} < set(found)
    assert all(isinstance(value, float) for value in found.values())


def test_one_forward_pass_for_each_corruption_and_number_of_bits_and_one_more(images: Tensor, labels: Tensor) -> None:
    model = Counting()
    passes = []
    measure(
        model, images, labels, corruptions=("blur", "contrast"), bits=(4, 2), raise_if_stopped=lambda: passes.append(1)
    )
    assert sum(map(len, model.inputs)) == 5 * N
    assert len(passes) == len(model.inputs) == 5 * 2


def test_the_model_gets_the_same_bits_as_in_training(images: Tensor, labels: Tensor) -> None:
    model = Counting()
    measure(model, images, labels, **OPTIONS, corruptions=(), bits=())
    assert torch.equal(torch.cat(model.inputs), normalize(images))


def test_bytes_and_fractions_give_the_same(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    assert measure(model, images, labels, **OPTIONS) == measure(model, images.float() / 255, labels, **OPTIONS)


def test_draws_do_not_depend_on_the_batch_size(images: Tensor, labels: Tensor) -> None:
    whole, parts = Counting(), Counting()
    for model, size in ((whole, BLOCK), (parts, 70)):
        measure(model, images, labels, corruptions=("gaussian_noise",), bits=(), batch_size=size)
    assert max(map(len, parts.inputs)) == 70
    assert torch.equal(torch.cat(parts.inputs), torch.cat(whole.inputs))


def test_each_channel_is_normalized_by_its_own_numbers(labels: Tensor) -> None:
    model, colored = Counting(3), torch.rand(20, 3, 8, 8)
    measure(model, colored, labels[:20], mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0), corruptions=(), bits=())
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0)))
    torch.testing.assert_close(model.inputs[0], (colored - mean) / std)


def test_weights_buffers_modes_and_generators_are_unchanged(images: Tensor, labels: Tensor) -> None:
    model = nn.Sequential(Counting(), nn.BatchNorm1d(10), nn.Dropout(0.5))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def draws(images: Tensor, generator: torch.Generator) -> Tensor:
        random.random()
        np.random.rand()
        return images * torch.rand(())

    measure(model, images, labels, own={"draws": draws})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(p.grad is None for p in model.parameters())


def test_everything_is_restored_when_a_signal_stops_the_measurement(images: Tensor, labels: Tensor) -> None:
    model = Counting()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: Iterator[int] = iter(range(100))

    def stop() -> None:
        if next(calls) == 3:  # in the pass with rounded weights
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, images, labels, corruptions=(), bits=(2,), raise_if_stopped=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_a_corruption_of_the_users_own_gets_a_copy_and_its_own_generator(images: Tensor, labels: Tensor) -> None:
    unit, kept = images.float() / 255, []

    def dark(images: Tensor, generator: torch.Generator) -> Tensor:
        kept.append(torch.rand(3, generator=generator).tolist() + torch.rand(3).tolist())
        return images.zero_()

    original = unit.clone()
    model = Counting()
    found = measure(model, unit, labels, own={"dark": dark}, corruptions=(), bits=())
    assert torch.equal(unit, original)
    assert found["accuracy under dark"] == pytest.approx(correct(model, torch.zeros(N, 1, 8, 8), labels), rel=1e-12)
    torch.rand(1)
    measure(model, unit, labels, own={"dark": dark}, corruptions=(), bits=())
    assert kept[:2] == kept[2:]
    assert kept[0] != kept[1]


@pytest.mark.parametrize("returned", [None, torch.zeros(3, 1, 8, 8)])
def test_a_corruption_of_another_shape_raises(images: Tensor, labels: Tensor, returned: Tensor | None) -> None:
    with pytest.raises(ExperimentError, match="the corruption mine returned .* for images of shape"):
        measure(Counting(), images, labels, own={"mine": lambda images, generator: returned})  # type: ignore[dict-item, return-value]


def test_a_broken_model_is_measured_as_it_is(images: Tensor, labels: Tensor) -> None:
    model = Counting()
    nn.init.constant_(model.linear.weight, torch.nan)
    found = measure(model, images, labels)
    assert np.isnan(found["calibration error"])


def test_outputs_of_hugging_face_models_have_logits(images: Tensor, labels: Tensor) -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(Counting):
        def forward(self, x: Tensor) -> Output:
            return Output(super().forward(x))

    torch.manual_seed(0)
    plain = Counting()
    wrapped = Wrapped()
    wrapped.load_state_dict(plain.state_dict())
    assert measure(wrapped, images, labels, bits=()) == measure(plain, images, labels, bits=())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"corruptions": ("gaussian_nois",)}, ValueError, "did you mean 'gaussian_noise'"),
        ({"corruptions": ("blur:6",)}, ValueError, "severity from 1 to 5"),
        ({"bits": (1,)}, ValueError, "at least 2"),
        ({"batch_size": 0}, ValueError, "at least 1"),
        ({"images": torch.zeros(3, 1, 8, 8)}, ValueError, "one for each"),
        ({"images": torch.full((N, 1, 8, 8), -1.0)}, ValueError, "before they were normalized"),
        ({"images": torch.zeros(N, 1, 8, 8, dtype=torch.int64)}, TypeError, "bytes"),
    ],
)
def test_arguments_that_make_no_sense_raise_before_anything_is_evaluated(
    images: Tensor, labels: Tensor, options: dict[str, object], error: type[Exception], words: str
) -> None:
    model = Counting()
    with pytest.raises(error, match=words):
        measure(model, **({"images": images, "labels": labels} | options))  # type: ignore[arg-type]
    assert not model.inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_another_dtype_than_float32_get_images_of_it(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> None:
    options = {**OPTIONS, "corruptions": ("blur",), "bits": (4,)}
    found = measure(model.to(dtype), images[:40], labels[:40], **options)
    model.eval()
    with torch.no_grad():
        logits = model(normalize(images[:40]).to(dtype)).float()
    assert found["negative log-likelihood"] == calibration(logits, labels[:40]).negative_log_likelihood
