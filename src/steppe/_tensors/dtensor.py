"""Sharded tensors (``DTensor``: FSDP2, tensor parallelism): the local shard, the full tensor, sums over ranks.

The rest of the package treats sharded tensors as ordinary ones. A plain tensor is its own local shard and its own full
tensor: without sharding nothing costs time, not even an import.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Placement: TypeAlias = tuple[Any, tuple[int, ...]]
"""A device mesh, and its dimensions along which a tensor is sharded."""

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_FSDP = {1: "FullyShardedDataParallel", 2: "FSDPModule"}


def all_plain(*lists: Sequence[Tensor]) -> bool:
    """True if every tensor behaves as an ordinary one. One set operation: a check of each outlasts a GPU's step."""
    return _PLAIN.issuperset(map(type, chain.from_iterable(lists))) or all(
        map(_is_plain, map(type, chain.from_iterable(lists)))
    )


@cache
def _is_plain(kind: type[Tensor]) -> bool:
    """True for a class that leaves all operations to torch, such as one that only adds methods to ``nn.Parameter``."""
    functions = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]
    function: Any = getattr(kind, "__torch_function__", None)
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and getattr(function, "__func__", function) in functions


def is_sharded(tensor: Tensor) -> bool:
    """True if the tensor is a ``DTensor``, replicated ones included."""
    if type(tensor) in _PLAIN:
        return False
    # Read from sys.modules: an import would take a second where nothing is sharded.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def fsdp_modules(model: nn.Module, version: Literal[1, 2] = 2) -> list[Any]:
    """Return the modules to which FSDP1 (``FullyShardedDataParallel``) or FSDP2 (``fully_shard``) was applied."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), _FSDP[version], None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def sharded_part(model: nn.Module) -> str | None:
    """Return the name of a module or tensor of a model that is sharded, frozen ones included; None if none is.

    The parameters alone do not tell: after a forward without a backward, those of FSDP2 are the gathered weights.
    """
    wrapped = {*fsdp_modules(model, 1), *fsdp_modules(model, 2)}
    modules = (name or type(module).__name__ for name, module in model.named_modules() if module in wrapped)
    tensors = chain(model.named_parameters(), model.named_buffers())
    return next(chain(modules, (name for name, tensor in tensors if is_sharded(tensor))), None)


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return this rank's shard, in the same storage; a copy if ``like`` is placed differently.

    >>> x = torch.ones(2)
    >>> local(x) is x
    True
    """
    if not is_sharded(tensor):
        return tensor
    if like is not None and is_sharded(like) and tensor.placements != like.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(like.device_mesh, like.placements)  # type: ignore[attr-defined]
    shard: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return shard


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's shard of each tensor, as :func:`local` does."""
    return list(tensors) if all_plain(tensors) else [local(t) for t in tensors]


def reduced(tensor: Tensor) -> Tensor:
    """Return the tensor without pending reductions: the gradient of a sharded layer may still be a partial sum."""
    if not is_sharded(tensor) or not any(p.is_partial() for p in tensor.placements):  # type: ignore[attr-defined]
        return tensor
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]  # type: ignore[attr-defined]
    result: Tensor = tensor.redistribute(tensor.device_mesh, placements)  # type: ignore[attr-defined]
    return result


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, on every rank. A collective operation: all ranks have to call it."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every rank has in full as ``like`` is sharded, without communication."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if "src_data_rank" not in (distribute_tensor.__kwdefaults__ or {}):  # torch 2.6: rank 0 sends the shards
        return distribute_tensor(full, mesh, placements)
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def foreach(operation: Callable[..., Any], *lists: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Apply one of ``torch._foreach_*`` to lists in which plain and sharded tensors may be mixed.

    Lists of tensors come first, scalars by keyword. The operation is elementwise, so each rank works on its own shards,
    placed as in the first list.

    Args:
        operation: A function of ``torch._foreach_*``.
        lists: Lists of tensors of one length.
        options: Keyword arguments of the operation.

    Returns:
        The results; for an in-place operation, the first list.

    Example:
        >>> foreach(torch._foreach_add, [torch.ones(1)], [torch.ones(1)], alpha=2.0)
        [tensor([3.])]
    """
    first = lists[0]
    if not first:
        return []
    if all_plain(*lists) or not any(is_sharded(t) for tensors in lists for t in tensors):
        return list(operation(*map(list, lists), **options))
    shards = [[local(t, like=f) for t, f in zip(tensors, first, strict=True)] for tensors in lists]
    results = operation(*shards, **options)
    if operation.__name__.endswith("_"):  # in place
        return list(first)
    return [_from_local(shard, like=f) for shard, f in zip(results, first, strict=True)]


def _from_local(shard: Tensor, like: Tensor) -> Tensor:
    """Return the sharded tensor of which this is the shard of this rank."""
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def by_placement(tensors: Sequence[Tensor]) -> dict[Placement | None, list[int]]:
    """Return the positions of the tensors by placement; those that every rank has in full under None."""
    positions: dict[Placement | None, list[int]] = {}
    for position, tensor in enumerate(tensors):
        positions.setdefault(_placement(tensor), []).append(position)
    return positions


def sum_over_ranks(summand: Tensor, placement: Placement | None) -> Tensor:
    """Add up, in place, over all ranks among which tensors of this placement are sharded."""
    if placement is not None:
        mesh, dimensions = placement
        for dim in dimensions:
            torch.distributed.all_reduce(summand, group=mesh.get_group(dim))
    return summand


def _placement(tensor: Tensor) -> Placement | None:
    if not is_sharded(tensor):
        return None
    # Not is_shard(), which is False for FSDP2's shards of a tensor-parallel layer.
    sharded = tuple(dim for dim, p in enumerate(tensor.placements) if not p.is_replicate())  # type: ignore[attr-defined]
    return (tensor.device_mesh, sharded) if sharded else None  # type: ignore[attr-defined]
