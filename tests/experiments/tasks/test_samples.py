"""Data of every form: the same batches for all methods, and a resumed run ends with the same bits."""

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from own_tasks import classifier, data, result
from tiny import CPU
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks import samples as samples_module
from steppe.experiments.tasks.samples import LoaderSamples, as_samples
from steppe.experiments.tasks.task import Task
from support import rest_is_slow

INPUTS, LABELS = data()


class Augmented(Dataset[Any]):
    """Draws from all three global generators for each item."""

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(5) + np.random.rand() + random.random()
        return INPUTS[i] + 0.1 * noise, LABELS[i]


class Stream(IterableDataset[Any]):
    """Yields the samples in an order that it draws; each of several workers yields its share."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        own = range(len(LABELS)) if info is None else range(info.id, len(LABELS), info.num_workers)
        for i in np.random.permutation(list(own)):
            yield INPUTS[i] + 0.1 * torch.randn(5), LABELS[i]


def sampler() -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.rand(len(LABELS), generator=torch.Generator().manual_seed(0)), len(LABELS))


FORMS: dict[str, Callable[[], Any]] = {
    "tensors": data,
    "dataset": Augmented,
    "list of batches": lambda: list(zip(INPUTS.split(12), LABELS.split(12), strict=True)),
    "loader": lambda: DataLoader(Augmented(), batch_size=12, shuffle=True),
    "loader with two workers": lambda: DataLoader(
        Augmented(), batch_size=12, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "loader with a sampler": lambda: DataLoader(Augmented(), batch_size=12, sampler=sampler()),
    "loader with a sampler, a generator and a lasting worker": lambda: DataLoader(
        Augmented(), 12, sampler=sampler(), generator=torch.Generator(), num_workers=1, persistent_workers=True
    ),
    "iterable dataset": lambda: DataLoader(Stream(), batch_size=12),
    "iterable dataset with two workers": lambda: DataLoader(Stream(), batch_size=12, num_workers=2),
    "function of the seed": lambda: lambda seed: data(seed=seed),
}
every_form = pytest.mark.parametrize(
    "form", rest_is_slow(FORMS, lambda form: "worker" not in form or form == "loader with two workers")
)


@every_form
def test_a_run_stopped_within_an_epoch_ends_with_the_same_bits(form: str, tmp_path: Path) -> None:
    task = classifier(train=FORMS[form]())
    assert result(task, tmp_path / "a", stop_after=2) == result(task, tmp_path / "b")


class Recorder(nn.Module):
    """Keeps the batches that it is trained on; all passes of a step get the same one."""

    seen: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        Recorder.seen = []
        self.linear = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and (not self.seen or not torch.equal(self.seen[-1], inputs)):
            self.seen.append(inputs.clone())
        out: Tensor = self.linear(inputs)
        return out


def batches_of(method: str, folder: Path, task: Task, seed: int = 0) -> list[Tensor]:
    spec = MethodSpec.parse(method)
    epochs = 4 if method == "sam" else 2
    result(task, folder / f"{spec.folder}-{seed}", method, seed=seed, epochs=epochs, eval_every=epochs)
    return Recorder.seen


@every_form
def test_all_methods_of_a_seed_get_the_same_batches(form: str, tmp_path: Path) -> None:
    task = classifier(train=FORMS[form](), model=Recorder)
    base, sam = (batches_of(method, tmp_path, task) for method in ("base", "sam"))
    assert len(base) == 8
    assert all(map(torch.equal, base, sam))
    assert len(base) == len(sam)
    fixed = form == "list of batches"
    assert fixed == all(map(torch.equal, base[:4], base[4:]))
    other = batches_of("base", tmp_path, task, seed=1)
    assert fixed == all(map(torch.equal, base, other))


@every_form
def test_generators_of_the_caller_are_unchanged(form: str, tmp_path: Path) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    before = states()
    result(classifier(train=FORMS[form]()), tmp_path, epochs=1)
    assert states() == before


def test_evaluation_draws_the_same_numbers_each_time(tmp_path: Path) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(3)

    def frozen(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-12)

    task = classifier(test=Augmented(), model=lambda: Noisy(5, 3), optimizer=frozen)
    records, _ = result(task, tmp_path, "base", eval_every=1)
    first, second = ([value for key, value in r.items() if key.startswith("test_")] for r in records)
    assert first == pytest.approx(second, rel=1e-6)


def test_measuring_more_often_does_not_change_the_training(tmp_path: Path) -> None:
    task = classifier(train=Augmented(), test=Augmented())
    often, once = (result(task, tmp_path / str(n), epochs=4, eval_every=n)[1] for n in (1, 4))
    assert often == once


def test_numpy_in_the_model_is_seeded_and_resumes(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 3)
            self.register_buffer("start", torch.tensor(np.random.rand()))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + (0.1 * np.random.rand() + 0.1 * random.random()) * self.training)

    task = classifier(model=Scaled)
    assert result(task, tmp_path / "a", stop_after=2) == result(task, tmp_path / "b")


def test_sizes_of_batches_are_known_without_reading_where_a_sampler_has_a_length() -> None:
    class Unreadable(Augmented):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            raise AssertionError

    def sizes(drop_last: bool) -> list[int] | None:
        return LoaderSamples(DataLoader(Unreadable(), 20, sampler=sampler(), drop_last=drop_last)).sizes

    assert (sizes(drop_last=False), sizes(drop_last=True)) == ([20, 20, 8], [20, 20])


def test_an_object_with_to_is_moved_by_its_own_method() -> None:
    class Graph:
        def __init__(self, moved: bool = False) -> None:
            self.moved = moved

        def to(self, device: torch.device) -> "Graph":
            return Graph(moved=device == CPU.device)

    from steppe.experiments.tasks.samples import on_device

    assert on_device(Graph(), CPU.device).moved


def test_samples_of_a_loader_keep_its_batch_size_and_order() -> None:
    found = as_samples(DataLoader(Augmented(), batch_size=7), "train")
    assert (found.batch_size, found.shuffled, found.sizes) == (7, False, None)


class BreaksLate(Dataset[Any]):
    """Its last item raises an error, which a check of the first ones does not see."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == 23:
            raise KeyError("row 23 is damaged")
        return data()[0][i], data()[1][i]


def test_an_error_in_a_later_sample_names_the_run_and_the_line(tmp_path: Path) -> None:
    wanted = (
        r"sam-seed0 ended in epoch 1, .*\(KeyError: 'row 23 is damaged'\), at .*test_samples.py:\d+: raise KeyError"
    )
    with pytest.raises(ExperimentError, match=wanted):
        result(classifier(train=BreaksLate()), tmp_path)


def test_a_label_out_of_range_in_a_later_sample_names_the_run(tmp_path: Path) -> None:
    inputs, labels = data()
    labels = torch.cat([labels[:-1], torch.tensor([7])])
    wanted = r"sam-seed0 ended in epoch 1, .*\(IndexError: Target 7 is out of bounds\), with sample 47 of train"
    with pytest.raises(ExperimentError, match=wanted):
        result(classifier(train=(inputs, labels)), tmp_path)


@pytest.mark.parametrize("own_order", [False, True])
def test_workers_start_as_in_a_script_also_in_a_spawned_process(
    own_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *_: "spawn")
    order: dict[str, Any] = {"sampler": sampler()} if own_order else {"shuffle": True}
    # a spawned worker could not be given a lambda
    loader = DataLoader(Augmented(), batch_size=4, num_workers=1, collate_fn=lambda rows: len(rows), **order)
    samples = as_samples(loader, "train")
    started: list[str] = []

    def record(loader: DataLoader[Any]) -> Any:
        started.append(cast(Any, loader.multiprocessing_context)._name)
        return iter([()])

    monkeypatch.setattr(DataLoader, "__iter__", record)
    list(samples.fetch([torch.arange(4)], 0, 0, seed=0))
    assert started == [multiprocessing.get_all_start_methods()[0]]


class Slow(Dataset[Tensor]):
    """Each batch of four takes 0.6 s."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        time.sleep(0.15)
        return torch.zeros(1)


class Stuck(Dataset[tuple[Tensor, Tensor]]):
    """Gives two batches; the worker of the third one hangs."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == 8:
            self.lock.acquire()  # of a thread that was not forked with the worker
        return torch.zeros(3), torch.tensor(0)


@pytest.mark.parametrize(("own_order", "own_timeout"), [pytest.param(False, 0.0, marks=pytest.mark.slow), (True, 2.5)])
def test_worker_that_hangs_is_noticed(own_order: bool, own_timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "_SLICE", 0.25)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # until the worker is ended
    lock = multiprocessing.get_context("fork").Lock()
    lock.acquire()
    order: dict[str, Any] = {"batch_sampler": list(torch.arange(12).split(4))} if own_order else {"batch_size": 4}
    loader = DataLoader(Stuck(lock), num_workers=1, timeout=own_timeout, **order)
    batches = iter(as_samples(loader, "train", [4, 4, 4]).fetch(list(torch.arange(12).split(4)), 0, 0, seed=0))
    next(batches), next(batches)
    with pytest.raises(ExperimentError, match=r"^train: the workers .* gave no batch for 2.5 s.* num_workers=0"):
        next(batches)


def test_loader_waits_longer_than_one_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "_SLICE", 0.25)
    loader = DataLoader(Slow(), batch_size=4, num_workers=1)
    fetched = as_samples(loader, "train").fetch([torch.arange(4), torch.arange(4)], 0, 0, seed=0)
    assert [len(batch) for batch in fetched] == [4, 4]
