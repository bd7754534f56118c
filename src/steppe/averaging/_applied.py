"""The context manager that gives a model its averaged weights for a while."""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from steppe._tensors.in_place import copy_
from steppe.averaging._pairs import Pairs, drop_cached, reshard


class Applied(ExitStack[bool | None]):
    """Copies the average to the model on entry, and restores the model's own tensors to the same bits on exit.

    Args:
        model: The model.
        pairs: The tensors of the average, and those of the model.
        begin, end: Called on entry and on exit; ``end`` also if an exception came in ``begin``, and twice.
    """

    # An ExitStack for the reason of steppe.sam.Pass: an interrupt at the first line of an __exit__ in Python, or of a
    # `finally`, cannot be caught there, and the model would keep the average.

    def __init__(self, model: nn.Module, pairs: Pairs, begin: Callable[[], None], end: Callable[[], None]) -> None:
        super().__init__()
        self._model, self._pairs, self._begin, self._end = model, pairs, begin, end

    def __enter__(self) -> nn.Module:  # type: ignore[override]
        own = _copies(self._model)
        try:
            for _ in range(2):  # the second call completes one that an interrupt has hit
                self.callback(self._end)
            for _ in range(2):
                self.callback(_restore, self._model, own)
            self._begin()
            self._pairs.apply()
            return self._model
        except BaseException:  # Python does not call __exit__ if __enter__ raises
            self.__exit__(*sys.exc_info())
            raise


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    reshard(model)
    return itertools.chain(model.named_parameters(), model.named_buffers())


@torch.no_grad()
def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in _named_tensors(model)}


@torch.no_grad()
def _restore(model: nn.Module, own: dict[str, Tensor]) -> None:
    """Write copies back to the tensors that have these names now: ``model.to()`` in the block replaces buffers."""
    now = {name: tensor for name, tensor in _named_tensors(model) if name in own}
    for name in [name for name, tensor in now.items() if tensor.shape != own[name].shape]:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = own[name].clone()
        del now[name]
    copy_(list(now.values()), [own[name] for name in now])
    drop_cached(model)
