"""A snapshot of what a forward can change in a model, apart from the parameters that the optimizer trains."""

from collections.abc import Iterable
from functools import cache
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steppe._engine.generators import get_state, is_generator, set_state
from steppe._engine.registrations import Registrations, same_objects, tensors_in
from steppe._tensors.dtensor import all_plain, is_sharded, locals_of
from steppe._tensors.in_place import copy_, reuse

_LARGE = 2**24
"""Number of elements up to which untrained parameters are always copied, however few the optimizer trains."""
_LONG = 64
"""Length of a list or dict from which on it is data, and not a state."""
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
_kind = attrgetter("shape", "dtype", "device")
_requires_grad = attrgetter("requires_grad")
_VALUES = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class ModelState:
    """A snapshot of a model, of which :meth:`restore` puts back what a forward has changed.

    It holds which tensors the buffers and parameters are, and the values of the buffers and of the parameters that
    are not the optimizer's (momentum encoders, codebooks); attributes that the forward of a module assigns, if they
    are numbers, strings, tensors without a graph, or short lists, tuples and dicts of these; and generators of random
    numbers in attributes. A list or dict that grows is a log, and stays. Nothing in the model is switched off, so that
    a module that is saved midway, or an exception, leaves the model as it is.

    Parameters that the optimizer does not train may be many times those that it trains (LoRA). Then they are not
    copied, until a forward is seen to write one of them (:meth:`find_writes`).

    Args:
        model: The module.
        owned: The optimizer's parameters, which are left alone, except those that need no gradient at the time of
            :meth:`save`: ``SGD(model.parameters())`` has a momentum encoder's, too.
        generators: Include the generators in attributes.
    """

    def __init__(self, model: nn.Module, owned: Iterable[Tensor], *, generators: bool = True) -> None:
        self._model = model
        self._with_generators = generators
        owned = list(owned)
        self._owned = set(map(id, owned))
        self._limit = max(_LARGE, sum(p.numel() for p in owned if p.requires_grad and not is_lazy(p)))
        self._storages = {_storage(p) for p in owned} - {0}
        self._written: set[int] = set()
        self._saved = False
        self._registered: Registrations | None = None
        self._plain = True
        self._own_modules: list[nn.Module] = []
        self._owned_parameters: list[Tensor] = []
        self._not_owned: list[Tensor] = []
        self._entries: list[tuple[Any, dict[str, Any]]] = []
        self._attributes: dict[int, _Attributes] = {}
        self._copies = _Copies()
        self._uncopied: list[_Uncopied] = []
        self._trained_by_others: list[tuple[Tensor, int]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._own_buffers: list[tuple[Tensor, int]] = []
        self.untrained: list[Tensor] = []
        """Parameters of the model that the optimizer does not train: not its own, or without gradients."""

    @torch.no_grad()
    def save(self, *, like: "ModelState | None" = None) -> None:
        """Save the state; the storage of an earlier snapshot is reused.

        Args:
            like: Another snapshot of the model, which often has the same modules, buffers and parameters.
        """
        registered = Registrations.of(self._model, (like and like._registered) or self._registered)
        self._list(registered)
        self._attributes = {
            id(m): _Attributes.of(m, self._attributes.get(id(m)), self._storages) for m in self._own_modules
        }
        self._own_buffers = [(b, _version(b)) for b in tensors_in([m._buffers for m in self._own_modules])]
        self.untrained = self._not_owned
        if not all(map(_requires_grad, self._owned_parameters)):
            frozen = [p for p in self._owned_parameters if not (p.requires_grad or p.grad is not None)]
            self.untrained = [*self._not_owned, *frozen]
        self._trained_by_others = [(p, _version(p)) for p in self.untrained if p.requires_grad]
        held = [t for attributes in self._attributes.values() for t in attributes.tensors]
        self._save_values([*registered.buffers, *held])
        if self._with_generators:
            generators = [g for attributes in self._attributes.values() for g in attributes.generators]
            self._generators = [(g, get_state(g)) for g in generators]
        self._saved = True

    def _list(self, registered: Registrations) -> None:
        """Make the lists that depend only on what the model registers."""
        # FSDP2 exchanges the parameters of a module for gathered ones in the forward: these entries are not ours to set
        plain = all_plain(registered.parameters)
        if registered is self._registered and plain == self._plain:
            return
        tables = [*registered.buffer_tables, *(registered.parameter_tables if plain else [])]
        self._registered, self._plain = registered, plain
        self._entries = [(table, dict(table.items())) for table in tables]
        self._own_modules = [m for m in registered.modules if _has_own_attributes(type(m))]  # type: ignore[arg-type]  # a class is hashable
        self._owned_parameters = [p for p in registered.parameters if id(p) in self._owned]
        self._not_owned = [p for p in registered.parameters if id(p) not in self._owned]

    def _save_values(self, own: list[Tensor]) -> None:
        """Copy the values of buffers and attributes, and of the parameters that the optimizer does not train."""
        if not self._uncopied and self._copies.update_if_same([*own, *self.untrained]):
            return
        # subclasses (quantized weights) may not support a copy in place
        copied, uncopied = [p for p in self.untrained if all_plain([p]) or is_sharded(p)], []
        if sum(map(Tensor.numel, copied)) > self._limit:
            uncopied = [p for p in copied if id(p) not in self._written and all_plain([p])]
            copied = [p for p in copied if id(p) in self._written]
        self._copies.update([*own, *copied], all_of=[*own, *self.untrained])
        self._uncopied = [_Uncopied(p, p.detach(), _version(p)) for p in uncopied if is_writable(p)]

    @torch.no_grad()
    def restore(self, *, now: "ModelState | None" = None) -> None:
        """Restore what :meth:`save` saved: the same tensors with the same values.

        Args:
            now: Another snapshot of the model, which was made since without a forward between it and this call.
        """
        registered = self._registered
        if not self._saved or registered is None:
            return
        if (now is None or now._registered is not registered) and not registered.is_current():
            for table, entries in self._entries:
                _restore_entries(table, entries)
        for attributes in self._attributes.values():
            attributes.restore()
        self._copies.restore()
        for p, data, _ in self._uncopied:
            if p.data_ptr() != data.data_ptr():
                p.data = data
        for generator, state in self._generators:
            set_state(generator, state)

    def discard(self) -> None:
        """Make :meth:`restore` do nothing until the next :meth:`save`."""
        self._saved = False

    def find_writes(self) -> list[Tensor]:
        """Return the parameters that were not copied and were written since :meth:`save`; copy them from now on."""
        written = [p for p, _, version in self._uncopied if _version(p) != version]
        self._written.update(map(id, written))
        return written

    def share_writes(self, other: "ModelState") -> None:
        """Copy the parameters that the other snapshot copies."""
        self._written = other._written

    def own_modules_changed(self) -> bool:
        """True if a module that is not torch's own has changed an attribute or a buffer since :meth:`save`."""
        return self._saved and (
            any(a.are_changed() for a in self._attributes.values())
            or any(_version(b) != version for b, version in self._own_buffers)
            or any(entries.keys() != saved.keys() for entries, saved in self._entries if isinstance(entries, dict))
            or not all(all(map(is_, e.values(), s.values())) for e, s in self._entries)
        )

    def another_optimizer_stepped(self) -> bool:
        """True if another optimizer may have stepped since :meth:`save`."""
        return any(_version(p) != version for p, version in self._trained_by_others)


class _Uncopied(NamedTuple):
    """A parameter of which no copy was made."""

    parameter: Tensor
    data: Tensor
    """Its storage, which a forward may exchange."""
    version: int
    """The count of its writes in place."""


class _Copies:
    """Copies of the values of tensors, whose storage is used again by the next ones."""

    def __init__(self) -> None:
        self._copy_of: dict[int, Tensor] = {}
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._listed: list[Tensor] = []
        self._kinds: list[Any] = []
        self._shapes: list[torch.Size] = []

    def update(self, tensors: list[Tensor], *, all_of: list[Tensor]) -> None:
        """Copy these tensors, except those that no pass can write."""
        old = self._copy_of
        found = {id(t): t for t in tensors if id(t) in old or is_writable(t)}
        self._tensors = list(found.values())
        self._copies = reuse(list(map(old.get, found)), like=locals_of(self._tensors))
        self._copy_of = dict(zip(found, self._copies, strict=True))
        self._shapes = [copy.shape for copy in self._copies]
        copy_(self._copies, self._tensors)
        complete = all_plain(all_of) and all(id(t) in found for t in all_of)
        self._listed, self._kinds = (all_of, _kinds(all_of)) if complete else ([], [])

    def update_if_same(self, tensors: list[Tensor]) -> bool:
        """Copy again, and return True, if all these tensors were copied before and have the same shapes as then."""
        if not same_objects(tensors, self._listed) or _kinds(tensors) != self._kinds:
            return False
        copy_(self._copies, self._tensors)
        return True

    def restore(self) -> None:
        """Write the copies into the tensors, resized ones included."""
        tensors, copies = locals_of(self._tensors), self._copies
        if [t.shape for t in tensors] != self._shapes:
            resized = [i for i, (t, c) in enumerate(zip(tensors, copies, strict=True)) if t.shape != c.shape]
            for i in resized:
                tensors[i].data = copies[i].clone()
            tensors = [t for i, t in enumerate(tensors) if i not in resized]
            copies = [c for i, c in enumerate(copies) if i not in resized]
        copy_(tensors, copies)


class _Attributes:
    """The attributes of one module that its forward may assign, and the generators among them."""

    def __init__(self, module: nn.Module, excluded_storages: set[int]) -> None:
        self._module = module
        # a tensor with a graph is not kept: its activations would stay in memory
        self._all = {k: None if _has_graph(v) else v for k, v in vars(module).items()}
        own = {k: v for k, v in vars(module).items() if k not in _TORCH_ATTRIBUTES}
        self._values = {k: v for k, v in own.items() if _is_state(v)}
        self._contents = [(v, v.copy()) for v in self._values.values() if isinstance(v, list | dict)]
        leaves = [v for value in self._values.values() for v in _elements(value)]
        self.tensors = [t for t in leaves if isinstance(t, Tensor) and _storage(t) not in excluded_storages]
        self.generators = [v for value in own.values() for v in _elements(value) if is_generator(v)]

    @classmethod
    def of(cls, module: nn.Module, earlier: "_Attributes | None", excluded_storages: set[int]) -> "_Attributes":
        """Return the attributes of the module: the earlier ones if none was assigned since."""
        if earlier is not None and not earlier._contents and earlier._are_current():
            return earlier
        return cls(module, excluded_storages)

    def _are_current(self) -> bool:
        now = vars(self._module)
        return now.keys() == self._all.keys() and all(map(is_, now.values(), self._all.values()))

    def are_changed(self) -> bool:
        """True if an attribute was assigned, or a list or dict changed."""
        return not self._are_current() or any(
            len(a) != len(b) or not all(map(is_, _elements(a), _elements(b))) for a, b in self._contents
        )

    def restore(self) -> None:
        """Assign the saved values to the attributes."""
        now = vars(self._module)
        if not self._are_current():
            for name in [k for k, v in now.items() if k not in self._all and _is_state(v)]:
                del now[name]
            for name, value in self._values.items():
                if name not in now or (now[name] is not value and (_is_state(now[name]) or _has_graph(now[name]))):
                    now[name] = value
        for container, content in self._contents:
            if isinstance(container, list) and len(container) == len(content):
                container[:] = content
            elif isinstance(container, dict) and isinstance(content, dict) and container.keys() == content.keys():
                container.update(content)


@cache
def _has_own_attributes(kind: type) -> bool:
    """True if a class of modules is not torch's own: torch's modules keep what a forward changes in buffers."""
    return any(issubclass(c, nn.Module) and c.__module__.partition(".")[0] != "torch" for c in kind.__mro__)


def _elements(value: Any) -> Iterable[Any]:
    """Return the elements of a short list, tuple or dict; of anything else, the value itself."""
    if isinstance(value, list | tuple | dict) and len(value) < _LONG:
        return value.values() if isinstance(value, dict) else value
    return (value,)


def _is_state(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return len(value) < _LONG and all(map(_is_plain_value, _elements(value)))
    return _is_plain_value(value)


def _is_plain_value(value: Any) -> bool:
    return isinstance(value, _VALUES) or (isinstance(value, Tensor) and value.grad_fn is None)


def _has_graph(value: Any) -> bool:
    return any(isinstance(v, Tensor) and v.grad_fn is not None for v in _elements(value))


def _kinds(tensors: Iterable[Tensor]) -> list[Any]:
    return list(map(_kind, tensors))


def _storage(tensor: Tensor) -> int:
    """Return the address of the tensor's storage; 0 if it has none of its own (lazy, sharded, fake)."""
    return tensor.untyped_storage().data_ptr() if all_plain([tensor]) else 0


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def is_writable(tensor: Tensor) -> bool:
    """True if a pass could have written into the tensor: it is not uninitialized (lazy), expanded or for inference."""
    if is_lazy(tensor) or tensor.is_inference():
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _restore_entries(entries: Any, saved: dict[str, Any]) -> None:
    if isinstance(entries, dict):
        if entries.keys() != saved.keys() or not all(map(is_, entries.values(), saved.values())):
            entries.clear()
            entries.update(saved)
    else:  # of a ScriptModule, whose names are fixed
        now = dict(entries.items())
        for name, value in saved.items():
            if now[name] is not value:
                entries[name] = value
