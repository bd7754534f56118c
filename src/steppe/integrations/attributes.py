"""What modules keep in plain attributes, which a second pass of a user's own ``training_step`` must leave alone."""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque)
_MODULES_OWN = frozenset(vars(nn.Module()))


class Attributes:
    """What the modules of a model keep in plain attributes: numbers, tensors, containers; so do torchmetrics."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[Tensor, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Remember them as they are now; a tensor that has not changed since is not copied again."""
        self._contents, tensors = {}, {}
        self._attributes = [(vars(m), dict(vars(m))) for m in self._model.modules()]
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    if value.grad_fn is None and not value.is_inference():
                        known = self._tensors.get(value)
                        if known is None or known[0] != value._version:
                            known = value._version, value.clone()
                        tensors[value] = known
                elif name not in _MODULES_OWN:
                    self._look_into(value)
        self._tensors = tensors

    def _look_into(self, value: Any) -> None:
        if isinstance(value, _CONTAINERS) and id(value) not in self._contents:
            self._contents[id(value)] = (value, list(value.items()) if isinstance(value, dict) else list(value))
            for member in value.values() if isinstance(value, dict) else value:
                self._look_into(member)

    @torch.no_grad()
    def restore(self) -> None:
        """Make them what they were: the same objects, with the same contents."""
        for place, attributes in self._attributes:
            for name in place.keys() - attributes.keys():
                del place[name]
            for name, value in attributes.items():
                if name not in place or place[name] is not value:
                    place[name] = value
        for value, content in self._contents.values():
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(content)
        for tensor, (version, copy) in self._tensors.items():
            if tensor._version != version:
                tensor.copy_(copy)
                self._tensors[tensor] = (tensor._version, copy)
        self._attributes, self._contents = [], {}
