"""Plain attributes of modules and trainers, saved and restored around a pass that must not change them."""

from collections import deque
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque)
_MODULES_OWN = frozenset(vars(nn.Module()))


class PlainAttributes:
    """Numbers, tensors and containers that an object keeps: the metrics and counters of a trainer, for example.

    Args:
        owner: A model, for all of its modules, outside of their buffers; or any other object, for itself and for the
            modules without parameters (torchmetrics) that it keeps.
        unread: The names of attributes whose contents are not saved, because they are large and not written.
    """

    def __init__(self, owner: object, unread: Container[str] = ()) -> None:
        self._owner, self._unread = owner, unread
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[Tensor, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def save(self) -> None:
        """Save the present values; a tensor that has not changed since the last call is not copied again."""
        self._contents, tensors = {}, {}
        self._attributes = [(vars(owner), dict(vars(owner))) for owner in self._owners()]
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    # An inference tensor has no version counter, and a non-leaf cannot be written in place.
                    if value.grad_fn is None and not value.is_inference():
                        known = self._tensors.get(value)
                        if known is None or known[0] != value._version:
                            known = value._version, value.clone()
                        tensors[value] = known
                elif name not in _MODULES_OWN and name not in self._unread:
                    self._save_contents(value)
        self._tensors = tensors

    def _owners(self) -> Iterator[object]:
        if isinstance(self._owner, nn.Module):
            yield from self._owner.modules()
            return
        yield self._owner
        for value in vars(self._owner).values():
            if isinstance(value, nn.Module) and next(value.parameters(), None) is None:
                yield from value.modules()

    def _save_contents(self, value: Any) -> None:
        """Save the members of a container, and of the containers in it."""
        if isinstance(value, _CONTAINERS) and id(value) not in self._contents:
            self._contents[id(value)] = (value, list(value.items()) if isinstance(value, dict) else list(value))
            for member in value.values() if isinstance(value, dict) else value:
                self._save_contents(member)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the saved values: the same objects with the same contents."""
        for current, attributes in self._attributes:
            for name in current.keys() - attributes.keys():
                del current[name]
            for name, value in attributes.items():
                if name not in current or current[name] is not value:
                    current[name] = value
        for value, contents in self._contents.values():
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(contents)
        for tensor, (version, copy) in self._tensors.items():
            if tensor._version != version:
                tensor.copy_(copy)
                self._tensors[tensor] = (tensor._version, copy)
        self._attributes, self._contents = [], {}
