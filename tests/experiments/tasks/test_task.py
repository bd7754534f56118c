"""The data of a task: batches that can only be counted by reading them are read no more than needed."""

import inspect
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import cloudpickle  # type: ignore[import-untyped]
import pytest
import torch
from own_tasks import classifier, data, result
from torch import Tensor, nn

from steppe.experiments import compare, measure, tune
from steppe.experiments.errors import ExperimentError
from steppe.experiments.execution.prepared_task import OneTask
from steppe.experiments.report import page
from steppe.experiments.tasks.task import Metric, Task


class Batches:
    """Batches without a length, which know how often they were read to the end."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n, self.seed, self.ends = n, seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = data(self.n, self.seed)
        yield from zip(torch.split(inputs, 12), torch.split(targets, 12), strict=True)
        self.ends += 1


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write", lambda folder, recipe, results, summary: folder.path)


def test_misspelled_argument_gets_a_suggestion_and_the_signature_stays() -> None:
    with pytest.raises(TypeError, match=r"^Task\(\) has no argument 'metric'; did you mean 'metrics'\?$"):
        classifier(metric={})
    with pytest.raises(TypeError, match="'schedul'; did you mean 'schedule'"):
        replace(classifier(), schedul="cosine")  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"^Metric\(\) has no argument 'higher_better'; did you mean 'higher_is_better'"
    ):
        Metric(len, higher_better=False)  # type: ignore[call-arg]
    assert list(inspect.signature(Task).parameters)[:4] == ["model", "train", "test", "optimizer"]
    assert get_type_hints(Metric.__init__)["unit"] is str
    with pytest.raises(TypeError, match="missing 3 required positional arguments: 'train', 'test', and 'optimizer'"):
        Task(model=lambda: nn.Linear(1, 1))  # type: ignore[call-arg]


def test_arrays_and_tables_train_as_tensors_of_float32(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    inputs, labels = data()
    frozen = inputs.double().numpy()[::-1]
    frozen.setflags(write=False)
    arrays = classifier(train=(frozen, labels.numpy()[::-1]), test=(inputs.numpy(), labels.numpy().astype("uint8")))
    (x, y), (u, v) = (task_samples.tensors for task_samples in map(arrays.samples, ("train", "test")))  # type: ignore[attr-defined]
    assert (x.dtype, y.dtype, u.dtype, v.dtype) == (torch.float32, torch.int64, torch.float32, torch.uint8)
    assert torch.equal(x, inputs.flip(0))
    assert torch.equal(y, labels.flip(0))
    tables = classifier(train=(pandas.DataFrame(inputs.double().numpy()), pandas.Series(labels.numpy())))
    assert result(tables, tmp_path / "tables") == result(classifier(), tmp_path / "tensors")


def task_of_batches() -> tuple[Task, Batches, Batches]:
    train, test = Batches(48), Batches(24, seed=1)
    return classifier(train=train, test=test, batch_size=None), train, test


def test_batches_are_counted_once_a_comparison(tmp_path: Path) -> None:
    task, train, test = task_of_batches()
    compare(task, epochs=2, seeds=2, out=tmp_path / "run", quiet=True)
    assert (train.ends, test.ends) == (1, 1)  # an epoch reads as many batches as were counted, and not the end
    train.n = 36  # the next comparison counts what is there now
    compare(task, ["base"], epochs=1, seeds=1, out=tmp_path / "other", quiet=True)
    assert (train.ends, test.ends) == (2, 2)


def test_batches_are_counted_once_a_search(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    task, train, test = task_of_batches()
    validation = Batches(12, seed=2)
    task = replace(task, validation=validation)
    words = {"search": "rho=0.05,0.2", "sampler": "grid", "epochs": 1, "seeds": 1, "quiet": True}
    tune(task, "sam", out=tmp_path / "run", **words)  # type: ignore[arg-type]
    assert (train.ends, validation.ends) == (1, 1)
    assert test.ends <= 1


def test_batches_of_a_function_are_counted_once_a_seed(tmp_path: Path) -> None:
    made: dict[int, list[Batches]] = {}

    def train(seed: int) -> Batches:
        made.setdefault(seed, []).append(Batches(48, seed))
        return made[seed][-1]

    compare(classifier(train=train, batch_size=None), epochs=1, seeds=2, out=tmp_path / "run", quiet=True)
    assert {seed: sum(batches.ends for batches in each) for seed, each in made.items()} == {0: 1, 1: 1}


def test_counts_go_to_other_processes_with_the_task() -> None:
    task, train, _ = task_of_batches()
    sizes = task.samples("train").sizes
    sent = pickle.loads(cloudpickle.dumps(OneTask(task))).task
    assert sent.samples("train").sizes == sizes == [12, 12, 12, 12]
    assert sent.train is not train
    assert sent.train.ends == train.ends == 1


def test_flatness_of_data_without_single_samples_is_refused_by_what_the_user_wrote(tmp_path: Path) -> None:
    task, *_ = task_of_batches()
    with pytest.raises(ExperimentError, match="the train data decide .* and flatness_every=2 measures flatness on"):
        compare(task, epochs=4, flatness_every=2, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    for name, fields in (("train", {"test": data()}), ("test", {"train": data()})):
        result = compare(replace(task, **fields), ["base"], epochs=1, seeds=1, out=tmp_path / name, quiet=True)
        with pytest.raises(
            ExperimentError, match=f"the {name} data .* and steppe measure measures .* give {name}= as"
        ) as e:
            measure(result, quiet=True)
        assert "--" not in str(e.value)
