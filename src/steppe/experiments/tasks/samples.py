"""The samples of a task's split: any data of a user, in batches that depend on the seed and the epoch alone."""

from __future__ import annotations

import copy
import multiprocessing
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from torch.utils.data import Dataset as TorchDataset

from steppe._engine.generators import Generators
from steppe.experiments.data.sampling import seed_of
from steppe.experiments.errors import ExperimentError
from steppe.flatness._batches import cast as cast_tensors
from steppe.flatness._batches import num_samples

_GENERATORS = Generators(())  # the global ones of torch's CPU, NumPy and Python
_EVALUATION = 0xE7A1  # in the place of a seed, where no run's seed is
_END = object()
_SLICE, _SLICES = 60.0, 10  # of the time that the workers of a loader may take for a batch, in seconds
_FORMS = "a tuple of tensors or arrays (inputs, targets), a Dataset, a DataLoader, or a function that returns one"


class Samples(ABC):
    """The samples of a split; a batch of them is named by the positions of its samples."""

    batch_size: int | None = None
    """The number of samples in a batch, where the data have one of their own."""
    sizes: list[int] | None = None
    """The sizes of the batches of an epoch, where the data decide which samples they hold; else positions are free."""
    shuffled = True
    """False if the user's own loader goes through the samples in their order."""
    name = "data"
    """The name of the split in a message."""
    origin: Tensor | None = None
    """The positions of the samples in the user's own data, int64 (n,), where they are others."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, positions: Sequence[Tensor], epoch: int, first: int, seed: int | None) -> Iterable[Any]:
        """Yield a batch for each of `positions`, the first of which is batch number `first` of the epoch.

        Random numbers of the data (augmentation) depend on `seed`, `epoch` and the number of the batch alone, and the
        global generators are unchanged; `seed` is None for an evaluation, which draws the same numbers each time.
        """

    def to(self, device: torch.device) -> Samples:
        """Return the samples, with their tensors on the device."""
        return self


class TensorSamples(Samples):
    """Tensors of equal length; a batch is a tuple of their rows."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def gather(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Return the rows at `positions`, a tensor on the device of the samples, as a batch."""
        return self.gather_stored(positions)

    def gather_stored(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Return the rows at `positions` as they are stored."""
        return tuple(tensor[positions] for tensor in self.tensors)

    def fetch(self, positions: Sequence[Tensor], epoch: int, first: int, seed: int | None) -> Iterable[Any]:
        return (self.gather(p) for p in positions)

    def to(self, device: torch.device) -> TensorSamples:
        other = copy.copy(self)
        other.tensors = tuple(t.to(device) for t in self.tensors)
        return other


class DatasetSamples(Samples):
    """A map-style dataset, with the collate function and the workers of a DataLoader if it came with one."""

    def __init__(self, dataset: TorchDataset[Any], loader: DataLoader[Any] | None = None, name: str = "data") -> None:
        self.dataset, self._length = dataset, len(dataset)  # type: ignore[arg-type]
        self._wait = _Wait(loader, name)
        self.batch_size = None if loader is None else loader.batch_size
        self.shuffled = loader is None or isinstance(loader.sampler, RandomSampler)
        # only the settings: a loader itself cannot be sent to another process while it has workers
        self._collate = default_collate if loader is None else loader.collate_fn
        self._settings = (
            {}
            if loader is None
            else {
                "num_workers": loader.num_workers,
                "timeout": self._wait.timeout,
                "worker_init_fn": loader.worker_init_fn,
                "multiprocessing_context": _start_of_workers(loader),
                "prefetch_factor": loader.prefetch_factor,
            }
        )

    def __len__(self) -> int:
        return self._length

    def with_dataset(self, dataset: TorchDataset[Any]) -> DatasetSamples:
        """Return samples of another dataset with the same settings."""
        other = copy.copy(self)
        other.dataset, other._length = dataset, len(dataset)  # type: ignore[arg-type]
        return other

    def fetch(self, positions: Sequence[Tensor], epoch: int, first: int, seed: int | None) -> Iterable[Any]:
        keys = [(*_key(seed, epoch, first + i), p.tolist()) for i, p in enumerate(positions)]
        loader = DataLoader(
            _Drawn(self.dataset),
            sampler=cast(Any, keys),
            batch_size=None,
            # of the items of a batch, which the loader takes for a single one
            collate_fn=partial(_collate, self._collate),
            generator=torch.Generator().manual_seed(0),  # else each iteration draws from the global generator
            **cast(Any, self._settings),
        )
        iterator = iter(loader)
        while (batch := self._wait.next(iterator)) is not _END:
            yield batch


def _start_of_workers(loader: DataLoader[Any]) -> Any:
    """Return how a loader's workers are started: as in the user's own script, also in a process that trains a run.

    Such a process was spawned, and would spawn workers too: these take seconds to start, and cannot be given a lambda.
    """
    if not loader.num_workers or loader.multiprocessing_context is not None:
        return loader.multiprocessing_context
    spawned = multiprocessing.parent_process() is not None
    return multiprocessing.get_all_start_methods()[0] if spawned else multiprocessing.get_start_method()


class _Wait:
    """The time that the workers of a loader may take for a batch: one forked while another thread holds a lock hangs.

    By default it is ten minutes, in slices of one, because all of the time in which the processes are suspended counts
    as one slice.
    """

    def __init__(self, data: Any, name: str) -> None:
        workers = data.num_workers if isinstance(data, DataLoader) else 0
        own = data.timeout if workers else 0.0
        self.timeout, self._slices, self._name = own or (_SLICE if workers else 0.0), 1 if own else _SLICES, name

    def next(self, iterator: Iterator[Any]) -> Any:
        """Return the next batch of an iterator of the loader, or `_END`."""
        for _ in range(self._slices):
            try:
                return next(iterator, _END)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
        raise ExperimentError(
            f"{self._name}: the workers of its DataLoader gave no batch for {self._slices * self.timeout:g} s, so they "
            "hang, or a batch takes that long: give the loader num_workers=0, so that the data are read in the process "
            "that trains, or a longer timeout="
        )


class _Drawn(TorchDataset[Any]):
    """The items of a batch; their random numbers depend on the key of the batch alone, in whichever process."""

    def __init__(self, dataset: TorchDataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, key: tuple[int, int, int, list[int]]) -> list[Any]:
        *numbers, positions = key
        with RandomStream(*numbers).active():
            together = getattr(self._dataset, "__getitems__", None)
            return together(positions) if together else [self._dataset[i] for i in positions]


def _collate(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    """Make a batch of its items; None if a process has no share in it."""
    return collate(items) if items else None


class LoaderSamples(Samples):
    """A DataLoader, or another iterable of batches, with an order of its own: each epoch is one iteration of it."""

    def __init__(self, batches: Iterable[Any], sizes: list[int] | None = None, name: str = "data") -> None:
        """Count the batches by reading them all, unless their `sizes` are given or follow from a sampler."""
        self._wait = _Wait(batches, name)
        self._batches = batches
        if isinstance(batches, DataLoader) and batches.num_workers:
            self._batches = _with_new_workers(batches, self._wait.timeout)
        known = sizes or _known_sizes(batches)
        with RandomStream(0, 0, 0).active():
            self._sizes = self._counted() if known is None else known
        if not self._sizes:
            raise ExperimentError("the data have no batch, so there is nothing to train on or to measure")
        self.sizes = self._sizes
        self.batch_size = max(self._sizes)

    def __len__(self) -> int:
        return sum(self._sizes)

    def _counted(self) -> list[int]:
        iterator, sizes = iter(self._batches), list[int]()
        while (batch := self._wait.next(iterator)) is not _END:
            sizes.append(num_samples(batch))
        return sizes

    def fetch(self, positions: Sequence[Tensor], epoch: int, first: int, seed: int | None) -> Iterable[Any]:
        """Yield the batches of an epoch from number `first` on; those before are read and dropped."""
        stream = RandomStream(*_key(seed, epoch, 0))
        for owner in (self._batches, getattr(self._batches, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(seed_of(*_key(seed, epoch, 0)))
        with stream.active():
            iterator = iter(self._batches)
        for number in range(first + len(positions)):
            with stream.active():
                batch = self._wait.next(iterator)
            if batch is _END:
                raise ExperimentError(
                    f"the data gave {number} batches in epoch {epoch + 1}, and {len(self._sizes)} when they were "
                    "counted, but the compute of an epoch must be the same for all methods: give a Dataset, or batches "
                    "of a fixed number"
                )
            if number >= first:
                yield batch


def _with_new_workers(loader: DataLoader[Any], timeout: float) -> DataLoader[Any]:
    """Return a loader whose workers start anew, and so draw the same numbers, in each epoch of each run."""
    other = copy.copy(loader)
    other.multiprocessing_context, other.timeout = _start_of_workers(loader), timeout
    # a loader forbids these assignments, and keeps the workers of the last epoch under this private name
    other.__dict__.update(persistent_workers=False, _iterator=None)
    return other


def _known_sizes(batches: Iterable[Any]) -> list[int] | None:
    """Return the sizes of the batches where a sampler has a length; else all must be read."""
    sampler = batches.batch_sampler if isinstance(batches, DataLoader) else None
    if type(sampler) is not BatchSampler or isinstance(cast(Any, batches).dataset, IterableDataset):
        return None
    try:
        n = len(cast(Any, sampler.sampler))
    except TypeError:
        return None
    rest = n % sampler.batch_size
    return [sampler.batch_size] * (n // sampler.batch_size) + ([] if sampler.drop_last or not rest else [rest])


class RandomStream:
    """A state of its own for the global generators of torch's CPU, NumPy and Python."""

    def __init__(self, *numbers: int) -> None:
        before = _GENERATORS.save()
        seed_generators(seed_of(*numbers))
        self._states = _GENERATORS.save()
        _GENERATORS.restore(before)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the global generators draw from the stream within the context."""
        before = _GENERATORS.save()
        _GENERATORS.restore(self._states)
        try:
            yield
        finally:
            self._states = _GENERATORS.save()
            _GENERATORS.restore(before)


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch's CPU, NumPy and Python."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Give the caller back the states of the global generators of torch's CPU, NumPy and Python."""
    before = _GENERATORS.save()
    try:
        yield
    finally:
        _GENERATORS.restore(before)


def numpy_and_python_states() -> list[Any]:
    """Return the states of the global generators of NumPy and Python as a checkpoint can hold them."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    version, numbers, after = random.getstate()
    return [[name, keys.tolist(), *rest], [version, list(numbers), after]]


def restore_numpy_and_python(states: list[Any]) -> None:
    """Restore what `numpy_and_python_states` returned."""
    (name, keys, *rest), (version, numbers, after) = states
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate((version, tuple(numbers), after))


def _key(seed: int | None, epoch: int, number: int) -> tuple[int, int, int]:
    return (_EVALUATION, 0, number) if seed is None else (seed, epoch, number)


def as_samples(given: Any, name: str, sizes: list[int] | None = None) -> Samples:
    """Turn the data of a user into samples; `name` is theirs in an error, `sizes` those of batches if known."""
    if isinstance(given, Samples):
        return given
    if isinstance(given, tuple) and given and all(hasattr(part, "__array__") for part in given):
        given = tuple(part if isinstance(part, Tensor) else _as_tensor(part, name) for part in given)
        lengths = {len(tensor) for tensor in given}
        if len(lengths) > 1 or lengths == {0}:
            found = ", ".join(str(tuple(tensor.shape)) for tensor in given)
            raise ExperimentError(
                f"{name}: tensors of shapes {found}, but inputs and targets need the same number of samples, at least 1"
            )
        return TensorSamples(given)
    if isinstance(given, list) and given and all(isinstance(part, np.ndarray) for part in given):
        raise ExperimentError(f"{name} is a list of arrays, and a list is taken for one of batches: give {_FORMS}")
    if isinstance(given, Iterator):
        raise ExperimentError(
            f"{name} is {type(given).__name__}, an iterator, which can be read once only, and training reads the data "
            f"in every epoch: give {_FORMS}"
        )
    if isinstance(given, DataLoader):
        plain = _is_plain(given)
        return DatasetSamples(given.dataset, given, name) if plain else LoaderSamples(given, sizes, name)
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, list | tuple | dict | str):
        if not len(given):
            raise ExperimentError(f"{name} is empty: at least one sample is needed")
        return DatasetSamples(given)
    if isinstance(given, Iterable) and not isinstance(given, tuple | dict | str | Tensor):
        return LoaderSamples(given, sizes, name)
    holds = f" of {', '.join(type(one).__name__ for one in given[:3]) or 'nothing'}" if isinstance(given, tuple) else ""
    raise ExperimentError(f"{name} is {type(given).__name__}{holds}: give {_FORMS}")


def _as_tensor(part: Any, name: str) -> Tensor:
    """Convert a NumPy array, or a table of pandas; float64, NumPy's default, becomes the default of torch's weights."""
    array = np.asarray(part)
    if array.dtype.kind not in "fiubc":
        raise ExperimentError(
            f"{name} has an array of {array.dtype}, and tensors hold numbers only: encode texts and categories as "
            "numbers, and give each column its type"
        )
    wanted = None if array.dtype != np.float64 else torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        return torch.as_tensor(np.ascontiguousarray(array), dtype=wanted)


def _is_plain(loader: DataLoader[Any]) -> bool:
    """True if only the dataset, the size of a batch and the collate function decide the batches of a loader."""
    usual = type(loader.batch_sampler) is BatchSampler and type(loader.sampler) in (RandomSampler, SequentialSampler)
    if isinstance(loader.dataset, IterableDataset) or not usual:
        return False
    sampler = loader.sampler
    return not (isinstance(sampler, RandomSampler) and (sampler.replacement or len(sampler) != len(loader.dataset)))  # type: ignore[arg-type]


def on_device(batch: Any, device: torch.device) -> Any:
    """Move a batch: its tensors, or the object itself where it has a method `to`, as graphs have."""
    if not isinstance(batch, Tensor | Mapping | list | tuple) and hasattr(batch, "to"):
        return batch.to(device)
    return cast_tensors(batch, device=device)
