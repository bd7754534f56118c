"""The article's own style of loop, as such loops are written: a DataLoader, float32, eager, a look at each loss."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.datasets import MEAN, STD, Split
from steppe.experiments.models.preact_resnet import preact_resnet18


class Images(Dataset[tuple[Tensor, int]]):
    """Images that are normalized one by one."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split.images, split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return (self.images[index].float() / 255 - MEAN) / STD, int(self.labels[index])


class TwoSteps:
    """SAM by a loop over the parameters."""

    def __init__(self, parameters: Any, base: type[torch.optim.Optimizer], rho: float, **options: Any) -> None:
        self.parameters, self.rho = list(parameters), rho
        self.base = base(self.parameters, **options)
        self.places: list[Tensor] = []

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb."""
        length = torch.stack([p.grad.norm() for p in self.parameters if p.grad is not None]).norm() + 1e-12
        self.places = [p.clone() for p in self.parameters]
        for p in self.parameters:
            if p.grad is not None:
                p.add_(p.grad * (self.rho / length))
        if zero_grad:
            self.base.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Come back, and step."""
        for p, place in zip(self.parameters, self.places, strict=True):
            p.copy_(place)
        self.base.step()
        if zero_grad:
            self.base.zero_grad()


def classic(path: Path | None) -> Callable[..., Any]:
    """The class SAM of a file, or the one above."""
    if path is None:
        return TwoSteps
    spec = importlib.util.spec_from_file_location("classic_sam", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., Any] = module.SAM
    return found


class Article:
    """Called with a number of steps, it takes them."""

    def __init__(self, recipe: Recipe, method: str, split: Split, workers: int, sam: Callable[..., Any]) -> None:
        torch.manual_seed(0)
        self._device = torch.device(recipe.device)
        self._model = preact_resnet18(recipe.width, stem_stride=recipe.stem_stride).to(self._device)
        parameters = self._model.parameters()
        self._sam: Any = sam(parameters, torch.optim.SGD, rho=recipe.rho, lr=recipe.lr) if method == "sam" else None
        self._sgd = torch.optim.SGD(self._model.parameters(), lr=recipe.lr)
        loader = DataLoader(
            Images(split),
            recipe.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=recipe.device == "cuda",
        )
        self._batches = _for_ever(loader)

    def __call__(self, steps: int) -> float:
        """Take so many steps; return the sum of their losses."""
        total = 0.0
        for _ in range(steps):
            images, labels = (t.to(self._device) for t in next(self._batches))
            total += self._climb_and_step(images, labels) if self._sam is not None else self._step(images, labels)
        return total

    def _step(self, images: Tensor, labels: Tensor) -> float:
        self._sgd.zero_grad()
        loss = F.cross_entropy(self._model(images), labels)
        loss.backward()
        self._sgd.step()
        return loss.item()

    def _climb_and_step(self, images: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(self._model(images), labels)
        loss.backward()
        self._sam.first_step(zero_grad=True)
        F.cross_entropy(self._model(images), labels).backward()
        self._sam.second_step(zero_grad=True)
        return loss.item()


def _for_ever(loader: DataLoader[Any]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader
