"""Tensors of which each rank holds a part (``DTensor``: FSDP2, tensor parallelism): the part here, and the whole.

Everything else in the package sees them as ordinary tensors. A plain tensor is its own part and its own whole, so
nothing here costs anything, or imports anything, where nobody shards.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Spread: TypeAlias = tuple[Any, tuple[int, ...]]
"""A mesh of ranks, and those of its dimensions along which a tensor is cut."""


_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def all_plain(*lists: Sequence[Tensor]) -> bool:
    """Whether no tensor is of a subclass, by one look at whole lists: a look at each would take a GPU's step time."""
    return all(_PLAIN.issuperset(map(type, tensors)) for tensors in lists)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, replicated ones included."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the part that this rank holds, in the same storage; of a part laid out otherwise than ``like``'s, a copy.

    >>> x = torch.ones(2)
    >>> local(x) is x
    True
    """
    if not is_sharded(tensor):
        return tensor
    if like is not None and is_sharded(like) and tensor.placements != like.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(like.device_mesh, like.placements)  # type: ignore[attr-defined]
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of each that this rank holds, as :func:`local` does."""
    return list(tensors) if all_plain(tensors) else [local(t) for t in tensors]


def reduced(tensor: Tensor) -> Tensor:
    """Return it without pending sums: a gradient may still be the ranks' summands."""
    if not is_sharded(tensor) or not any(p.is_partial() for p in tensor.placements):  # type: ignore[attr-defined]
        return tensor
    from torch.distributed.tensor import Replicate

    to = [Replicate() if p.is_partial() else p for p in tensor.placements]  # type: ignore[attr-defined]
    reduced: Tensor = tensor.redistribute(tensor.device_mesh, to)  # type: ignore[attr-defined]
    return reduced


def whole(tensor: Tensor) -> Tensor:
    """Return all of it, on every rank; every rank must ask."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Cut a tensor that every rank has, so that each keeps what it holds of ``like``; nothing is sent."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def foreach(operation: Callable[..., Any], *lists: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Apply one of ``torch._foreach_*`` to lists in which plain and sharded tensors may stand side by side.

    Tensors of the lists come first, scalars by keyword. All of it happens entry by entry, so each rank works on the
    parts that it holds, laid out as in the first list.

    >>> foreach(torch._foreach_add, [torch.ones(1)], [torch.ones(1)], alpha=2.0)
    [tensor([3.])]
    """
    first = lists[0]
    if not first:
        return []
    if all_plain(*lists) or not any(is_sharded(t) for tensors in lists for t in tensors):
        return list(operation(*map(list, lists), **options))
    parts = [[local(t, like=f) for t, f in zip(tensors, first, strict=True)] for tensors in lists]
    found = operation(*parts, **options)
    if operation.__name__.endswith("_"):  # in place
        return list(first)
    return [_laid_out(part, like=f) for part, f in zip(found, first, strict=True)]


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which each rank holds such a part."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def by_placement(tensors: Sequence[Tensor]) -> dict[Spread | None, list[int]]:
    """Return the positions of the tensors that are cut alike; under None, of those that every rank has whole."""
    kinds: dict[Spread | None, list[int]] = {}
    for position, tensor in enumerate(tensors):
        kinds.setdefault(_spread(tensor), []).append(position)
    return kinds


def over_ranks(summand: Tensor, spread: Spread | None) -> Tensor:
    """Return the sum over all ranks along which the tensors are cut, made in place."""
    if spread is not None:
        mesh, cut = spread
        for dim in cut:
            torch.distributed.all_reduce(summand, group=mesh.get_group(dim))
    return summand


def _spread(tensor: Tensor) -> Spread | None:
    if not is_sharded(tensor):
        return None
    # is_shard() is false for FSDP2's shards of a tensor-parallel layer
    cut = tuple(dim for dim, p in enumerate(tensor.placements) if not p.is_replicate())  # type: ignore[attr-defined]
    return (tensor.device_mesh, cut) if cut else None  # type: ignore[attr-defined]
