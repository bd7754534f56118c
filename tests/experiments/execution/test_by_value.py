import importlib
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
import torch

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.execution.by_value import Packed, pack_run, pack_task
from steppe.experiments.execution.prepared_task import NamedTask
from steppe.experiments.tasks.load import load_task

MODULE = """
import torch
import sent_helpers
from steppe import SAM
from steppe.experiments import Task

class Net(torch.nn.Linear):
    pass

def task():
    return Task(
        model=lambda: Net(3, 1),
        train=sent_helpers.data(),
        test=sent_helpers.data(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        loss=sent_helpers.loss,
    )

def own_sam(optimizer, rho=0.05):
    return SAM(optimizer, rho=rho)
"""
HELPERS = """
import torch.nn.functional as F
import torch

def data():
    return torch.ones(4, 3), torch.zeros(4, 1)

def loss(outputs, targets):
    return F.mse_loss(outputs, targets)
"""


def forget() -> None:
    for module in ("sent_task", "sent_helpers"):
        sys.modules.pop(module, None)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder: call `forget` and leave it, and its modules cannot be imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sent_task.py").write_text(MODULE)
    (tmp_path / "sent_helpers.py").write_text(HELPERS)
    importlib.invalidate_caches()
    yield tmp_path
    forget()


def unpickled_without_the_modules(folder: Path, content: bytes) -> Any:
    forget()
    for path in folder.glob("sent_*.py"):
        path.unlink()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sent_task")
    return pickle.loads(content)


def test_task_of_a_module_trains_where_the_module_is_not(elsewhere: Path) -> None:
    make_task = NamedTask(load_task("sent_task:task"), "sent_task:task", None)
    content = cloudpickle.dumps(pack_task(make_task))
    task = unpickled_without_the_modules(elsewhere, content)(Recipe())
    model = task.model()
    assert type(model).__name__ == "Net"
    assert task.evaluate(model, task.train).item() >= 0


def test_method_of_a_module_takes_a_step_where_the_module_is_not(elsewhere: Path) -> None:
    recipe = Recipe().replace(methods=["sgd", "sent_task:own_sam"])
    run = list(recipe.replace(seeds=1).runs())[1]
    received = unpickled_without_the_modules(elsewhere, cloudpickle.dumps(pack_run(run)))
    assert isinstance(received, Run)
    assert received == run
    assert received.name == run.name
    function = received.method.function
    assert function is not None
    assert type(function(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))).__name__ == "SAM"


def test_task_that_cannot_be_pickled_is_imported_by_its_name(elsewhere: Path) -> None:
    task = load_task("sent_task:task")
    object.__setattr__(task, "train", threading.Lock())
    make_task = NamedTask(task, "sent_task:task", None)
    assert pack_task(make_task) is make_task


def test_installed_packages_are_not_sent() -> None:
    assert isinstance(packed := pack_task(lambda recipe: torch.nn.Linear), Packed)  # type: ignore[arg-type,return-value]
    assert len(packed.content) < 2000
