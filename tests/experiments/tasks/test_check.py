"""An error in a user's function is one line, with shapes and the user's file and line, before anything is trained."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_tasks import classifier, data, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from steppe.experiments import compare
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.check import check

CPU = torch.device("cpu")
INPUTS, LABELS = data()


class Broken(Dataset[Any]):
    """Raises an error for its last item."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == 7:
            raise OSError("picture-1.png is damaged")
        return INPUTS[i], LABELS[i]


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Ragged(Dataset[Any]):
    """Items of different lengths, which the usual collate function cannot stack."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(5 + i), LABELS[i]


class OtherDevice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(3, device="meta").to("meta")


def failing_metric(outputs: Tensor, targets: Tensor) -> float:
    return float(outputs.no_such_method())  # type: ignore[operator]


def with_nan() -> tuple[Tensor, Tensor]:
    inputs = INPUTS.clone()
    inputs[-1, 2] = torch.nan
    return inputs, LABELS


HERE = rf"{Path(__file__).name}:\d+: "
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "model of other inputs": (
        lambda: {"model": lambda: nn.Linear(7, 3)},
        r"the model raised an error on a batch \(a tensor of shape \(4, 5\), a tensor of shape \(4,\)\) \(RuntimeError",
    ),
    "model is no module": (lambda: {"model": lambda: torch.zeros(3)}, r"model= returned a tensor of shape \(3,\)"),
    "model raises": (lambda: {"model": lambda: nn.Linear(5, "3")}, rf"model= raised an error \(TypeError.*{HERE}"),
    "model without parameters": (lambda: {"model": nn.Flatten}, "has no parameter that requires a gradient"),
    "loss of each sample": (
        lambda: {"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")},
        r"loss= returned a tensor of shape \(4,\) for outputs a tensor of shape \(4, 3\).*the mean loss of a batch",
    ),
    "loss is a float": (lambda: {"loss": lambda o, t: F.cross_entropy(o, t).item()}, "loss= returned float"),
    "loss raises": (
        lambda: {"loss": lambda o, t: F.cross_entropy(o, t.float().unsqueeze(1))},
        rf"loss= raised an error on outputs a tensor of shape \(4, 3\) and targets .*{HERE}",
    ),
    "detached loss": (
        lambda: {"loss": lambda o, t: F.cross_entropy(o.detach(), t)},
        r"does not depend on the weights through autograd",
    ),
    "detached outputs": (lambda: {"model": lambda: Detached(5, 3)}, r"does not depend on the weights through autograd"),
    "broadcast targets": (
        lambda: {"model": lambda: nn.Linear(5, 1), "loss": F.mse_loss, "metrics": {}},
        r"compares each output with every target, for outputs a tensor of shape \(4, 1\) and targets a tensor of shape "
        r"\(4,\): give both the same shape",
    ),
    "a loss written by hand broadcasts": (
        lambda: {"model": lambda: nn.Linear(5, 1), "loss": lambda o, t: ((o - t) ** 2).mean(), "metrics": {}},
        r"loss= compares each output with every target, for .*give both the same shape.*it is at .*test_check.py:\d+",
    ),
    "a metric broadcasts": (
        lambda: {
            "model": lambda: nn.Linear(5, 1),
            "loss": lambda o, t: ((o - t[:, None]) ** 2).mean(),  # which is right
            "metrics": {"mae": lambda o, t: (o - t).abs().mean()},
        },
        r"the metric 'mae' compares each output with every target",
    ),
    "metric without an argument": (
        lambda: {"metrics": {"mine": lambda o: 0.5}},
        r"the metric 'mine' raised an error .*1 positional argument but 2 were given\); it is at .*test_check.py:\d+",
    ),
    "metric is a text": (lambda: {"metrics": {"mine": lambda o, t: "0.5"}}, "the metric 'mine' returned str"),
    "model needs an argument": (
        lambda: {"model": lambda n: nn.Linear(n, 3)},
        r"^the task's model= raised an error .*'n'\); it is at .*test_check.py:\d+",
    ),
    "inputs of another type": (
        lambda: {"train": (INPUTS.double(), LABELS)},
        r"^the model raised an error on a batch \(a tensor of float64 and shape \(4, 5\)",
    ),
    "a list of samples": (
        lambda: {"train": list(zip(INPUTS, LABELS, strict=True))},
        r"whose target has no dimension of samples: a list is taken for a list of batches",
    ),
    "a list of samples with numbers as targets": (
        lambda: {"train": [(x, int(y)) for x, y in zip(INPUTS, LABELS, strict=True)]},
        r"whose target has no dimension of samples: a list is taken for a list of batches",
    ),
    "a list of samples that are dictionaries": (
        lambda: {"train": [{"input": x, "labels": y} for x, y in zip(INPUTS, LABELS, strict=True)]},
        r"whose target has no dimension of samples: a list is taken for a list of batches",
    ),
    "float64 against float32": (
        lambda: {"train": (INPUTS.double(), LABELS)},
        r"the model raised .*The numbers of the data are float64, and the weights float32: .*to\(torch\.float32\)",
    ),
    "float64 in the model": (
        lambda: {"model": lambda: net().double(), "train": (INPUTS.numpy(), LABELS.numpy())},
        r"The numbers of the data are float32, and the weights float64: give .*to\(torch\.float64\)",
    ),
    "an array of texts": (
        lambda: {"train": (np.array(["a", "b"]), np.array([0, 1]))},
        "^train has an array of <U1, and tensors hold numbers only",
    ),
    "arrays in a list": (
        lambda: {"train": [INPUTS.numpy(), LABELS.numpy()]},
        "^train is a list of arrays, and a list is taken for one of batches: give a tuple",
    ),
    "a loader of nothing": (
        lambda: {"test": DataLoader(TensorDataset(INPUTS[:0], LABELS[:0]), batch_size=4)},
        "^test is empty",
    ),
    "NaN in the data": (lambda: {"train": with_nan()}, r"the loss of the new model is nan on .*look for NaN"),
    "metric raises": (
        lambda: {"metrics": {"mine": failing_metric}},
        rf"the metric 'mine' raised an error on outputs a tensor of shape \(4, 3\).*{HERE}return float\(outputs",
    ),
    "metric of two numbers": (
        lambda: {"metrics": {"mine": lambda o, t: torch.zeros(2)}},
        r"the metric 'mine' returned a tensor of shape \(2,\)",
    ),
    "optimizer is none": (lambda: {"optimizer": lambda model: model}, "optimizer= returned Sequential"),
    "optimizer of another model": (
        lambda: {"optimizer": lambda model: torch.optim.SGD(net().parameters(), lr=0.1)},
        "optimizer= returned an optimizer of other parameters than the model's",
    ),
    "predict returns one thing": (
        lambda: {"predict": lambda model, batch: model(batch[0])},
        r"predict= returned a tensor of shape \(4, 3\), and a pair is needed",
    ),
    "an item raises": (
        lambda: {"train": Broken()},
        rf"train= could not be read \(OSError: picture-1.png is damaged\), at .*{HERE}raise OSError",
    ),
    "an item raises in a worker": (
        lambda: {"train": DataLoader(Broken(), num_workers=1, batch_size=4)},
        rf"train= could not be read \(OSError: picture-1.png is damaged\), at .*{HERE}raise OSError",
    ),
    "collate fails": (lambda: {"train": Ragged()}, r"train= could not be read \(RuntimeError: stack expects each"),
    "no data": (lambda: {"test": TensorDataset(torch.zeros(0, 5))}, "test is empty"),
    "tensors of two lengths": (lambda: {"test": (INPUTS, LABELS[1:])}, r"test: tensors of shapes \(48, 5\), \(47,\)"),
    "an iterator": (lambda: {"train": iter([data()])}, "an iterator, which can be read once only"),
    "no batches": (lambda: {"train": []}, "^train: the data have no batch"),
    "no data at all": (lambda: {"train": 3}, "train is int: give a tuple of tensors"),
    "another device": (lambda: {"model": lambda: OtherDevice(5, 3)}, r"meta"),
    "no loss anywhere": (lambda: {"loss": None}, r"has no loss=, and the model returned a tensor of shape \(4, 3\)"),
    "batch is one tensor": (
        lambda: {"train": DataLoader(INPUTS)},
        r"a batch is a tensor of shape \(4, 5\), neither \(inputs, targets\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_the_user_is_one_line(case: str) -> None:
    make, wanted = CASES[case]
    with pytest.raises(ExperimentError, match=wanted) as caught:
        check(classifier(**make()), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"model": net()}, r"model is Sequential: every run needs one of its own.*model=lambda: Net\(\)"),
        ({"optimizer": torch.optim.SGD(net().parameters())}, "optimizer is SGD: every run needs one of its own"),
    ],
)
def test_an_object_in_the_place_of_a_function_raises(fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises(TypeError, match=wanted):
        classifier(**fields)


def one_network() -> Callable[[], nn.Module]:
    made = net()
    return lambda: made


def one_backbone(*, frozen: bool) -> Callable[[], nn.Module]:
    body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)).requires_grad_(not frozen)
    return lambda: nn.Sequential(body, nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (one_network(), "0.weight"),
        (one_backbone(frozen=False), "0.0.weight"),
        (one_backbone(frozen=True), "0.1.running_mean"),
    ],
)
def test_a_model_that_goes_on_from_the_weights_of_an_earlier_one_raises(
    model: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    wanted = rf"whose {name} is that of an earlier one.*copy.deepcopy\(net\)"
    with pytest.raises(ExperimentError, match=wanted):
        compare(classifier(model=model), epochs=1, seeds=1, out=tmp_path / "run", device="cpu", quiet=True)
    assert not list(tmp_path.glob("run/runs/*/*"))


def test_models_may_share_frozen_layers_and_be_copies_of_one() -> None:
    body, whole = nn.Linear(5, 8).requires_grad_(False), net()
    for make in (lambda: nn.Sequential(body, nn.Linear(8, 3)), lambda: copy.deepcopy(whole)):
        task = classifier(model=make)
        for _ in range(2):
            check(task, CPU)


def test_an_optimizer_with_parameters_that_the_model_does_not_have_raises() -> None:
    temperature = nn.Parameter(torch.ones(()))
    task = classifier(
        loss=lambda outputs, targets: F.cross_entropy(outputs * temperature, targets),
        optimizer=lambda model: torch.optim.SGD([*model.parameters(), temperature], lr=0.1),
    )
    with pytest.raises(ExperimentError, match="with parameters that the model does not have.*Make them in model="):
        check(task, CPU)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"loss": nn.CrossEntropyLoss}, "loss is the class CrossEntropyLoss: give a function"),
        ({"loss": "cross_entropy"}, "loss is str: give a function"),
        ({"metrics": F.mse_loss}, "metrics is function: give functions"),
        ({"metrics": {"mine": "accuracy"}}, "the metric 'mine' is str"),
        ({"schedule": "cosin"}, "schedule: 'cosin' is unknown; did you mean 'cosine'"),
        ({"batch_size": 0}, "batch_size=0: it is a number of samples"),
        ({"batch_size": 8.0}, "batch_size=8.0: it is a number of samples"),
    ],
)
def test_an_argument_of_another_kind_raises(fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises((TypeError, ValueError), match=wanted):
        classifier(**fields)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: ((o - t[:, None].float()) ** 2).mean(),
        lambda o, t: ((o.squeeze(1) - t) ** 2).mean(),
        lambda o, t: ((o[:, 0] - t) ** 2).mean(),
        lambda o, t: F.mse_loss(o.flatten(), t.float()),
        lambda o, t: F.mse_loss(o.flatten(), t.float()).sqrt(),  # no mean of the samples
    ],
)
def test_a_function_that_makes_the_shapes_equal_itself_is_no_error(loss: Any) -> None:
    check(classifier(model=lambda: nn.Linear(5, 1), loss=loss, metrics={"mine": loss}), CPU)


def of_both(outputs: Tensor, targets: Tensor) -> float:
    """A metric as the area under the ROC curve: of one class, there is none."""
    if targets.min() == targets.max():
        raise ValueError("only one class is present")
    return 0.5


@pytest.mark.parametrize("positives", [range(16, 32), [31], [5]])
def test_a_metric_that_a_few_samples_are_too_few_for_is_no_error(positives: Any) -> None:
    inputs, labels = data(32)
    labels = labels.new_zeros(32)
    labels[list(positives)] = 1
    check(classifier(test=(inputs, labels), metrics={"auc": of_both}), CPU)


def test_a_metric_that_the_whole_split_is_not_enough_for_is_an_error_of_the_few_samples() -> None:
    inputs, labels = data(32)
    with pytest.raises(ExperimentError, match=rf"'auc' raised an error on outputs .* \(4, 3\).*one class.*{HERE}raise"):
        check(classifier(test=(inputs, labels.new_zeros(32)), metrics={"auc": of_both}), CPU)


@pytest.mark.parametrize("name", ["loss", " ", ""])
def test_a_metric_needs_a_name_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match="each needs a name"):
        classifier(metrics={name: lambda o, t: 0.0})


def test_data_with_a_generator_of_their_own_are_warned_about() -> None:
    class OwnNumbers(TensorDataset):
        generator = np.random.default_rng(0)

        def __getitem__(self, i: Any) -> Any:
            inputs, label = super().__getitem__(i)
            return inputs + float(self.generator.normal()), label

    with pytest.warns(UserWarning, match="the data of train= differ when the same batch is read twice"):
        check(classifier(train=OwnNumbers(*data())), CPU)


def test_a_correct_task_gives_no_warning_and_leaves_generators_as_they_were() -> None:
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info = check(classifier(train=DataLoader(TensorDataset(*data()), num_workers=1)), CPU)
    assert info.description == "Sequential (91 parameters), 48 + 32 samples"
    assert torch.equal(before, torch.get_rng_state())


def test_description_and_metrics_are_those_of_the_task() -> None:
    info = check(classifier(validation=data(16)), CPU)
    assert info.description.endswith("48 + 16 + 32 samples")
    assert [metric.name for metric in info.metrics] == ["accuracy"]
