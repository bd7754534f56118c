"""Every method on tasks of a user's own: it trains, or one clear line says before the training why it cannot."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_tasks import ON_ANY_MODEL, classifier, data, recipe_of, result
from tiny import CPU
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import steppe
from steppe.experiments.config.methods import METHODS
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.trial import try_methods
from support import rest_is_slow

INPUTS, LABELS = data()
NAMES = [name for name in ON_ANY_MODEL if METHODS[name].plain is None or name == "sgd"]


def attempt(task: Task, *methods: str, folder: Path = Path("nowhere"), **options: Any) -> None:
    try_methods(recipe_of(task, methods=methods, **options), task, RunFolder(folder), CPU)


# the other half is fast in test_run.py, which takes the same steps
@pytest.mark.parametrize("method", rest_is_slow(NAMES, lambda method: ON_ANY_MODEL.index(method) % 2 == 1))
def test_method_trains_a_classifier_to_the_same_bits_after_a_stop(method: str, tmp_path: Path) -> None:
    task, options = classifier(), {"base": "sgd", "lr": 0.05, "epochs": 6, "eval_every": 6}
    spec = {"saf": "saf:epochs_ago=1,start=1", "mesa": "mesa:beta=0.5,start=1"}.get(method, method)
    records, weights = result(task, tmp_path / "a", spec, **options)
    assert records[-1]["standardized_epoch"] == 6
    assert (records, weights) == result(task, tmp_path / "b", spec, stop_after=2, **options)


def without_momentum(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def with_samples(base: Optimizer, samples: int, model: nn.Module, rho: float = 0.05) -> Optimizer:
    assert samples > 0
    return steppe.SAM(base, rho, model=model)


def with_classes(base: Optimizer, classes: int, model: nn.Module, rho: float = 0.05) -> Optimizer:
    assert classes > 0
    return steppe.SAM(base, rho, model=model)


def test_method_gets_what_it_names_and_asks_the_task_for_nothing_else() -> None:
    attempt(classifier(classes=None), "bsam", f"{__name__}:with_samples")
    with pytest.raises(ExperimentError, match="with_classes cannot train this task: it needs the number of classes"):
        attempt(classifier(classes=None), f"{__name__}:with_classes")
    attempt(classifier(), f"{__name__}:with_classes")


def test_method_without_what_it_perturbs_along_is_named_before_anything_is_trained() -> None:
    with pytest.raises(ExperimentError, match=r"msam cannot train .* keeps no momentum.*, or use Adam or AdamW$"):
        attempt(classifier(optimizer=without_momentum), "msam")


class Dictionary(nn.Module):
    """Takes inputs by name, and returns its own loss where it gets labels, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, first: Tensor, second: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.linear(first + second)
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


class Logits(dict[str, Tensor]):
    """A mapping with attributes, as `ModelOutput` is."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class HuggingFace(Dictionary):
    def forward(self, first: Tensor, second: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return Logits(super().forward(first, second, labels))


def rows(n: int = 24) -> list[dict[str, Tensor]]:
    return [{"first": INPUTS[i], "second": INPUTS[-i], "labels": LABELS[i]} for i in range(n)]


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return rows()[i]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.cat([first, second], 1))
        return out


def of_two_inputs() -> Task:
    three = (INPUTS, INPUTS.flip(0), LABELS)
    return classifier(model=TwoInputs, train=three, test=three)


def of_dictionaries(**fields: Any) -> Task:
    return classifier(**{"model": HuggingFace, "train": Rows(), "test": Rows()} | fields)


class Graph:
    """A batch that is no collection of tensors."""

    def __init__(self, items: list[tuple[Tensor, Tensor]]) -> None:
        self.inputs, self.labels = map(torch.stack, zip(*items, strict=True))

    def to(self, device: torch.device) -> "Graph":
        return self


def of_objects() -> Task:
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=12, collate_fn=Graph)
    return classifier(train=loader, test=loader, predict=lambda model, batch: (model(batch.inputs), batch.labels))


PARTS = ("fraction_sam", "micro_batch_sam:m=5", "esam")


@pytest.mark.parametrize("method", ["base", "sam", "functional_sam", "sassha", *PARTS])
@pytest.mark.parametrize("make", [of_two_inputs, of_dictionaries])
def test_batches_of_several_inputs_and_of_names_can_be_cut(
    make: Callable[[], Task], method: str, tmp_path: Path
) -> None:
    task = make()
    attempt(task, method)
    records, _ = result(task, tmp_path, method)
    assert records[-1]["test_accuracy"] >= 0


def test_the_model_s_own_loss_is_the_same_as_that_of_the_task(tmp_path: Path) -> None:
    own, given = (
        result(of_dictionaries(loss=loss), tmp_path / str(loss is None))[1] for loss in (None, F.cross_entropy)
    )
    for name, values in own.items():  # they differ by the order of a division
        torch.testing.assert_close(torch.tensor(given[name]), torch.tensor(values), rtol=1e-5, atol=1e-7)


def test_a_fraction_of_one_is_sam_on_dictionaries(tmp_path: Path) -> None:
    whole = result(of_dictionaries(), tmp_path / "a", "fraction_sam:fraction=1.0")
    assert whole == result(of_dictionaries(), tmp_path / "b", "sam")


@pytest.mark.parametrize("method", ["sam", "functional_sam"])
@pytest.mark.parametrize("make", [of_two_inputs, of_dictionaries])
def test_accumulation_in_micro_batches_is_the_whole_batch_to_rounding(
    make: Callable[[], Task], method: str, tmp_path: Path
) -> None:
    whole, parts = (result(make(), tmp_path / str(n), method, accumulate=n)[1] for n in (1, 3))
    assert whole != parts
    for name, values in whole.items():
        torch.testing.assert_close(torch.tensor(parts[name]), torch.tensor(values), rtol=1e-4, atol=1e-6)


def test_functional_sam_of_a_linear_model_is_the_base(tmp_path: Path) -> None:
    for make in (of_two_inputs, of_dictionaries):
        steps = {"functional_sam:rho=0.5": 4, "base": 2}  # twice the compute, in half the passes each
        ours, base = (result(make(), tmp_path / make.__name__ / m, m, epochs=n)[1] for m, n in steps.items())
        for name, values in base.items():
            torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(values), rtol=1e-4, atol=1e-6)


LOSSES = {
    "without reduction=": lambda o, t: F.cross_entropy(o, t),
    "module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "function": F.cross_entropy,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", ["esam", "saf:epochs_ago=1,start=0", "mesa:start=0"])
def test_methods_that_need_each_sample_s_loss_take_any_mean(loss: str, method: str) -> None:
    attempt(classifier(loss=LOSSES[loss]), method)


def test_saf_without_its_term_is_the_base_on_the_task_s_own_loss(tmp_path: Path) -> None:
    task = classifier(loss=nn.CrossEntropyLoss(label_smoothing=0.3))
    saf, base = (result(task, tmp_path / m[:3], m)[1] for m in ("saf:lmbda=0.0,epochs_ago=1,start=1", "base"))
    for name, values in base.items():
        torch.testing.assert_close(torch.tensor(saf[name]), torch.tensor(values), rtol=1e-4, atol=1e-6)


def regression() -> Task:
    return classifier(
        model=lambda: nn.Linear(5, 1), train=(INPUTS, INPUTS[:, :1]), test=(INPUTS, INPUTS[:, :1]), loss=F.mse_loss,
        metrics={},
    )  # fmt: skip


WEIGHTS = torch.tensor([1.0, 2.0, 5.0])
IMPOSSIBLE: dict[str, tuple[Callable[[], Task], str, str]] = {
    "parts of objects": (of_objects, "fraction_sam", "tensors of a batch hold one sample in each row"),
    "losses of a model's own": (lambda: of_dictionaries(loss=None), "esam", "the model computes its loss itself"),
    "loss of a model's own": (lambda: of_dictionaries(loss=None), "functional_sam", "as a function of the outputs"),
    "Hessian of a model's own": (lambda: of_dictionaries(loss=None), "sassha", "as a function of the outputs"),
    "weighted loss": (
        lambda: classifier(loss=lambda o, t: F.cross_entropy(o, t, WEIGHTS)), "esam", "would minimize another loss",
    ),
    "no norm layers": (regression, "sam_on", "subset of parameters to perturb is empty"),
    "one output": (regression, "mesa:start=0", "so it would always be zero"),
    "no classes": (lambda: classifier(classes=None), "saf", "give the task classes="),
    "no pairs": (of_two_inputs, "mesa:start=0", "needs batches of pairs"),
    "a predict of its own": (
        lambda: classifier(predict=lambda model, batch: (model(batch[0]), batch[1])), "mesa", "predict= that would not",
    ),
    "an order of its own": (
        lambda: classifier(
            train=DataLoader(TensorDataset(INPUTS, LABELS), 12, sampler=WeightedRandomSampler([1.0] * 48, 48))
        ),
        "saf", "could not tell them apart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_method_that_cannot_train_the_task_is_named_before_the_training(case: str) -> None:
    make, method, wanted = IMPOSSIBLE[case]
    with pytest.raises(ExperimentError, match=f"^{method} cannot train this task: .*{wanted}") as caught:
        attempt(make(), "base", method)
    assert "\n" not in str(caught.value)


def test_accumulation_of_objects_raises() -> None:
    with pytest.raises(ExperimentError, match="accumulate=2 cuts a batch into parts"):
        attempt(of_objects(), "base", accumulate=2)


def test_clipping_without_steps_of_the_base_raises() -> None:
    with pytest.raises(ExperimentError, match="takes its steps without the base optimizer, so clip=1.0"):
        attempt(classifier(), "bsam", clip=1.0)


def test_nothing_is_tried_where_there_is_a_checkpoint_and_generators_stay(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    task = classifier()
    attempt(task, "base", "sam")
    result(task, tmp_path / "runs" / "sam-seed0")
    attempt(replace(task, optimizer=lambda model: 1 / 0), "sam", folder=tmp_path)
    with pytest.raises(ExperimentError, match=r"^base cannot train this task: .*division by zero, at .*1 / 0"):
        attempt(replace(task, optimizer=lambda model: 1 / 0), "base", folder=tmp_path)
    assert torch.equal(before, torch.get_rng_state())
