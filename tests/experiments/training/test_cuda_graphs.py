"""Steps by graphs are the steps without: rehearsed on a CPU, with a recorder that does what a CUDA graph does."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from tiny import CPU, batches_of, dataset, recipe, samples, train_run, training_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from steppe._tensors import in_place
from steppe.experiments.config.methods import BASES, METHODS, Base
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data.batches import order
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks import images
from steppe.experiments.tasks.batches import Batch
from steppe.experiments.training import cuda_graphs as graphs
from steppe.experiments.training.cuda_graphs import Stepper, recorder
from steppe.experiments.training.stopping import Stopped
from steppe.experiments.world import World
from stops import StopAfter
from support import rest_is_slow

T = TypeVar("T")
CAPTURABLE = [name for name, method in METHODS.items() if method.capturable]
# of the methods that do not perturb at every step, so that both kinds of step are recorded in a short run
AT_SOME_STEPS = {"looksam": "looksam:interval=2", "late_sam": "late_sam:start=0.5", "random_sam": "random_sam:p=0.5"}

NETWORK = images._network
TRAIN = samples(dataset().train)


def places(values: object) -> dict[int, Tensor]:
    return {t.untyped_storage().data_ptr(): t for t in tree_leaves(values) if isinstance(t, Tensor)}


class Recording(TorchDispatchMode):
    """Every operation below autograd, with its tensors; and what the tensors from outside were before it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self.inside: dict[int, Tensor] = {}
        self.outside: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = places((args, kwargs))
        for place, tensor in given.items():
            if place not in self.inside and place not in self.outside:
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self.outside[place] = whole, whole.clone()
        out = func(*args, **kwargs)
        new = {place: t for place, t in places(out).items() if place not in given}
        self.inside |= new
        self.operations.append((func, args, kwargs, out, set(new)))
        return out


class StandIn:
    """Records on a CPU: a recording leaves all tensors as they were, and a replay is operations and no Python."""

    made: list["StandIn"]

    def __init__(self, device: torch.device) -> None:
        self.warmed, self.recorded, self.replayed = 0, 0, 0
        type(self).made.append(self)

    def warm(self, work: Callable[[], T]) -> T:
        self.warmed += 1
        return work()

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        self.recorded += 1
        with Recording() as recording:
            result = work()
        for tensor, before in recording.outside.values():
            tensor.copy_(before)

        def replay() -> None:
            self.replayed += 1
            with torch._C._AutoDispatchBelowAutograd():
                for func, args, kwargs, out, new in recording.operations:
                    found = tree_leaves(func(*args, **kwargs))
                    for target, value in zip(tree_leaves(out), found, strict=True):
                        if isinstance(target, Tensor) and target.untyped_storage().data_ptr() in new:
                            target.data.copy_(value)

        return result, replay


def fused_adamw(parameters, lr: float, momentum: float, weight_decay: float, **options: object) -> torch.optim.AdamW:
    """As on a GPU: the plain one on a CPU reads its step counter on the host."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    StandIn.made = []
    monkeypatch.setattr(images, "_network", small)
    monkeypatch.setattr(images, "BASES", {**BASES, "adamw": Base(fused_adamw, has_momentum=False)})
    monkeypatch.setattr(graphs, "RECORDERS", {"cpu": StandIn})
    monkeypatch.setattr(in_place, "_HOST", "")
    return StandIn


def make_run(method: str, **fields: object) -> Run:
    base = "adamw" if method == "adamw" else "sgd"
    given = {"base": base, "epochs": 8, "eval_every": 2, "cuda_graphs": True, **fields}
    return next(recipe(methods=(method,), **given).runs())


def small(data: Dataset, recipe: Recipe) -> nn.Module:
    """A network with all kinds of layers that the real one has."""
    convolution = nn.Conv2d(1, 4, 3, stride=3, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9 * 9, 10))


def one_by_one(given: Run) -> Run:
    return dataclasses.replace(given, recipe=given.recipe.replace(cuda_graphs=False))


def kept(folder: Path) -> dict[str, Any]:
    """All that a checkpoint holds, without the times and without whose it is."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["records"] = [
        {k: v for k, v in r.items() if not k.startswith(("seconds", "images"))} for r in state["records"]
    ]
    return {k: v for k, v in state.items() if k not in ("owner", "seconds")}


def assert_same(found: Any, wanted: Any) -> None:
    (ours, shape), (theirs, other) = tree_flatten(found), tree_flatten(wanted)
    assert shape == other
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", rest_is_slow(CAPTURABLE, lambda method: method in CAPTURABLE[::2]))
def test_graphs_take_the_same_steps(method: str, tmp_path: Path, stand_in: type[StandIn]) -> None:
    """Two sizes of batch, a measurement between replays, and all that the checkpoint knows."""
    kinds = 4 if method in AT_SOME_STEPS else 2
    given = make_run(AT_SOME_STEPS.get(method, method), epochs=4 * kinds, batch_size=24)
    images = dataset(71)  # in batches of 24, 24 and 23
    train_run(one_by_one(given), tmp_path / "eager", images)
    assert not stand_in.made
    records = train_run(given, tmp_path / "graphs", images)
    (recorder,) = stand_in.made
    assert (recorder.warmed, recorder.recorded) == (3 * kinds, kinds)
    assert recorder.replayed == records[-1].steps - 3 * kinds
    assert_same(kept(tmp_path / "graphs"), kept(tmp_path / "eager"))


STOPPED = ["sgd", "sam", "fraction_sam:fraction=0.5", "friendly_sam", "looksam:interval=2"]


@pytest.mark.parametrize("method", rest_is_slow(STOPPED, lambda m: m in ("sam", STOPPED[-1])))
def test_a_stopped_run_resumes_with_graphs(method: str, tmp_path: Path, stand_in: type[StandIn]) -> None:
    given = make_run(method, epochs=12, checkpoint_seconds=0)
    train_run(one_by_one(given), tmp_path / "eager")
    for steps in (2, 19):  # before the first graph, and after replays in the middle of an epoch
        with pytest.raises(Stopped):
            train_run(given, tmp_path / "graphs", stop=StopAfter(steps))
    train_run(given, tmp_path / "graphs")
    assert [bool(recorder.replayed) for recorder in stand_in.made] == [False, True, True]
    assert_same(kept(tmp_path / "graphs"), kept(tmp_path / "eager"))


def test_the_real_network_under_autocast(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_network", NETWORK)
    given = make_run("sam", amp=True, channels_last=True, epochs=4)
    train_run(one_by_one(given), tmp_path / "eager")
    train_run(given, tmp_path / "graphs")
    assert stand_in.made[0].replayed
    assert_same(kept(tmp_path / "graphs"), kept(tmp_path / "eager"))


def test_another_batch_size_and_a_measurement_between_steps(stand_in: type[StandIn]) -> None:
    """A few steps of a size that has no graph, amid replays; measuring changes modes and runs other shapes."""
    weights, losses = [], []
    for given in (make_run("sam"), one_by_one(make_run("sam"))):
        moving = training_of(given)
        train = moving.samples["train"]
        cut = [0, *range(7, 71, 8)]  # of 7 and of 8
        found: list[float] = []
        for epoch in range(4):
            indices = order(71, 0, epoch)
            parts = [indices[a:b] for a, b in pairwise(cut)] + [indices[:3]]
            found += [float(moving.step(Batch(train.gather, part, len(part), epoch))) for part in parts]
            moving.measure(lambda: None)
        losses.append(found)
        weights.append(moving.network.state_dict())
    assert (stand_in.made[0].warmed, stand_in.made[0].recorded) == (9, 3)
    assert losses[0] == losses[1]
    assert_same(*weights)


def test_the_step_counter_is_that_of_all_steps(stand_in: type[StandIn]) -> None:
    moving = training_of(make_run("sam"))
    for epoch in range(3):
        for batch in batches_of(dataset().train, 16, epoch=epoch):
            moving.step(batch)
    assert moving.steps == 15
    assert [group["sam_step"] for group in moving.optimizer.state_dict()["param_groups"]] == [15]
    assert moving.spent == 15 / 5 * 2 * 72


def test_which_runs_use_graphs(stand_in: type[StandIn]) -> None:
    assert recorder(make_run("sam"), CPU, TRAIN) is not None
    assert recorder(make_run("sam", cuda_graphs=True), CPU, TRAIN) is not None
    assert recorder(make_run("sam", cuda_graphs=False), CPU, TRAIN) is None
    assert recorder(make_run("sam"), World(CPU.device, 0, 2), TRAIN) is None
    assert recorder(make_run("sam", backbone="timm:resnet18"), CPU, TRAIN) is None
    for host in ("aesam", "rwp", "sparse_sam", "mesa"):
        assert recorder(make_run(host), CPU, TRAIN) is None


def test_no_graphs_on_a_cpu() -> None:
    assert recorder(make_run("sam"), CPU, TRAIN) is None


def test_a_failed_capture_reports_the_remedy() -> None:
    def record(work: Callable[[], T]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing.\nmore")

    def take(batch: Batch) -> None:
        steps.append(len(batch))

    steps: list[int] = []
    by_graphs = Stepper(
        take, torch.optim.SGD([torch.zeros(1)]), SimpleNamespace(warm=lambda work: work(), record=record)
    )
    batch = next(batches_of(dataset().train, 16))
    for _ in range(3):
        by_graphs(batch)
    with pytest.raises(ExperimentError, match=r"stream is capturing\): use --no-cuda-graphs"):
        by_graphs(batch)
    assert len(steps) == 3
