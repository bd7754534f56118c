"""Data that somebody gives, a pair of tensors, a dataset or batches, made ready for many passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from steppe.experiments.errors import ExperimentError
from steppe.experiments.measuring.entry_points import reason
from steppe.flatness.batches import length

__all__ = ["digest_of_data", "first_length", "ready"]

_FORMS = "a tuple of tensors (inputs, targets), a Dataset of such pairs, or batches: a DataLoader, a list"


def ready(given: Any, name: str, samples: int, batch_size: int, seed: int, *, pairs: bool) -> Any:
    """Turn it into what :class:`steppe.flatness.Objective` takes.

    Of tensors and of a dataset `samples` are drawn by the seed, or all are taken where there are fewer; of a dataset
    once and for all, so that augmentation is another draw and not another one in every pass. Batches are left whole.
    `pairs` says that an item must be (inputs, targets).

    Raises ExperimentError where it is none of these.
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
            f"--data {name} gives {type(given).__name__}, which can be walked through once only, and a measure needs "
            f"many passes: give {_FORMS}"
        )
    if isinstance(given, tuple | list) or not hasattr(given, "__getitem__"):
        if isinstance(given, tuple) or not hasattr(given, "__iter__"):
            raise ExperimentError(f"--data {name} gives {_what(given)}: give {_FORMS}")
        return given
    if isinstance(given, Tensor | Mapping | str) or not hasattr(given, "__len__"):
        raise ExperimentError(f"--data {name} gives {_what(given)}: give {_FORMS}")
    return _collated(given, name, _drawn(len(given), samples, seed), batch_size, pairs=pairs)


def digest_of_data(batches: Any) -> str:
    """Return what tells these samples from others: the sum of their SHA-256, whatever their order and batches are."""
    total = 0
    for batch in _batches(batches):
        tensors, n = list(_tensors(batch)), length(batch)
        for i in range(n):
            found = hashlib.sha256()
            for tensor in tensors:
                mine = tensor[i] if tensor.dim() and len(tensor) == n else tensor
                found.update(mine.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            total += int.from_bytes(found.digest(), "big")
    return f"{total % 2**256:064x}"


def first_length(batches: Any, batch_size: int) -> int:
    """How many samples the first batch has; 0 where there is none."""
    if isinstance(batches, tuple):
        return min(len(batches[0]), batch_size)
    return next((length(batch) for batch in batches), 0)


def _batches(batches: Any) -> Iterable[Any]:
    return [batches] if isinstance(batches, tuple) else batches


def _drawn(n: int, samples: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:samples].sort().values


def _collated(dataset: Any, name: str, drawn: Tensor, batch_size: int, *, pairs: bool) -> list[Any]:
    try:
        items = [dataset[i] for i in drawn.tolist()]
    except Exception as error:
        raise ExperimentError(f"--data {name}: an item of it cannot be had: {reason(error)}") from error
    other = next((item for item in items if not isinstance(item, tuple | list) or len(item) < 2), None)
    if pairs and other is not None:
        raise ExperimentError(
            f"--data {name}: an item is {_what(other)}, and a loss takes (inputs, targets): say with --evaluate how "
            "the loss of a batch is computed, package.module:function, (model, batch) -> mean loss"
        )
    try:
        return [default_collate(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
    except Exception as error:
        raise ExperimentError(
            f"--data {name}: its items cannot be put into one batch ({reason(error)}): give a DataLoader with a "
            "collate_fn of its own"
        ) from error


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | tuple | list):
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(branch)


def _what(thing: Any) -> str:
    """What it is, in a word or two."""
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)} ({', '.join(type(x).__name__ for x in thing[:3])})"
    return f"a tensor of shape {tuple(thing.shape)}" if isinstance(thing, Tensor) else type(thing).__name__
