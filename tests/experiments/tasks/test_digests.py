"""A folder notices that its runs are of another task, and takes the same one for the same in every session."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_tasks import classifier, data
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from steppe.experiments import Metric, Task, compare
from steppe.experiments.errors import ExperimentError
from steppe.experiments.report import page
from steppe.experiments.storage.environment import record_session
from steppe.experiments.tasks.digests import digests

OPTIONS: dict[str, Any] = {"methods": ["base"], "epochs": 1, "seeds": 1, "device": "cpu", "quiet": True}
SETTINGS, SEEN = {"lr": 0.1}, list[int]()


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write", lambda folder, recipe, results, summary: folder.path)


class Focal(nn.Module):
    """A loss with a setting, and a count that it keeps."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma, self.calls = gamma, 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets) * self.gamma


def seen(outputs: Tensor, targets: Tensor) -> float:
    SEEN.append(len(targets))
    return 0.5


def by_rate(rate: float) -> Task:
    return classifier(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=rate))


def by_settings(rate: float) -> Task:
    SETTINGS["lr"] = rate
    return classifier(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=SETTINGS["lr"]))


def by_metric(number: float) -> Task:
    def helper(targets: Tensor) -> float:
        return number * len(targets)

    return classifier(metrics={"mine": Metric(lambda outputs, targets: helper(targets))})


def by_loader(seed: int) -> Task:
    return classifier(train=DataLoader(TensorDataset(*data(seed=seed)), batch_size=12, shuffle=True))


TWO: dict[str, tuple[Callable[[Any], Task], Any, Any, str]] = {
    "a number in a function": (by_rate, 0.1, 0.2, "optimizer"),
    "a number in settings": (by_settings, 0.1, 0.2, "optimizer"),
    "a number that a helper uses": (by_metric, 1.0, 2.0, "metrics"),
    "a setting of the loss": (lambda gamma: classifier(loss=Focal(gamma)), 1.0, 2.0, "loss"),
    "an argument of torch's loss": (
        lambda smoothing: classifier(loss=nn.CrossEntropyLoss(label_smoothing=smoothing)),
        0.0,
        0.1,
        "loss",
    ),
    "tensors": (lambda seed: classifier(train=data(seed=seed)), 0, 5, "train"),
    "a loader": (by_loader, 0, 5, "train"),
    "a function of the seed": (lambda n: classifier(train=lambda seed: data(seed=seed + n)), 0, 5, "train"),
    "the second task": (lambda seed: classifier(then=classifier(train=data(seed=seed))), 0, 5, "then.train"),
}


@pytest.mark.parametrize("case", TWO)
def test_digest_differs_in_the_part_that_does(case: str) -> None:
    make, one, other, part = TWO[case]
    first, again, second = digests(make(one)), digests(make(one)), digests(make(other))
    assert first == again
    assert {name for name in first if first[name] != second[name]} == {part}


def test_what_a_task_keeps_on_its_way_is_no_part_of_it() -> None:
    task = classifier(metrics={"seen": seen}, loss=Focal(1.0))
    before = digests(task)
    seen(*data())
    assert isinstance(task.loss, Focal)
    task.loss(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert digests(task) == before


CODE = """
import torch
from own_tasks import net
from steppe.experiments import Task
from steppe.experiments.tasks.digests import digests
x, y = torch.arange(40.0).reshape(8, 5), torch.arange(8) % 3
def loss(o, t):
    return torch.nn.functional.cross_entropy(o, t) if o.device.type in {"cpu", "cuda", "mps"} else o.sum()
print(digests(Task(net, (x, y), (x, y), lambda m: torch.optim.SGD(m.parameters(), lr=0.1), loss=loss)))
"""


@pytest.mark.slow
def test_digests_are_those_of_another_session_and_another_place_in_a_file(tmp_path: Path) -> None:
    printed = []
    for number in range(2):
        file = tmp_path / f"cell_{number}.py"
        file.write_text("\n" * number + CODE)
        given = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(number)}
        printed.append(subprocess.run([sys.executable, file], env=given, capture_output=True, text=True, check=True))
    assert printed[0].stdout == printed[1].stdout != ""


def test_another_task_of_the_same_shape_is_refused_and_the_same_one_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = compare(by_rate(0.1), **OPTIONS)
    assert compare(by_rate(0.1), **OPTIONS).table == first.table
    for part, other in (("optimizer", by_rate(0.2)), ("train", replace(by_rate(0.1), train=data(seed=5)))):
        message = rf"^runs/task has runs of another task than this one, whose {part}= differs: runs/base-seed0\. .*out="
        with pytest.raises(ExperimentError, match=message):
            compare(other, **OPTIONS)
    assert compare(by_rate(0.1), **OPTIONS).table == first.table, "a refused task leaves no trace"
    compare(by_rate(0.2), out=tmp_path / "other", **OPTIONS)


def test_task_that_is_mended_before_anything_was_trained_is_no_other_one(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="diverged"):
        compare(by_rate(float("nan")), out=tmp_path / "run", **OPTIONS)
    compare(by_rate(0.1), out=tmp_path / "run", **OPTIONS)


def sessions(folder: Path, make: Callable[[], None]) -> list[str]:
    """Record the sessions of a task by its name, and train a run in each; return what they warn of."""
    said = []
    for code, run in (("one", "base-seed0"), ("two", "base-seed1"), ("two", "sam-seed0")):
        (folder / "file.py").write_text(code)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make()
        said.append(" ".join(str(one.message) for one in caught))
        checkpoint = folder / "run" / "runs" / run / "checkpoint.pt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        if run == "base-seed0":
            os.utime(checkpoint, (checkpoint.stat().st_mtime - 5,) * 2)  # sessions are recorded by the second
    return said


@pytest.mark.parametrize("quiet", [True, False])
def test_runs_of_the_former_file_of_a_task_are_named(
    quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = type(sys)("own_file")
    module.__file__ = str(tmp_path / "file.py")
    monkeypatch.setitem(sys.modules, "own_file", module)
    environment = tmp_path / "run" / "environment.json"
    said = sessions(
        tmp_path, partial(record_session, environment, ["steppe"], Console(quiet=quiet, width=1000), "own_file:task")
    )
    note = "the file of own_file:task was changed since runs/base-seed0 in "
    assert [note in one for one in said] == ([False, True, True] if quiet else [False] * 3)
    assert capsys.readouterr().out.count(note) == (0 if quiet else 2)
