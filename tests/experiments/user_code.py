"""A user's own module, weights and data, measured with `steppe measure --model`."""

import dataclasses
import io
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from steppe.experiments.measuring import jobs, user_model
from steppe.experiments.measuring.jobs import MeasuringOptions
from steppe.experiments.measuring.user_model import UserModel, measure_user_model
from steppe.flatness import Objective

BUDGET = dataclasses.replace(tiny.BUDGET, m=4)

CODE = '''
"""A user's own module."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

calls = 0

def net():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

ready_made = net()

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.outer.weight = self.inner.weight
    def forward(self, x):
        return self.outer(self.inner(x))

def nothing():
    return "no network"

def broken():
    raise KeyError("first line\\nsecond line")

def x_y(n=30):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)

def pair():
    return x_y()

def drawn():
    return torch.randn(30, 4), torch.randint(3, (30,))

class Restless:
    """A factory with a generator of its own, which advances from call to call."""
    g = torch.Generator()
    def __call__(self):
        return torch.randn(30, 4, generator=self.g), torch.randint(3, (30,), generator=self.g)

restless = Restless()

def uneven():
    return torch.randn(30, 4), torch.zeros(29)

def dataset():
    return TensorDataset(*x_y())

class Dicts(Dataset):
    def __len__(self):
        return 30
    def __getitem__(self, i):
        x, y = x_y()
        return {"x": x[i], "y": y[i]}

def dicts():
    return Dicts()

class Ragged(Dataset):
    def __len__(self):
        return 9
    def __getitem__(self, i):
        return torch.ones(i + 1), 0

def ragged():
    return Ragged()

class Stream(IterableDataset):
    def __iter__(self):
        return iter(())

def stream():
    return Stream()

def loader():
    return DataLoader(TensorDataset(*x_y()), batch_size=7, shuffle=True)

class Fading(list):
    """Batches that change at the sixth pass."""
    passes = 0
    def __iter__(self):
        self.passes += 1
        return iter([(x + (self.passes > 5), y) for x, y in list.__iter__(self)])

def fading():
    return Fading([x_y()])

def once():
    return iter([x_y()])

def a_dict():
    return {"x": 1}

def a_number():
    return 3

def not_a_number():
    x, y = x_y()
    return x * float("nan"), y

def real_targets():
    return x_y()[0], torch.ones(30, 3)

def in_two_classes():
    return x_y()[0], torch.zeros(30, dtype=torch.int64)

def two_classes():
    return nn.Linear(4, 2)

def of_dicts(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])

def with_outputs(model, batch):
    outputs = model(batch["x"])
    return F.cross_entropy(outputs, batch["y"]), outputs

def each(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g

def once_differentiable():
    class Net(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))
    return Net(4, 3)
'''


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a user's code."""
    (tmp_path / "user_module.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "careless.py").write_text("import not_installed_anywhere")
    (tmp_path / "failing.py").write_text("None.strip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(user_model, "draw", lambda groups, folder, caption: [])  # figures take long
    yield tmp_path
    for module in ("user_module", "careless", "failing"):
        sys.modules.pop(module, None)


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    made[1].running_mean.uniform_()
    return made


def weights(*seeds: int) -> tuple[Path, ...]:
    for seed in seeds:
        torch.save(net(seed).state_dict(), f"w{seed}.pt")
    return tuple(Path(f"w{seed}.pt") for seed in seeds)


def go(model: str = "net", data: str = "pair", *, samples: int = 30, width: int = 80, **options: Any) -> str:
    """Measure with objects of the user's module; return the output."""
    for option in ("evaluate", "loss"):
        if option in options and ":" not in options[option]:
            options[option] = f"user_module:{options[option]}"
    console = Console(file=io.StringIO(), width=width)
    given = UserModel(f"user_module:{model}", f"user_module:{data}", **options)
    measuring = MeasuringOptions(samples=samples, batch_size=16, budget=BUDGET, processes=1)
    measure_user_model(given, measuring, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def written(name: str) -> dict[str, Any]:
    return json.loads(Path("flatness", f"{name}.json").read_text())  # type: ignore[no-any-return]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(30, 4, generator=g), torch.randint(3, (30,), generator=g)


def loss(seed: int) -> float:
    return float(Objective(net(seed), data(), loss=F.cross_entropy).loss())


@pytest.fixture
def measured_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the jobs that are measured."""
    names: list[str] = []
    measure_job = jobs.measure_job

    def record(job: Any, progress: Any) -> None:
        names.append(job.name)
        measure_job(job, progress)

    monkeypatch.setattr(jobs, "measure_job", record)
    return names
