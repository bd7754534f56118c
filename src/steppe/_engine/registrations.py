"""The modules, buffers and parameters that a model registers."""

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn


class Registrations:
    """Lists of what a model registers, which are made again only after a change.

    To go through a model takes most of the time that a step needs on the host. :meth:`is_current` compares the tables
    of its modules (``_modules``, ``_buffers``, ``_parameters``) with those from which the lists were made, in few
    operations on lists.

    Args:
        model: The module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.buffer_tables: list[Any] = [m._buffers for m in self.modules if m._buffers or not is_torchs(m)]
        """The dicts that hold buffers; of TorchScript's modules, wrappers in their place. A module that is not torch's
        own may make its first one in a forward."""
        self.parameter_tables: list[Any] = [m._parameters for m in self.modules if m._parameters]
        """The dicts that hold parameters."""
        self.buffers = tensors_in(self.buffer_tables)
        self.parameters = tensors_in(self.parameter_tables)
        self._kinds = list(map(type, self.modules))
        self._tables = self._tables_now()
        # another class of tables, or a module with a method of its own, may list what these tables do not show
        self._shows_changes = all(type(t) is dict for t in self._tables) and all(map(_lists_registered, self._kinds))
        self._sizes = list(map(len, self._tables))
        self._hooks: list[Any] = [hooks for m in self.modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self._hooks_sizes = list(map(len, self._hooks))
        self._filled = [t for t in self._tables if t] if self._shows_changes else []
        self._names = list(chain.from_iterable(self._filled))
        self._values = [value for t in self._filled for value in t.values()]

    @classmethod
    def of(cls, model: nn.Module, earlier: "Registrations | None") -> "Registrations":
        """Return what the model registers: the earlier lists if nothing has changed."""
        return earlier if earlier is not None and earlier.is_current() else cls(model)

    def is_current(self) -> bool:
        """True if no module, buffer or parameter was added, removed, exchanged or renamed, as far as that shows.

        A hook that was added counts, too: it may assign attributes of its module.
        """
        return (
            self._shows_changes
            and list(map(type, self.modules)) == self._kinds
            and same_objects(self._tables_now(), self._tables)
            and list(map(len, self._tables)) == self._sizes
            and list(map(len, self._hooks)) == self._hooks_sizes
            and list(chain.from_iterable(self._filled)) == self._names
            and same_objects(list(chain.from_iterable(map(dict.values, self._filled))), self._values)
        )

    def _tables_now(self) -> list[Any]:
        return [table for m in self.modules for table in (m._modules, m._buffers, m._parameters)]


def same_objects(a: list[Any], b: list[Any]) -> bool:
    """True if two lists hold the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


def tensors_in(tables: Iterable[Mapping[str, Tensor | None]]) -> list[Tensor]:
    """Return the tensors in some tables of buffers or parameters."""
    return [tensor for table in tables for tensor in table.values() if tensor is not None]


def restore_entries(entries: Any, saved: dict[str, Any]) -> None:
    """Make a table of buffers or parameters hold these tensors again."""
    if isinstance(entries, dict):
        if entries.keys() != saved.keys() or not all(map(is_, entries.values(), saved.values())):
            entries.clear()
            entries.update(saved)
    else:  # of a ScriptModule, whose names are fixed
        now = dict(entries.items())
        for name, value in saved.items():
            if now[name] is not value:
                entries[name] = value


def is_torchs(module: nn.Module) -> bool:
    """True if the class of a module and those that it is made of are torch's own."""
    kind: Any = type(module)
    return _is_torchs(kind)


def is_layer(module: nn.Module) -> bool:
    """True for a layer of torch, also a parametrized one, and not for a wrapper (``DistributedDataParallel``)."""
    kind: Any = type(module)
    return _is_torchs(kind) and _is_layer(kind)


@cache
def _is_layer(kind: Any) -> bool:
    return any(c.__module__.startswith("torch.nn.modules.") for c in kind.__mro__ if c is not nn.Module)


@cache
def _is_torchs(kind: Any) -> bool:
    return all(c.__module__.partition(".")[0] == "torch" for c in kind.__mro__ if issubclass(c, nn.Module))


def _lists_registered(kind: type[nn.Module]) -> bool:
    return kind.modules is nn.Module.modules and kind.named_modules is nn.Module.named_modules
