"""Our loop, choice by choice: each is a run of `steppe.experiments.training.run`, driven batch by batch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from steppe.experiments.config.methods import BASES
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.batches import Batch, batches, order
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.training import run as training
from steppe.experiments.world import World

_FIELDS = ("amp", "channels_last", "compile", "cuda_graphs")


@dataclass(frozen=True)
class Choice:
    """How our loop computes; the data lie on the device in each of them."""

    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    fused: bool = False
    """torch's fused SGD; training takes it on a GPU always."""
    free: bool = False
    """cuDNN chooses the fastest kernels by trying, deterministic or not; training never does."""

    @property
    def fields(self) -> dict[str, bool]:
        """The fields of a recipe that make it."""
        return {name: getattr(self, name) for name in _FIELDS}

    @property
    def on_offer(self) -> bool:
        """Whether a recipe can ask for it, on a GPU."""
        return self.fused and not self.free


def choices(device: str, *, tiny: bool = False) -> dict[str, Choice]:
    """What is tried, what matters most first."""
    plain, quick = Choice(), Choice(amp=True, channels_last=True, fused=True, cuda_graphs=True)
    if device == "cpu":
        both = Choice(amp=True, channels_last=True)
        found = {
            "data on the device": plain,
            "bf16 + channels-last": both,
            "bf16": Choice(amp=True),
            "channels-last": Choice(channels_last=True),
        }
        compiled = {"bf16 + channels-last + compiled": replace(both, compile=True), "compiled": Choice(compile=True)}
        return found if tiny else found | compiled
    return {
        "data on the device": plain,
        "all but compiled": quick,
        "all": replace(quick, compile=True),
        "bf16": Choice(amp=True),
        "channels-last": Choice(channels_last=True),
        "fused": Choice(fused=True),
        "CUDA graphs": Choice(cuda_graphs=True),
        "bf16 + channels-last": Choice(amp=True, channels_last=True),
        "all but graphs and compiled": replace(quick, cuda_graphs=False),
        "all but channels-last and compiled": replace(quick, channels_last=False),
        "all but bf16 and compiled": replace(quick, amp=False),
        "all but compiled, any cuDNN kernel": replace(quick, free=True),
        "all, any cuDNN kernel": replace(quick, compile=True, free=True),
        "all but graphs": replace(quick, cuda_graphs=False, compile=True),
        "all but channels-last": replace(quick, channels_last=False, compile=True),
        "compiled": Choice(compile=True),
    }


class Ours:
    """Called with a number of steps, it takes them."""

    def __init__(self, recipe: Recipe, method: str, data: Dataset, choice: Choice) -> None:
        recipe = replace(recipe, methods=(method,), **choice.fields)
        self._choice, self._world = choice, World(torch.device(recipe.device))
        with self._kernels(), mock.patch.object(training, "BASES", BASES if choice.fused else _unfused()):
            self.run = training.Training(next(recipe.runs()), data, self._world)
        self._batches = self._for_ever()
        self._total = torch.zeros((), dtype=torch.float64, device=self._world.device)

    def __call__(self, steps: int) -> Tensor:
        """Take so many steps; return the sum of the losses so far, which nobody has waited for."""
        with self._kernels():
            for batch in islice(self._batches, steps):
                self._total += self.run.step(batch)
        return self._total

    def _kernels(self) -> AbstractContextManager[Any]:
        if self._world.device.type == "cpu":
            return nullcontext()
        cudnn, free = torch.backends.cudnn, self._choice.free
        return cudnn.flags(enabled=cudnn.enabled, benchmark=free, deterministic=not free, allow_tf32=cudnn.allow_tf32)

    def _for_ever(self) -> Iterator[Batch]:
        run = self.run
        for epoch in count():
            indices = order(run.images, run.run.seed, epoch)
            yield from batches(run.data.train, run.run.recipe.batch_size, indices, self._world, epoch=epoch)


def _unfused() -> dict[str, Any]:
    """The bases as they are on a CPU."""

    def build(name: str, *args: Any, on_gpu: bool) -> torch.optim.Optimizer:
        return BASES[name].build(*args)

    return {name: replace(base, build=lambda *a, name=name, **k: build(name, *a, **k)) for name, base in BASES.items()}
