import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_tasks import classifier, data, net, recipe_of, run_of
from tiny import CPU, dataset, recipe, untimed

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data.accuracy import accuracy
from steppe.experiments.data.batches import order
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.prepared_task import OneTask
from steppe.experiments.storage.checkpoint_file import load
from steppe.experiments.storage.checkpoints import owner
from steppe.experiments.storage.records import AFTER, AVERAGED, FORGOTTEN, ON_SECOND
from steppe.experiments.storage.run_folder import CHECKPOINT
from steppe.experiments.tasks.images import images_task, second_dataset
from steppe.experiments.tasks.load import with_task
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.run import train
from steppe.experiments.training.stopping import Stopped
from stops import StopAfter

NEW = (-data(36, seed=2)[0], data(36, seed=2)[1])
EPOCHS = 2
EXTRA = 1  # training goes on after the first measurement of forgetting


def two_tasks() -> Task:
    return classifier(then=classifier(train=NEW, test=(-data(32, seed=3)[0], data(32, seed=3)[1])))


def trained(folder: Path, task: Task, method: str = "sam", stop: Any = None, then_lr: float | None = None) -> list[Any]:
    run = run_of(task, method, then_epochs=EPOCHS, then_lr=then_lr, extra_epochs=EXTRA)
    return train(run, folder, task, CPU, stop=stop)


def without_second(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.endswith((AFTER, FORGOTTEN, ON_SECOND))}


@pytest.mark.parametrize("then_lr", [None, 0.03])
def test_copy_is_trained_by_the_base_alone_and_the_run_is_unchanged(tmp_path: Path, then_lr: float | None) -> None:
    task, alone = two_tasks(), classifier()
    *earlier, last = trained(tmp_path / "two", task, then_lr=then_lr)
    assert list(map(without_second, untimed([*earlier, last]))) == untimed(trained(tmp_path / "one", alone))
    assert any(AFTER in name for name in earlier[-1].measures)
    run = run_of(task, "sam", then_epochs=EPOCHS, then_lr=then_lr, extra_epochs=EXTRA)
    first = run_of(alone, "sam", then_epochs=EPOCHS, extra_epochs=EXTRA)
    state, other = (
        load(tmp_path / name / CHECKPOINT, owner(of, 1, None)) for name, of in (("two", run), ("one", first))
    )
    assert all(map(torch.equal, state["model"].values(), other["model"].values()))
    torch.manual_seed(run.seed)
    model = net()
    model.load_state_dict(state["model"])
    optimizer, (inputs, targets) = task.optimizer(model), NEW
    for group in optimizer.param_groups:
        group["lr"] = then_lr or group["lr"]
    for epoch in range(EPOCHS):
        for positions in torch.split(order(len(targets), run.seed, epoch), 12):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[positions]), targets[positions]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        old, new = (accuracy(model(x), y) for x, y in (task.test, task.then.test))  # type: ignore[union-attr]
    assert last[f"test_accuracy{AFTER}"] == pytest.approx(old)
    assert last[f"test_accuracy{ON_SECOND}"] == pytest.approx(new)
    assert last[f"test_accuracy{FORGOTTEN}"] == pytest.approx(last["test_accuracy"] - old)
    assert new > last["test_accuracy"] - 100 * 2 / 3  # it is learned at all


def test_run_stopped_within_the_second_task_ends_with_the_same_numbers(tmp_path: Path) -> None:
    task, counted = two_tasks(), StopAfter(1000)
    whole = untimed(trained(tmp_path / "whole", task, stop=counted))
    trained(tmp_path / "one", classifier(), stop=(without := StopAfter(1000)))
    evaluated = 3 + 3  # batches of the two tests after it
    assert without.left - counted.left == 2 * (evaluated + EPOCHS * 3)
    for left in (evaluated, evaluated + 2):
        with pytest.raises(Stopped):
            trained(tmp_path / f"{left}", task, stop=StopAfter(1000 - counted.left - 1 - left))
        assert untimed(trained(tmp_path / f"{left}", task)) == whole


def test_averaged_networks_are_measured_after_the_second_task_with_averaged_weights(tmp_path: Path) -> None:
    task = replace(two_tasks(), test=data(640, seed=4))  # so many that equal accuracies are no coincidence
    *_, own = trained(tmp_path / "own", task, "base")
    *_, averaged = trained(tmp_path / "averaged", task, "base+ema")
    assert own[f"test_accuracy{AFTER}"] != averaged[f"test_accuracy{AFTER}"]
    base, rival = MethodSpec.parse("base"), MethodSpec.parse("sam")
    compared = recipe_of(task, methods=(base, rival), then_epochs=EPOCHS)
    *_, at_end = train(Run(compared, base, 0), tmp_path / "beside", task, CPU)
    for name in (AFTER, FORGOTTEN, ON_SECOND):
        assert at_end[f"test_accuracy{name}{AVERAGED}"] == averaged[f"test_accuracy{name}"]


def test_second_task_travels_with_the_first() -> None:
    sent = pickle.loads(pickle.dumps(OneTask(two_tasks())))(Recipe())
    assert torch.equal(sent.then.train[0], NEW[0])


def test_second_task_that_the_model_cannot_take_is_refused_before_training() -> None:
    task = replace(two_tasks(), then=classifier(train=(torch.randn(8, 7), torch.zeros(8, dtype=torch.long))))
    with pytest.raises(ExperimentError, match=r"^the second task, with the model of the first: .*\(4, 7\)"):
        with_task(recipe_of(classifier()).replace(task="in:python"), task)


def test_learning_rate_of_a_second_task_that_is_not_there_is_refused() -> None:
    with pytest.raises(ExperimentError, match=r"then_lr=0.1: the task has no second one"):
        with_task(recipe_of(classifier()).replace(task="in:python", then_lr=0.1), classifier())


def test_images_of_the_second_task_are_rotated_or_inverted_or_others() -> None:
    first = dataset()
    rotated, inverted = (second_dataset(name, first, None) for name in ("rotated", "inverted"))
    assert torch.equal(inverted.test.images, 255 - first.test.images)
    assert torch.equal(rotated.train.images[3, 0, 0], first.train.images[3, 0, :, -1])
    task = images_task(first, recipe(), second=inverted)
    assert task.then is not None
    assert torch.equal(task.then.samples("train").tensors[0], inverted.train.images)  # type: ignore[attr-defined]
    assert len(second_dataset("sample", first, None).test) == 3000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"then": "birds:task"}, "then=birds:task: a task of your own comes after another of your own only, because"),
        ({"then": "rotatd"}, "'rotatd' is unknown; did you mean 'rotated'"),
        ({"then": "sample"}, "then=sample: it is the first task"),
        ({"then": "rotated", "then_epochs": 0}, "then_epochs=0"),
        ({"then": "rotated", "then_lr": 0.0}, "then_lr=0.0"),
        ({"then_lr": 0.1}, "then_lr=0.1: no second task is named"),
    ],
)
def test_invalid_second_task_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_first_task_of_a_user_needs_a_second_one_of_theirs() -> None:
    with pytest.raises(ValueError, match="another of your own, package.module:task"):
        recipe_of(classifier()).replace(task="in:python", then="rotated")
