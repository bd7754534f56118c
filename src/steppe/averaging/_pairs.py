"""The tensors of a model and of its average, and the copy of a model that an average begins with."""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steppe._engine.attributes import tensors_in_attributes
from steppe._tensors.cached_weights import drop_cached_weights
from steppe._tensors.dtensor import all_plain, fsdp_modules, local
from steppe._tensors.in_place import copy_

_STATISTICS = ("running_mean", "running_var")
_HALF = (torch.float16, torch.bfloat16)


def copy_of(model: nn.Module, device: torch.device | str | int | None) -> nn.Module:
    """Return a deep copy whose weights and buffers in half precision are in float32.

    Raises:
        ValueError: The model cannot be copied, or its copy would run the original.
    """
    if any(map(nn.parameter.is_lazy, [*model.parameters(), *model.buffers()])):
        raise ValueError(
            "the model has lazy parameters without a shape, which cannot be averaged: run one forward before you make "
            "the average"
        )
    if fsdp_modules(model):
        raise ValueError(
            "a model of fully_shard (FSDP2) cannot be copied: make a second one in the same way, and pass it as module="
        )
    twin = copy.deepcopy(model, _without_graphs(model))
    originals = set(map(id, model.modules()))
    for name, module in twin.named_modules():
        if "forward" in vars(module) and _refers_to(vars(module)["forward"], originals):
            raise ValueError(
                f"the forward of {name or type(module).__name__!r} was replaced by a function that holds the model "
                "itself, so a copy would run the model's weights, not the average. Make the average before this "
                "replacement"
            )
    twin._apply(lambda t: t.float() if t.dtype in _HALF else t)  # type: ignore[no-untyped-call]
    return twin if device is None else twin.to(device)


def _without_graphs(model: nn.Module) -> dict[int, Any]:
    """Return a memo for ``copy.deepcopy``, which refuses tensors with a graph: copies of those in attributes.

    They are outputs that a module keeps, or weights that it computes anew in each forward (torch's old ``weight_norm``
    and ``spectral_norm``, pruning).
    """
    return {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in tensors_in_attributes(module)
        if tensor.grad_fn is not None
    }


def _refers_to(function: Any, modules: set[int], depth: int = 8) -> bool:
    """True if a function holds one of the modules, bound or in a closure."""
    if id(function) in modules:
        return True
    if depth == 0 or isinstance(function, nn.Module):
        return False
    parts: list[Any] = [getattr(function, name, None) for name in ("__self__", "__func__", "__wrapped__")]
    if isinstance(function, partial):
        parts += [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, FunctionType):
        parts += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return any(_refers_to(part, modules, depth - 1) for part in parts if part is not None)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


class Pair(NamedTuple):
    """A tensor of the average, and that of the model; parameters as they are, because a move replaces their data."""

    average: Tensor
    live: Tensor


class Pairs:
    """The tensors of an average and of its model, looked up anew: a framework may have replaced them.

    Args:
        average: The module with the averaged weights.
        live: The model.

    Raises:
        ValueError: They have other parameters.
    """

    def __init__(self, average: nn.Module, live: nn.Module) -> None:
        self._modules = (average, live)
        for module in self._modules:
            reshard(module)
        mine, theirs = list(average.parameters()), list(live.parameters())
        if [p.shape for p in mine] != [p.shape for p in theirs]:
            raise ValueError(
                f"the model has {len(theirs)} parameters and its average {len(mine)}, or their shapes differ: the "
                "model was changed after the average was made. Make the average after the last change"
            )
        averaged = [Pair(a, b) for a, b in zip(mine, theirs, strict=True)]
        copied: list[Pair] = []
        for name, buffer in live.named_buffers():
            pair = Pair(_buffer_like(average, name, buffer), buffer)
            (averaged if name.rpartition(".")[2] in _STATISTICS else copied).append(pair)
        copied += [pair for pair in averaged if not _is_real_or_complex(pair)]
        self._averaged, self._copied = [pair for pair in averaged if _is_real_or_complex(pair)], copied

    def __iter__(self) -> Iterator[Pair]:
        yield from self._averaged
        yield from self._copied

    def copy(self) -> None:
        """Copy the model's tensors to the average."""
        _copy((average, live) for average, live in self)
        drop_cached(self._modules[0])

    @torch.no_grad()
    def average(self, function: Callable[[list[Tensor], list[Tensor], int], None], n_averaged: int) -> None:
        """Add the model's tensors to the average.

        Args:
            function: A ``multi_avg_fn`` of ``torch.optim.swa_utils``.
            n_averaged: The number of weights in the average.
        """
        mine, theirs = [pair.average for pair in self._averaged], [pair.live for pair in self._averaged]
        if not all_plain(mine, theirs):
            mine, theirs = [local(a) for a in mine], [local(b, like=a) for a, b in self._averaged]
        _copy((average, live) for average, live in self._copied)
        if mine:  # all in one call, which an interrupt cannot divide
            function(mine, [b.to(a.device, a.dtype) for a, b in zip(mine, theirs, strict=True)], n_averaged)
        drop_cached(self._modules[0])

    def apply(self) -> None:
        """Copy the average to the model."""
        _copy((live, average) for average, live in self)
        drop_cached(self._modules[1])


@torch.no_grad()
def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    targets, values = [list(side) for side in zip(*pairs, strict=True)] or ([], [])
    copy_(targets, values)


def _is_real_or_complex(pair: Pair) -> bool:
    return all(t.is_floating_point() or t.is_complex() for t in pair)


def _buffer_like(average: nn.Module, name: str, live: Tensor) -> Tensor:
    """Return a buffer of the average, made or resized as that of the model."""
    path, _, leaf = name.rpartition(".")
    owner = average.get_submodule(path)
    mine = owner._buffers.get(leaf)
    if mine is None or mine.shape != live.shape:
        device = live.device if mine is None else mine.device
        owner._buffers[leaf] = mine = live.detach().clone().to(device)
    return mine


def drop_cached(module: nn.Module) -> None:
    """Drop copies of the weights that torch has cached: a forward would run on stale weights."""
    drop_cached_weights()
    reshard(module)


def reshard(module: nn.Module) -> None:
    """Make the sharded weights the parameters again: FSDP2 keeps gathered ones after a forward without a backward."""
    for part in fsdp_modules(module):
        part.reshard()
