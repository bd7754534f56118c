"""A tiny pretrained backbone and recipes that start from it."""

import builtins
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import split
from torch import Tensor

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.models.backbones import Backbone
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.storage.run_folder import CHECKPOINT

OPTIONS = {
    "width": 2, "batch_size": 16, "epochs": 2, "eval_every": 2, "seeds": 1, "device": "cpu", "threads": 1, "lr": 0.02,
    "pretrain_epochs": 1, "pretrain_on": "sample",
}  # fmt: skip


def recipe(**fields: object) -> Recipe:
    return RECIPES["finetune"][0].replace(**(OPTIONS | fields))


def pretrained(seed: int = 5) -> Backbone:
    """A backbone whose weights and running statistics are all unlike new ones."""
    torch.manual_seed(seed)
    model = PreActResNet18(2, stem_stride=2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor) if "running" in name else 0.1 * torch.randn_like(tensor))
    return Backbone(model, "head", "made for tests")


def dataset(start: Backbone | None = None) -> Dataset:
    return Dataset("digits", split(72, 0), split(50, 1), "made for tests", pretrained() if start is None else start)


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / CHECKPOINT, weights_only=True)["model"])


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(module: str, *args: Any, **kwargs: Any) -> types.ModuleType:
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


def run_of(method: str, seed: int = 0, **fields: object) -> Run:
    return Run(recipe(**fields), MethodSpec.parse(method), seed)
