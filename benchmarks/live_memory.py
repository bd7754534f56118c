"""Count the bytes of all live tensors, with the kernels or without them."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves, tree_map_only


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and count the storages of its results."""
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._uncount, key, size)

    def _uncount(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class SkippedKernels(TorchDispatchMode):
    """Runs a program on a CPU without its arithmetic, so that the memory of a large model is counted in seconds.

    Each operation allocates its results, and leaves them unwritten; memory that is never written takes no space.
    Tensors, devices and code paths are those of a real run, and so are the bytes that :class:`LiveMemory` counts inside
    this mode, but for LayerNorm's statistics of half-precision inputs: they have 4 bytes each, as on a GPU, and not 2.
    The values are arbitrary: one that is read on the host is True or 1.

    FakeTensorMode would be another way: its tensors are of a class of their own, which methods refuse as a quantized
    weight, and for which Transformers builds an attention mask that it does without in a real run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[Any, Any] = {}
        """By operation and kinds of its arguments: tensors of the meta device like its results; _VIEW for a view."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Return the results of an operation, unwritten."""
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        key = (function, *map(_kind, args), *((name, _kind(value)) for name, value in kwargs.items()))
        if key not in self._results:
            self._results[key] = _on_meta(function, args, kwargs)
        result = self._results[key]
        if result is _VIEW:
            return function(*args, **kwargs)
        if result is _IN_PLACE:
            return _written(function, args, kwargs)
        return tree_map_only(Tensor, lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype), result)


_VIEW, _IN_PLACE = object(), object()


def _kind(value: Any) -> Any:
    """Return what an operation's results depend on, of one argument, apart from the values of tensors."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_kind, value))
    return type(value), value


def _on_meta(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an operation's results as tensors of the meta device, which has shapes and no memory."""
    if torch.Tag.inplace_view in function.tags:
        return _VIEW
    if function._schema.is_mutable:
        return _IN_PLACE
    stand_ins: dict[int, Tensor] = {}
    args, kwargs = tree_map_only(Tensor, lambda t: stand_ins.setdefault(id(t), _stand_in(t)), (args, kwargs))
    if any(argument.name == "device" for argument in function._schema.arguments):
        kwargs["device"] = torch.device("meta")
    result = function(*args, **kwargs)
    storages = {t.untyped_storage()._cdata for t in stand_ins.values()}
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    return _VIEW if not tensors or any(t.untyped_storage()._cdata in storages for t in tensors) else result


def _stand_in(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operation in place returns: the arguments that it writes, or nothing."""
    schema = function._schema
    if any(result.alias_info is None for result in schema.returns):
        raise NotImplementedError(f"{function} writes to its arguments, and returns a new tensor, too")
    given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    written = [given[a.name] for a in schema.arguments if a.name in given and a.alias_info and a.alias_info.is_write]
    return None if not schema.returns else written[0] if len(schema.returns) == 1 else tuple(written)
