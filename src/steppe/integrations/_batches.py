"""Batches that every pass of a step gets again: containers of their own for each, and a check of what a pass writes."""

from collections.abc import Iterator, Mapping, MutableMapping
from copy import copy
from operator import is_
from typing import Any

from torch import Tensor


def with_own_containers(batch: Any) -> Any:
    """Return a batch in new dicts, lists and tuples with the same tensors, at any depth.

    A ``training_step`` may take an entry out of its batch, or assign another tensor; the next pass needs the old one.

    >>> batch = {"x": [1, 2], "y": 3}
    >>> again = with_own_containers(batch)
    >>> _ = batch.pop("y"), batch["x"].clear()
    >>> again
    {'x': [1, 2], 'y': 3}
    """
    if isinstance(batch, MutableMapping):
        mapping = copy(batch)
        for key, value in batch.items():
            mapping[key] = with_own_containers(value)
        return mapping
    if isinstance(batch, list):
        items = copy(batch)
        items[:] = map(with_own_containers, batch)
        return items
    if isinstance(batch, tuple):
        parts = list(map(with_own_containers, batch))
        if all(map(is_, parts, batch)):
            return batch
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def named_tensors(batch: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch with their names: ``batch['x'][0]``."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(batch, list | tuple):
        for index, value in enumerate(batch):
            yield from named_tensors(value, f"{name}[{index}]")
