"""A training loop in the article's style: a DataLoader, float32, eager, and every loss read on the host."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import classic_sam
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.datasets import MEAN, STD, Split
from steppe.experiments.models.preact_resnet import PreActResNet18


class Images(Dataset[tuple[Tensor, int]]):
    """Images that are normalized one by one."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split.images, split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return (self.images[index].float() / 255 - MEAN) / STD, int(self.labels[index])


class LoopSAM:
    """SAM with a Python loop over the parameters and the classic API."""

    def __init__(self, parameters: Any, base: type[torch.optim.Optimizer], rho: float, **options: Any) -> None:
        self.parameters, self.rho = list(parameters), rho
        self.base = base(self.parameters, **options)
        self.backup: list[Tensor] = []

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights."""
        length = torch.stack([p.grad.norm() for p in self.parameters if p.grad is not None]).norm() + 1e-12
        self.backup = [p.clone() for p in self.parameters]
        for p in self.parameters:
            if p.grad is not None:
                p.add_(p.grad * (self.rho / length))
        if zero_grad:
            self.base.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and update them."""
        for p, value in zip(self.parameters, self.backup, strict=True):
            p.copy_(value)
        self.base.step()
        if zero_grad:
            self.base.zero_grad()


def sam_class(path: Path | None) -> Callable[..., Any]:
    """Return the class SAM of the classic implementation's file, or LoopSAM without one."""
    if path is None:
        return LoopSAM
    found: Callable[..., Any] = classic_sam.load(path).SAM
    return found


class ArticleLoop:
    """Takes as many training steps as it is called with."""

    def __init__(self, recipe: Recipe, method: str, split: Split, workers: int, sam: Callable[..., Any]) -> None:
        torch.manual_seed(0)
        self._device = torch.device(recipe.hardware.device)
        self.network = PreActResNet18(recipe.model.width, stem_stride=recipe.model.stem_stride).to(self._device)
        parameters = self.network.parameters()
        self._sam: Any = (
            sam(parameters, torch.optim.SGD, rho=recipe.training.rho, lr=recipe.training.lr)
            if method == "sam"
            else None
        )
        self._sgd = torch.optim.SGD(self.network.parameters(), lr=recipe.training.lr)
        loader = DataLoader(
            Images(split),
            recipe.training.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=recipe.hardware.device == "cuda",
        )
        self._batches = _endless(loader)

    def __call__(self, steps: int) -> float:
        """Take `steps` steps; return the sum of their losses."""
        take = self._sgd_step if self._sam is None else self._sam_step
        total = 0.0
        for _ in range(steps):
            images, labels = (t.to(self._device) for t in next(self._batches))
            total += take(images, labels)
        return total

    def _sgd_step(self, images: Tensor, labels: Tensor) -> float:
        self._sgd.zero_grad()
        loss = F.cross_entropy(self.network(images), labels)
        loss.backward()
        self._sgd.step()
        return loss.item()

    def _sam_step(self, images: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(self.network(images), labels)
        loss.backward()
        self._sam.first_step(zero_grad=True)
        F.cross_entropy(self.network(images), labels).backward()
        self._sam.second_step(zero_grad=True)
        return loss.item()


def _endless(loader: DataLoader[Any]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader
