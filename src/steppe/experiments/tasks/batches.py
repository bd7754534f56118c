"""Batches of a split: each is one process's share of a global batch, on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from steppe.experiments.data.batches import count, order, start
from steppe.experiments.data.sampling import seed_of
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.samples import Samples, TensorSamples, on_device
from steppe.experiments.world import World
from steppe.flatness._batches import list_tensors


@dataclass(frozen=True, eq=False)
class Batch:
    """This process's share of a global batch of `size` samples in an epoch of the run, counted from 0."""

    gather: Callable[[Tensor], Any]
    """Function of positions that returns the data."""
    indices: Tensor
    """Positions of the samples in the split, int64 (n,)."""
    size: int
    epoch: int
    ordered: bool = True
    """False if the data decide which samples a batch holds, so that `indices` name other samples in each epoch."""

    @cached_property
    def data(self) -> Any:
        """The samples as the model and the loss take them, on the device; gathered at first use."""
        return self.gather(self.indices)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the data, as `Forward` and the builders of `steppe.closures` take them."""
        return tuple(list_tensors(self.data))

    @property
    def inputs(self) -> Any:
        """The inputs of a pair (inputs, targets)."""
        return self._pair()[0]

    @property
    def targets(self) -> Any:
        """The targets of a pair (inputs, targets)."""
        return self._pair()[1]

    def _pair(self) -> tuple[Any, Any]:
        if isinstance(self.data, tuple | list) and len(self.data) == 2:
            return self.data[0], self.data[1]
        raise ExperimentError("this method needs batches of pairs (inputs, targets), and those of the task are others")

    def __len__(self) -> int:
        return len(self.indices)


class Epochs:
    """The training batches of a run: in an order that depends on the seed and the epoch alone."""

    def __init__(self, samples: Samples, batch_size: int, seed: int, world: World) -> None:
        self._samples, self._seed, self._world = samples, seed, world
        self.samples = len(samples)
        """Samples in an epoch."""
        if samples.sizes is None:
            self.number = count(self.samples, batch_size)
            """Batches in an epoch."""
            if (smallest := self.samples // self.number) < world.size:
                raise ExperimentError(
                    f"a batch of {smallest} is shared out over {world.size} processes, and each needs a sample: raise "
                    "--batch-size, or start fewer processes"
                )
            self._starts = [start(i, self.samples, self.number) for i in range(self.number + 1)]
        elif world.size > 1:
            raise ExperimentError(
                "the training data decide which samples make a batch, so several processes cannot share them out: give "
                "a Dataset, or start it without torchrun"
            )
        else:
            self.number = len(samples.sizes)
            self._starts = [0, *accumulate(samples.sizes)]

    def seen(self, batch: int) -> int:
        """Return the samples of an epoch before a batch."""
        return self._starts[batch]

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield this process's share of each batch of an epoch, from batch number `first` on."""
        free = self._samples.sizes is None and self._samples.shuffled
        indices = order(self.samples, self._seed, epoch) if free else torch.arange(self.samples)
        wholes = [indices[a:b] for a, b in zip(self._starts, self._starts[1:], strict=False)][first:]
        yield from share_out(self._samples, wholes, self._world, epoch=epoch, first=first, seed=self._seed)


def share_out(
    samples: Samples, wholes: list[Tensor], world: World, *, epoch: int = 0, first: int = 0, seed: int | None = None
) -> Iterator[Batch]:
    """Yield this process's share of global batches, whose positions are given; `seed` is None for an evaluation.

    Where the data decide what a batch holds, the processes take whole batches in turn, and their share of the others is
    empty.
    """
    if samples.sizes is None:
        mine = [whole[world.share(len(whole))] for whole in wholes]
    else:
        mine = [whole if i % world.size == world.rank else whole[:0] for i, whole in enumerate(wholes)]
    if isinstance(samples, TensorSamples):
        # in one copy: one of each batch would let every step wait for the device
        all_mine = torch.cat([torch.empty(0, dtype=torch.int64), *mine]).to(samples.tensors[0].device)
        for whole, positions in zip(wholes, torch.split(all_mine, [len(positions) for positions in mine]), strict=True):
            yield Batch(samples.gather, positions, len(whole), epoch)
        return
    if seed is not None and world.rank > 0:  # else the shares of a batch would be augmented by the same numbers
        seed = seed_of(seed, world.rank)
    for whole, positions, data in zip(wholes, mine, samples.fetch(mine, epoch, first, seed), strict=True):
        moved: Any = on_device(data, world.device) if len(positions) else None
        yield Batch(lambda _, moved=moved: moved, positions, len(whole), epoch, samples.sizes is None)  # type: ignore[misc]
