"""The options of `steppe measure`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from steppe.experiments.execution import cpus
from steppe.flatness import Budget, Objective


@dataclass(frozen=True)
class Sampling:
    """The samples that flatness is measured on."""

    samples: int = 256
    """Number of training images to measure on, drawn by the run's seed: the same images for all methods of a seed."""
    batch_norm: Literal["eval", "train"] = "eval"
    """eval: BatchNorm uses its running statistics, as after training. train: those of each batch, as in training."""
    batch_size: int = 256
    """Images in memory at a time. Changes the result with --batch-norm train only. If all samples are one batch, a
    product with the Hessian takes a third less time."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: the number of images must be at least one")

    def objective(self, network: nn.Module, data: Any, **arguments: Any) -> Objective:
        return Objective(network, data, batch_norm=self.batch_norm, batch_size=self.batch_size, **arguments)


@dataclass(frozen=True)
class MeasuringOptions:
    """The samples, the budget of each measure, and the processes."""

    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)
    processes: int | None = None
    """Runs to measure at a time, each on one CPU thread; by default as many as there are CPUs, and 1 on a GPU."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes={self.processes}: the runs that are measured at a time must be at least 1")

    def limit(self, samples: int) -> MeasuringOptions:
        """Return the options for a training set of so many samples."""
        samples = min(self.sampling.samples, samples)
        sampling, budget = replace(self.sampling, samples=samples), replace(self.budget, m=min(self.budget.m, samples))
        return replace(self, sampling=sampling, budget=budget)

    def settings(self) -> dict[str, Any]:
        """Return the options that the numbers depend on."""
        return {**asdict(self.sampling), **asdict(self.budget)}

    @property
    def jobs_at_once(self) -> int:
        return self.processes or (1 if torch.cuda.is_available() else cpus.available())
