"""A user's data, in tensors, a dataset or batches, prepared for many passes."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from steppe.experiments.errors import ExperimentError
from steppe.experiments.measuring.entry_points import one_line, one_line_errors
from steppe.experiments.measuring.weights import content_of
from steppe.flatness._batches import list_tensors, num_samples

_FORMS = "a tuple of tensors (inputs, targets), a Dataset of such pairs, or batches: a DataLoader, a list"


def prepare_data(given: Any, name: str, samples: int, batch_size: int, seed: int, *, pairs: bool) -> Any:
    """Convert the user's data to the form that :class:`steppe.flatness.Objective` takes.

    From tensors and datasets, `samples` samples are drawn, or all if there are fewer; from a dataset only once, so that
    augmentation does not change them from pass to pass. Batches are used as they are. `name` is that of the data in
    errors; with `pairs`, an item must be (inputs, targets).
    """
    if isinstance(given, tuple) and len(given) > 1 and all(isinstance(t, Tensor) and t.dim() for t in given):
        if len({len(t) for t in given}) > 1:
            lengths = " and ".join(str(len(t)) for t in given)
            raise ExperimentError(f"--data {name} gives tensors of {lengths} entries, and each input needs its target")
        drawn = _drawn(len(given[0]), samples, seed)
        return tuple(t[drawn.to(t.device)] for t in given)
    if isinstance(given, IterableDataset):
        raise ExperimentError(f"--data {name} gives samples one after the other: put a DataLoader around the dataset")
    if isinstance(given, Iterator):
        raise ExperimentError(
            f"--data {name} gives {type(given).__name__}, which can be iterated over only once, and a measure needs "
            f"many passes: give {_FORMS}"
        )
    indexable = hasattr(given, "__getitem__") and not isinstance(given, list)
    if not hasattr(given, "__len__" if indexable else "__iter__") or isinstance(given, tuple | Tensor | Mapping | str):
        raise ExperimentError(f"--data {name} gives {_describe(given)}: give {_FORMS}")
    if not indexable:
        return given
    return _collated(given, name, _drawn(len(given), samples, seed), batch_size, pairs=pairs)


def digest_of_data(batches: Any) -> str:
    """Return the sum of the samples' SHA-256, which does not depend on their order and batches."""
    total = 0
    for batch in [batches] if isinstance(batches, tuple) else batches:
        tensors, n = list_tensors(batch), num_samples(batch)
        for i in range(n):
            found = hashlib.sha256()
            for tensor in tensors:
                mine = tensor[i] if tensor.dim() and len(tensor) == n else tensor
                found.update(content_of(mine))
            total += int.from_bytes(found.digest(), "big")
    return f"{total % 2**256:064x}"


def first_length(batches: Any, batch_size: int) -> int:
    """Return the number of samples in the first batch, or 0 without batches."""
    if isinstance(batches, tuple):
        return min(len(batches[0]), batch_size)
    return next((num_samples(batch) for batch in batches), 0)


def _drawn(n: int, samples: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:samples].sort().values


def _collated(dataset: Any, name: str, drawn: Tensor, batch_size: int, *, pairs: bool) -> list[Any]:
    with one_line_errors(f"--data {name}: an item of it cannot be read:"):
        items = [dataset[i] for i in drawn.tolist()]
    other = next((item for item in items if not isinstance(item, tuple | list) or len(item) < 2), None)
    if pairs and other is not None:
        raise ExperimentError(
            f"--data {name}: an item is {_describe(other)}, and a loss takes (inputs, targets): give with --evaluate "
            "the loss of a batch, package.module:function, (model, batch) -> mean loss"
        )
    try:
        return [default_collate(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
    except Exception as error:
        raise ExperimentError(
            f"--data {name}: its items cannot be put into one batch ({one_line(error)}): give a DataLoader with a "
            "collate_fn of its own"
        ) from error


def _describe(thing: Any) -> str:
    """Return the type of an object, with its size."""
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)} ({', '.join(type(x).__name__ for x in thing[:3])})"
    return f"a tensor of shape {tuple(thing.shape)}" if isinstance(thing, Tensor) else type(thing).__name__
