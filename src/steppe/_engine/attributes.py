"""The attributes of a module that its forward may assign or change."""

import inspect
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from steppe._engine.generators import get_state, is_generator, set_state
from steppe._engine.registrations import is_layer, is_torchs
from steppe._tensors.dtensor import all_plain

_MANY = 1024
"""Number of values from which on a list or dict is data, and not a state."""
_LARGE_ARRAY = 2**16
"""Number of elements from which on an array of NumPy is data."""
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
_VALUES = (int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)


class Attributes:
    """The attributes of one module, with the values that can be restored, and the generators among them.

    Restored are numbers, strings, members of enums, tensors, values of NumPy, and lists, tuples, dicts and deques of
    these, nested ones included. A list or dict that grows is a log, and stays.

    Args:
        module: The module.
        excluded_storages: Addresses of storages whose tensors are not listed in :attr:`tensors`.
    """

    def __init__(self, module: nn.Module, excluded_storages: set[int]) -> None:
        self._module = module
        own = {k: _Parts.of(v) for k, v in vars(module).items() if k not in _TORCH_ATTRIBUTES}
        self._all = dict(vars(module))
        self._values = {k: self._all[k] for k, parts in own.items() if parts.is_state()}
        states = [own[k] for k in self._values]
        self._contents = [(c, _copy(c)) for parts in states for c in parts.containers]
        # a forward assigns another tensor in the place of one with a graph (a hidden state), and does not write it
        tensors = [v for parts in states for v in parts.leaves if isinstance(v, Tensor) and v.grad_fn is None]
        self.tensors = [t for t in tensors if storage_of(t) not in excluded_storages]
        """The tensors without a graph among the values that can be restored; their contents are not kept here."""
        self.hold_graphs = any(parts.has_graph() for parts in own.values())
        """True if a tensor among the values has a graph, which lives for as long as these attributes are kept."""
        self.generators = [v for parts in own.values() for v in parts.leaves if is_generator(v)]

    @classmethod
    def of(cls, module: nn.Module, earlier: "Attributes | None", excluded_storages: set[int]) -> "Attributes":
        """Return the attributes of the module: the earlier ones if none was assigned since."""
        if earlier is not None and not earlier._contents and earlier._are_current():
            return earlier
        return cls(module, excluded_storages)

    def _are_current(self) -> bool:
        now = vars(self._module)
        return now.keys() == self._all.keys() and all(map(is_, now.values(), self._all.values()))

    def are_changed(self) -> bool:
        """True if an attribute was assigned, or a list, dict or array changed."""
        return not self._are_current() or any(_differ(now, saved) for now, saved in self._contents)

    def restore(self) -> None:
        """Assign the saved values to the attributes."""
        now = vars(self._module)
        if not self._are_current():
            for name in [k for k, v in now.items() if k not in self._all and _Parts.of(v).is_state()]:
                del now[name]
            for name, value in self._values.items():
                if name not in now or (now[name] is not value and _Parts.of(now[name]).may_replace_state()):
                    now[name] = value
        for container, content in self._contents:
            _restore(container, content)


class AttributesOnCopies:
    """Copies of the tensors in the attributes of modules, in the place of those from :meth:`place` to :meth:`restore`.

    A forward writes to the copies, and a graph that it makes can be kept. :meth:`restore` restores all attributes that
    were assigned, whatever they are; the content of lists, dicts, deques and arrays, grown ones included; and
    generators. What is in objects of other classes is left alone.

    Args:
        modules: The modules, each once.
        copies: Tensors to place for some, by the ``id`` of what they are placed for: the weights of the modules.
    """

    def __init__(self, modules: Iterable[nn.Module], copies: Mapping[int, Tensor]) -> None:
        self._modules = list(modules)
        self._copies = dict(copies)
        self._assigned = [(vars(m), dict(vars(m))) for m in self._modules]
        self._contents: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Any]] = []

    def place(self) -> None:
        """Place the copies."""
        for attributes in [vars(m) for m in self._modules if may_assign_attributes(m)]:
            for name in attributes.keys() - _TORCH_ATTRIBUTES:
                parts = _Parts.of(attributes[name])
                if parts.complete:
                    self._contents += [(container, _copy(container)) for container in parts.containers]
                    self._generators += [(g, get_state(g)) for g in parts.leaves if is_generator(g)]
                    if any(isinstance(v, Tensor) for v in parts.leaves):
                        attributes[name] = self._placed(attributes[name])

    def restore(self) -> None:
        """Restore the attributes."""
        for container, content in reversed(self._contents):  # one in two attributes was first listed without copies
            _restore(container, content, grown=True)
        for generator, state in reversed(self._generators):
            set_state(generator, state)
        for attributes, own in self._assigned:
            for name in attributes.keys() - own.keys():
                del attributes[name]
            for name in [name for name, value in own.items() if attributes.get(name, attributes) is not value]:
                attributes[name] = own[name]

    def _placed(self, value: Any) -> Any:
        """Return the value with copies of its tensors; lists, dicts and deques are changed in place."""
        if isinstance(value, Tensor):
            return self._copy_of(value)
        if isinstance(value, tuple):
            parts = list(map(self._placed, value))
            if all(map(is_, parts, value)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, dict):
            dict.update(value, {k: self._placed(v) for k, v in dict.items(value)})
        elif isinstance(value, list):
            value[:] = list(map(self._placed, value))
        elif isinstance(value, deque):
            parts = list(map(self._placed, value))
            value.clear()
            value.extend(parts)
        return value

    def _copy_of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._copies:
            # a forward assigns another tensor in the place of one with a graph (a hidden state), and does not write it
            if is_lazy(tensor) or not all_plain([tensor]) or tensor.grad_fn is not None:
                return tensor
            self._copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return self._copies[id(tensor)]


def may_assign_attributes(module: nn.Module) -> bool:
    """True if a forward may assign attributes of the module.

    Layers of torch keep in buffers what a forward changes. But a hook may assign their attributes, and so may the
    forward of the module around a layer, which has then an attribute that its own class does not know. Wrappers of
    torch (``DistributedDataParallel``) have attributes that belong to no pass; a lazy layer becomes another one.
    """
    if not is_torchs(module):
        return True
    if not is_layer(module) or isinstance(module, LazyModuleMixin):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    kind: Any = type(module)
    others = [(name, vars(module)[name]) for name in _unknown_to(kind, tuple(vars(module)))]
    return any(_Parts.of(value).is_state() and not _is_mark(name, value) for name, value in others)


@cache
def _unknown_to(kind: Any, names: tuple[str, ...]) -> list[str]:
    """Return those of some attributes that no method of a class mentions: code outside of the class has set them."""
    functions = [inspect.unwrap(f) for c in kind.__mro__ for f in vars(c).values() if inspect.isfunction(f)]
    known = _TORCH_ATTRIBUTES.union(*(f.__code__.co_names for f in functions))
    return [name for name in names if name not in known]


def _is_mark(name: str, value: Any) -> bool:
    """True for what frameworks set on all layers: ``_is_hf_initialized``."""
    return name.startswith("_") and isinstance(value, bool)


def tensors_in_attributes(module: nn.Module) -> list[Tensor]:
    """Return the tensors in the attributes of a module, also those in lists, tuples, dicts and deques there."""
    values = [value for name, value in vars(module).items() if name not in _TORCH_ATTRIBUTES]
    return [leaf for value in values for leaf in _Parts.of(value).leaves if isinstance(leaf, Tensor)]


class _Parts(NamedTuple):
    """The parts of a value: what is in nested lists, tuples, dicts and deques, and these themselves."""

    leaves: list[Any]
    containers: list[Any]
    """Those that can be changed in place, arrays of NumPy included."""
    complete: bool
    """False if there are too many: the value is data, and not a state."""

    @classmethod
    def of(cls, value: Any) -> "_Parts":
        parts = cls([], [], True)
        return parts if parts._add(value) else cls([value], [], False)

    def _add(self, value: Any) -> bool:
        """Add a value; return False if the limit is passed, as it is by a list that contains itself."""
        if isinstance(value, list | tuple | dict | deque):
            if not isinstance(value, tuple):
                self.containers.append(value)
            few = len(self.leaves) + len(value) <= _MANY and len(self.containers) <= _MANY
            return few and all(map(self._add, value.values() if isinstance(value, dict) else value))
        if _is_array(value):
            self.containers.append(value)
            return bool(value.size <= _LARGE_ARRAY and not value.dtype.hasobject)
        self.leaves.append(value)
        return True

    def is_state(self) -> bool:
        """True if the value can be restored."""
        return self.complete and all(map(_is_plain, self.leaves))

    def has_graph(self) -> bool:
        """True if a tensor among the parts has a graph."""
        return any(isinstance(v, Tensor) and v.grad_fn is not None for v in self.leaves)

    def may_replace_state(self) -> bool:
        """True if a forward may have assigned it in the place of a state."""
        return self.is_state() or self.has_graph()


def has_storage(tensor: Tensor) -> bool:
    """True if the tensor has memory to copy: it is not lazy, sparse, nested, or wrapped by ``torch.vmap``."""
    if is_lazy(tensor) or tensor.is_nested:
        return False
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def storage_of(tensor: Tensor) -> int:
    """Return the address of the tensor's storage; 0 if it has none of its own (lazy, sharded, sparse, fake)."""
    return tensor.untyped_storage().data_ptr() if all_plain([tensor]) and has_storage(tensor) else 0


def _is_plain(value: Any) -> bool:
    numpy = sys.modules.get("numpy")  # not imported: a program without NumPy has no such values
    return isinstance(value, (Tensor, *_VALUES)) or (numpy is not None and isinstance(value, numpy.generic))


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _elements(container: Any) -> Iterator[Any]:
    return iter(container.values() if isinstance(container, dict) else container)


def _copy(container: Any) -> Any:
    """Return the content of a container; not by a method, which in a subclass may do anything (``Counter.update``)."""
    if _is_array(container):
        return container.copy()
    return dict(container) if isinstance(container, dict) else list(container)


def _differ(now: Any, saved: Any) -> bool:
    if _is_array(now):
        return bool(now.shape != saved.shape or now.tobytes() != saved.tobytes())
    return len(now) != len(saved) or not all(map(is_, _elements(now), _elements(saved)))


def _restore(container: Any, content: Any, *, grown: bool = False) -> None:
    """Write the content back in place; a list or dict that has grown is a log, and stays, unless ``grown``."""
    if _is_array(container):
        if container.shape == content.shape:
            container[...] = content
    elif isinstance(container, list):
        if grown or len(container) == len(content):
            container[:] = content
    elif isinstance(container, dict):
        if grown:
            for key in [key for key in container if key not in content]:
                del container[key]
            for key in [key for key in content if key not in container]:
                container[key] = content[key]
        if container.keys() == content.keys():
            dict.update(container, content)
    elif grown or container.maxlen is not None or len(container) == len(content):
        container.clear()
        container.extend(content)
