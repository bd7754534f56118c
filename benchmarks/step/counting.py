"""Count the operations, the memory traffic and the memory of a step, and the kernels that a GPU runs for it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from live_memory import LiveMemory

_NO_WORK = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_ONLY_WRITES = ("copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_")


class Counted(LiveMemory):
    """Counts operations at the dispatcher, and the bytes of the tensors that they read and write.

    A tensor that is changed in place counts as read and written, unless it is only overwritten (``copy_``). Views and
    queries do not count. Memory inside an operation, such as a cache or a temporary, is not counted.

    Args:
        known: existing tensors, which are not memory of the step.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.operations = self.read = self.written = 0
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(function, types, args, kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        inputs = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        arguments = function._schema.arguments
        values = {a.name: v for a, v in zip(arguments, args, strict=False)} | kwargs
        changed = {
            id(t): t
            for a in arguments
            if a.alias_info is not None and a.alias_info.is_write
            for t in tree_leaves(values.get(a.name))
            if isinstance(t, Tensor)
        }
        existing = {t.untyped_storage()._cdata for t in inputs.values()}
        new = [t for t in outputs if t.untyped_storage()._cdata not in existing]
        name = function._schema.name.partition("::")[2]
        if name in _NO_WORK or not (new or changed):
            return result
        self.operations += 1
        self.read += sum(_bytes(t) for key, t in inputs.items() if not (name in _ONLY_WRITES and key in changed))
        self.written += sum(map(_bytes, (*new, *changed.values())))
        return result


def _bytes(tensor: Tensor) -> int:
    # the storage of an expanded tensor is smaller than its entries
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def kernels(step: Callable[[], object]) -> tuple[int, float]:
    """Return the number of kernels and copies that a GPU runs for a step, and their seconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    # an annotation spans other events, which would count twice
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    return len(events), sum(e.time_range.elapsed_us() for e in events) / 1e6
