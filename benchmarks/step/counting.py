"""Operations, memory traffic and memory of a step, counted; and the kernels that a GPU was given."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from memory import Alive

_NO_WORK = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_ONLY_WRITES = ("copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_")


class Counted(Alive):
    """Counts what reaches the dispatcher, and what it moves: every tensor that an operation reads, and that it writes.

    A tensor that is changed in place counts as both, unless it is only overwritten (``copy_``). Views and questions
    count nothing. What an operation keeps to itself, such as a cache or a temporary of its own, is not seen.

    Args:
        known: tensors that are there already, and are not this step's memory.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.operations = self.read = self.written = 0
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count."""
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(function, types, args, kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        inputs = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        arguments = function._schema.arguments
        given = {a.name: v for a, v in zip(arguments, args, strict=False)} | kwargs
        changed = {
            id(t): t
            for a in arguments
            if a.alias_info is not None and a.alias_info.is_write
            for t in tree_leaves(given.get(a.name))
            if isinstance(t, Tensor)
        }
        there = {t.untyped_storage()._cdata for t in inputs.values()}
        made = [t for t in outputs if t.untyped_storage()._cdata not in there]
        name = function._schema.name.partition("::")[2]
        if name in _NO_WORK or not (made or changed):
            return result
        self.operations += 1
        self.read += sum(_bytes(t) for key, t in inputs.items() if not (name in _ONLY_WRITES and key in changed))
        self.written += sum(map(_bytes, (*made, *changed.values())))
        return result


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # an expanded one has less


def kernels(step: Callable[[], object]) -> tuple[int, float]:
    """How many kernels and copies a GPU runs for a step, and for how many seconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    # an annotation covers what it names, and would count it twice
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    return len(events), sum(e.time_range.elapsed_us() for e in events) / 1e6
