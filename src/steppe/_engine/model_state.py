"""A snapshot of what a forward can change in a model, apart from the parameters that the optimizer trains."""

from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steppe._engine.attributes import Attributes, has_storage, may_assign_attributes, storage_of
from steppe._engine.generators import get_state, set_state
from steppe._engine.registrations import Registrations, restore_entries, same_objects, tensors_in
from steppe._tensors.dtensor import all_plain, is_sharded, locals_of
from steppe._tensors.in_place import copy_, is_expanded, reuse

LARGE = 2**24
"""Number of elements up to which untrained parameters are always copied, however few the optimizer trains."""
_kind = attrgetter("shape", "dtype", "device")
_requires_grad = attrgetter("requires_grad")
_hold_graphs = attrgetter("hold_graphs")


class ModelState:
    """A snapshot of a model, of which :meth:`restore` restores what a forward has changed.

    It holds which tensors the buffers and parameters are, and the values of the buffers and of the parameters that
    are not the optimizer's (momentum encoders, codebooks); attributes that the forward of a module, or a hook, assigns
    (:class:`~steppe._engine.attributes.Attributes` says which); and generators of random numbers in attributes. Nothing
    in the model is switched off, so that a module that is saved midway, or an exception, leaves the model as it is.

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
        self._limit = max(LARGE, sum(p.numel() for p in owned if p.requires_grad and not is_lazy(p)))
        self._storages = {storage_of(p) for p in owned} - {0}
        self._written: set[int] = set()
        self._saved = False
        self._registered: Registrations | None = None
        self._plain, self._listed_twice = True, False
        self._own_modules: list[nn.Module] = []
        self._owned_parameters: list[Tensor] = []
        self._not_owned: list[Tensor] = []
        self._entries: list[tuple[Any, dict[str, Any]]] = []
        self._attributes: dict[int, Attributes] = {}
        self._copies = _Copies()
        self._uncopied: list[_Uncopied] = []
        self._trained_by_others: list[tuple[Tensor, int]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._own_buffers: list[tuple[Tensor, int]] = []
        self._own_states: Sequence[Tensor] = ()
        self.untrained: list[Tensor] = []
        """Parameters of the model that the optimizer does not train: not its own, or without gradients."""

    @torch.no_grad()
    def save(
        self,
        *,
        registered: Registrations | None = None,
        like: "ModelState | None" = None,
        states: Sequence[Tensor] = (),
    ) -> None:
        """Save the state; the storage of an earlier snapshot is reused.

        Args:
            registered: What the model registers, from :meth:`registered_now`; by default, what it does now.
            like: Another snapshot of the model, which often has the same modules, buffers and parameters.
            states: Parameters of the optimizer whose values are states of the model, too.
        """
        registered = registered or self.registered_now(like)
        self._list(registered)
        self._attributes = {
            id(m): Attributes.of(m, self._attributes.get(id(m)), self._storages) for m in self._own_modules
        }
        self._own_buffers = [(b, _version(b)) for b in tensors_in([m._buffers for m in self._own_modules])]
        self.untrained, self._own_states = self._not_owned, states
        if not all(map(_requires_grad, self._owned_parameters)):
            frozen = [p for p in self._owned_parameters if not (p.requires_grad or p.grad is not None)]
            self.untrained, self._own_states = [*self._not_owned, *frozen], [*self._own_states, *frozen]
        self._trained_by_others = [(p, _version(p)) for p in self.untrained if p.requires_grad]
        held = [t for attributes in self._attributes.values() for t in attributes.tensors]
        self._save_values([*registered.buffers, *held, *states])
        if self._with_generators:
            generators = [g for attributes in self._attributes.values() for g in attributes.generators]
            self._generators = [(g, get_state(g)) for g in generators]
        self._saved = True

    def registered_now(self, like: "ModelState | None" = None) -> Registrations:
        """Return what the model registers now."""
        return Registrations.of(self._model, (like and like._registered) or self._registered)

    def _list(self, registered: Registrations) -> None:
        """Make the lists that depend only on what the model registers, once before and once after its first forward."""
        # FSDP2 exchanges the parameters of a module for gathered ones in the forward: these entries are not ours to set
        plain = all_plain(registered.parameters)
        is_same = registered is self._registered and plain == self._plain
        if is_same and self._listed_twice:
            return
        self._listed_twice = is_same  # the second time, also layers of torch to which the first forward gave attributes
        tables = [*registered.buffer_tables, *(registered.parameter_tables if plain else [])]
        self._registered, self._plain = registered, plain
        self._entries = [(table, dict(table.items())) for table in tables]
        self._own_modules = [m for m in registered.modules if may_assign_attributes(m)]
        self._owned_parameters = [p for p in registered.parameters if id(p) in self._owned]
        self._not_owned = [p for p in registered.parameters if id(p) not in self._owned]

    def _save_values(self, own: list[Tensor]) -> None:
        """Copy the values of buffers and attributes, and of the parameters that the optimizer does not train."""
        if not self._uncopied and self._copies.update_if_same([*own, *self.untrained]):
            return
        # tensors with operations of their own (quantized weights) may not support a copy in place
        copied, uncopied = [p for p in self.untrained if all_plain([p]) or is_sharded(p)], []
        if sum(map(Tensor.numel, copied)) > self._limit:
            uncopied = [p for p in copied if id(p) not in self._written and all_plain([p])]
            copied = [p for p in copied if id(p) in self._written]
        self._copies.update([*own, *copied], all_of=[*own, *self.untrained])
        known = {id(before.parameter) for before in self._uncopied}
        uncopied = [p for p in uncopied if id(p) in known or is_writable(p)]
        self._uncopied = [_Uncopied(p, p.detach(), _version(p)) for p in uncopied]

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
                restore_entries(table, entries)
        for attributes in self._attributes.values():
            attributes.restore()
        self._copies.restore()
        for p, data, _ in self._uncopied:
            if p.data_ptr() != data.data_ptr():
                p.data = data
        for generator, state in self._generators:
            set_state(generator, state)

    def leave_out_trained(self) -> None:
        """Leave the optimizer's parameters that have a gradient now out of :meth:`restore`: they are trained.

        Some methods move them between the passes, from where a restored value would take them back.
        """
        trained = {id(p) for p in self._own_states if p.grad is not None}
        if trained:
            self._copies.leave_out(trained)
            self._uncopied = [before for before in self._uncopied if id(before.parameter) not in trained]

    def discard(self) -> None:
        """Make :meth:`restore` do nothing until the next :meth:`save`."""
        self._saved = False

    def release_graphs(self) -> None:
        """Let go of the attributes that hold a graph: after a step, the module alone decides how long it lives."""
        if any(map(_hold_graphs, self._attributes.values())):
            self._attributes = {key: a for key, a in self._attributes.items() if not a.hold_graphs}

    def find_writes(self) -> list[Tensor]:
        """Return the parameters that were not copied and were written since :meth:`save`; copy them from now on."""
        written = [p for p, _, version in self._uncopied if _version(p) != version]
        self._written.update(map(id, written))
        return written

    def share_writes(self, other: "ModelState") -> None:
        """Copy the parameters that the other snapshot copies."""
        self._written = other._written

    def own_modules_changed(self) -> bool:
        """True if a module whose attributes a forward may assign has changed one, or a buffer, since :meth:`save`."""
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

    def leave_out(self, ids: set[int]) -> None:
        """Leave these tensors out of :meth:`restore`."""
        kept = [i for i, t in enumerate(self._tensors) if id(t) not in ids]
        self._tensors, self._copies = [self._tensors[i] for i in kept], [self._copies[i] for i in kept]
        self._shapes = [self._shapes[i] for i in kept]
        self._listed, self._kinds = [], []

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


def _kinds(tensors: Iterable[Tensor]) -> list[Any]:
    return list(map(_kind, tensors))


def _version(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) or tensor.is_inference() else tensor._version


def is_writable(tensor: Tensor) -> bool:
    """True if a pass could have written into the tensor, in a way that can be undone.

    Not one without a storage (uninitialized, sparse), expanded, or for inference.
    """
    if not has_storage(tensor) or tensor.is_inference():
        return False
    return not is_expanded(tensor)
