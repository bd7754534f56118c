"""Steppe's training loop in several configurations: `steppe.experiments.training.run`, one batch at a time."""

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
from steppe.experiments.data.datasets import Dataset
from steppe.experiments.tasks import images
from steppe.experiments.tasks.batches import Batch, Epochs
from steppe.experiments.training.run import Training
from steppe.experiments.world import World

_FIELDS = ("amp", "channels_last", "compile", "cuda_graphs")


@dataclass(frozen=True)
class Configuration:
    """Options of Steppe's loop. The data are on the device in every configuration."""

    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    fused: bool = False
    """torch's fused SGD, which training always uses on a GPU."""
    any_kernel: bool = False
    """cuDNN benchmarks all kernels, deterministic or not, which training never does."""

    @property
    def fields(self) -> dict[str, bool]:
        """The fields of a recipe with this configuration."""
        return {name: getattr(self, name) for name in _FIELDS}

    @property
    def in_recipe(self) -> bool:
        """True if a recipe can select this configuration on a GPU."""
        return self.fused and not self.any_kernel


def configurations(device: str, *, tiny: bool = False) -> dict[str, Configuration]:
    """Return the configurations by name, the most important first."""
    plain, quick = Configuration(), Configuration(amp=True, channels_last=True, fused=True, cuda_graphs=True)
    if device == "cpu":
        both = Configuration(amp=True, channels_last=True)
        found = {
            "data on the device": plain,
            "bf16 + channels-last": both,
            "bf16": Configuration(amp=True),
            "channels-last": Configuration(channels_last=True),
        }
        compiled = {
            "bf16 + channels-last + compiled": replace(both, compile=True),
            "compiled": Configuration(compile=True),
        }
        return found if tiny else found | compiled
    return {
        "data on the device": plain,
        "all but compiled": quick,
        "all": replace(quick, compile=True),
        "bf16": Configuration(amp=True),
        "channels-last": Configuration(channels_last=True),
        "fused": Configuration(fused=True),
        "CUDA graphs": Configuration(cuda_graphs=True),
        "bf16 + channels-last": Configuration(amp=True, channels_last=True),
        "all but graphs and compiled": replace(quick, cuda_graphs=False),
        "all but channels-last and compiled": replace(quick, channels_last=False),
        "all but bf16 and compiled": replace(quick, amp=False),
        "all but compiled, any cuDNN kernel": replace(quick, any_kernel=True),
        "all, any cuDNN kernel": replace(quick, compile=True, any_kernel=True),
        "all but graphs": replace(quick, cuda_graphs=False, compile=True),
        "all but channels-last": replace(quick, channels_last=False, compile=True),
        "compiled": Configuration(compile=True),
    }


class SteppeLoop:
    """Takes as many training steps as it is called with."""

    def __init__(self, recipe: Recipe, method: str, data: Dataset, configuration: Configuration) -> None:
        recipe = recipe.replace(methods=(method,), **configuration.fields)
        self._configuration, self._world = configuration, World(torch.device(recipe.hardware.device))
        with self._kernels(), mock.patch.object(images, "BASES", BASES if configuration.fused else _unfused()):
            self.run = Training(next(recipe.runs()), images.images_task(data, recipe), self._world)
        self._batches = self._endless()
        self._total = torch.zeros((), dtype=torch.float64, device=self._world.device)

    def __call__(self, steps: int) -> Tensor:
        """Take `steps` steps; return the sum of all losses so far, without waiting for the device."""
        with self._kernels():
            for batch in islice(self._batches, steps):
                self._total += self.run.step(batch)
        return self._total

    def _kernels(self) -> AbstractContextManager[Any]:
        if self._world.device.type == "cpu":
            return nullcontext()
        cudnn, free = torch.backends.cudnn, self._configuration.any_kernel
        return cudnn.flags(enabled=cudnn.enabled, benchmark=free, deterministic=not free, allow_tf32=cudnn.allow_tf32)

    def _endless(self) -> Iterator[Batch]:
        run = self.run.run
        epochs = Epochs(self.run.samples["train"], run.recipe.training.batch_size or 0, run.seed, self._world)
        for epoch in count():
            yield from epochs.batches(epoch)


def _unfused() -> dict[str, Any]:
    """Return the base optimizers as they are built on a CPU."""

    def build(name: str, *args: Any, nesterov: bool, on_gpu: bool) -> torch.optim.Optimizer:
        return BASES[name].build(*args, nesterov=nesterov)

    return {name: replace(base, build=lambda *a, name=name, **k: build(name, *a, **k)) for name, base in BASES.items()}
