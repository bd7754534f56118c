"""Operations in place on lists of tensors, in few kernels, and views and storage for them."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from operator import attrgetter

import torch
from torch import Tensor

from steppe._tensors.dtensor import all_plain, is_sharded, local, locals_of, shard_like

_device, _dtype, _shape = attrgetter("device"), attrgetter("dtype"), attrgetter("shape")
_KIND = (_shape, _dtype, _device)
_version = attrgetter("_version")
_HOST = "cpu"
"""The type of device whose values are read at no cost; tests that record steps on a CPU, for a GPU, replace it."""
_FUSIBLE = (torch.float32, torch.bfloat16, torch.float16)
_PIECE = 1 << 21  # entries: 8 MiB in float32, enough to keep a kernel busy


def write_marks(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return for each tensor what a write in place changes, or an assignment to its ``.data``.

    ``t.data.copy_(...)`` changes neither. Of shards only the count of writes is known.

    Example:
        >>> w = [torch.ones(2)]
        >>> before = write_marks(w)
        >>> _ = w[0].mul_(2)
        >>> write_marks(w) == before
        False
    """
    addresses = map(Tensor.data_ptr, tensors) if all_plain(tensors) else repeat(0)
    return list(zip(map(_version, tensors), addresses, strict=False))


def add_scaled_(targets: Sequence[Tensor], alpha: Tensor, directions: Sequence[Tensor]) -> None:
    """Add in place, targets += alpha * directions, in one sweep over memory.

    Args:
        targets: Real tensors, changed in place.
        alpha: A 0-dim tensor; the host reads it only on a CPU.
        directions: As many tensors, of the same shapes.

    Example:
        >>> w = [torch.ones(2)]
        >>> add_scaled_(w, torch.tensor(0.5), [torch.tensor([2.0, 4.0])])
        >>> w
        [tensor([2., 3.])]
    """
    targets, directions = _local_pairs(targets, directions)
    for (device, dtype, other), positions in _by_kind(targets, directions).items():
        ts, ds = [targets[i] for i in positions], [directions[i] for i in positions]
        if alpha.device.type == device.type == _HOST and dtype.itemsize > 2:
            torch._foreach_add_(ts, ds, alpha=float(alpha))
            continue
        factor = alpha.to(device, torch.float32 if dtype == other == torch.float32 or dtype.itemsize == 2 else None)
        if device.type == "cuda" and dtype == other and dtype in _FUSIBLE and all_plain(ts, ds):
            ts, ds = _add_scaled_fused_(ts, factor, ds)
        if ts and dtype.itemsize > 2:
            torch._foreach_addcmul_(ts, ds, [factor] * len(ts))
        elif ts:
            # Multiply in float32: in float16 alpha would be rounded, and infinite beyond 65504.
            for t, d in zip(ts, ds, strict=True):
                t.add_(d.float() * factor)


def _by_kind(
    targets: Sequence[Tensor], directions: Sequence[Tensor]
) -> dict[tuple[torch.device, torch.dtype, torch.dtype], Sequence[int]]:
    """Return positions by the target's device, the target's dtype and the direction's dtype."""
    kinds = zip(map(_device, targets), map(_dtype, targets), map(_dtype, directions), strict=True)
    positions: dict[tuple[torch.device, torch.dtype, torch.dtype], Sequence[int]]
    positions = dict.fromkeys(kinds, range(len(targets)))
    if len(positions) > 1:
        kind_of = [(t.device, t.dtype, d.dtype) for t, d in zip(targets, directions, strict=True)]
        positions = {kind: [i for i, other in enumerate(kind_of) if other == kind] for kind in positions}
    return positions


def _add_scaled_fused_(
    targets: Sequence[Tensor], alpha: Tensor, directions: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Add by a step of fused SGD with ``maximize=True``: the only multi-tensor kernel whose factor is a tensor.

    Returns:
        The targets that the kernel does not accept, and their directions.
    """
    views = list(map(_with_strides_of, directions, targets))
    accepted = [i for i, view in enumerate(views) if view is not None]
    torch._fused_sgd_(
        [targets[i] for i in accepted],
        [view for view in views if view is not None],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=alpha,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
    )
    left = [i for i, view in enumerate(views) if view is None]
    return [targets[i] for i in left], [directions[i] for i in left]


def _with_strides_of(direction: Tensor, target: Tensor) -> Tensor | None:
    """Return a view of the direction with the target's strides, which a fused kernel requires; None if there is none.

    A channels-last 1x1 convolution and its gradient may have different strides along the dimensions of size 1.
    """
    strides, own_strides = target.stride(), direction.stride()
    if not (target.is_contiguous() or (target.dim() == 4 and target.is_contiguous(memory_format=torch.channels_last))):
        return None
    if strides == own_strides:
        return direction
    if any(size > 1 and a != b for size, a, b in zip(target.shape, strides, own_strides, strict=True)):
        return None
    return direction.as_strided(target.shape, strides)


def copy_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its target, in place and in few kernels."""
    if targets:
        targets, values = _local_pairs(targets, values)
        torch._foreach_copy_(targets, values)


def pieces(targets: Sequence[Tensor], *others: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield parallel lists of views with few entries, so that temporary copies of them take little memory.

    Args:
        targets: Tensors, which may be changed in place piece by piece; of sharded ones, the views are of this rank's.
        *others: Lists of as many tensors, of the same shapes.

    Example:
        >>> [(x, y)] = pieces([torch.zeros(2), torch.zeros(1)], [torch.ones(2), torch.ones(1)])
        >>> x, y
        ([tensor([0., 0.]), tensor([0.])], [tensor([1., 1.]), tensor([1.])])
    """
    local_others = [_local_pairs(targets, other)[1] for other in others]
    piece: list[tuple[Tensor, ...]] = []
    size = 0
    for tensors in zip(_local_pairs(targets, targets)[0], *local_others, strict=True):
        for views in _split(tensors):
            if piece and size + views[0].numel() > _PIECE:
                yield tuple(map(list, zip(*piece, strict=True)))
                piece, size = [], 0
            piece.append(views)
            size += views[0].numel()
    if piece:
        yield tuple(map(list, zip(*piece, strict=True)))


def _split(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Yield parallel views along the first dimension, of at most ``_PIECE`` entries or one row."""
    size = tensors[0].numel()
    if size <= _PIECE:
        yield tensors
        return
    rows = max(1, _PIECE * len(tensors[0]) // size)
    yield from zip(*(torch.split(t, rows) for t in tensors), strict=True)


def _local_pairs(targets: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return this rank's shards of both, placed as the targets."""
    if all_plain(targets, values):
        return list(targets), list(values)
    return locals_of(targets), [_local_value(value, target) for value, target in zip(values, targets, strict=True)]


def _local_value(value: Tensor, target: Tensor) -> Tensor:
    if is_sharded(target) and not is_sharded(value):
        value = shard_like(value, target)
    return local(value, like=target)


def overlapping(tensors: Sequence[Tensor]) -> list[int]:
    """Return the positions of plain tensors that overlap themselves (expanded), or begin in memory where another does.

    Of several tensors in the same memory, the first is left out: it may keep it. It is called in each pass, so that
    other overlaps, which no gradient of torch has, are not looked for.

    Example:
        >>> x = torch.ones(4)
        >>> overlapping([x, torch.ones(1).expand(4), x, torch.ones(4)])
        [1, 2]
    """
    begins, strides = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors))
    if len(set(begins)) == len(begins) and not any(0 in stride for stride in strides):
        return []
    found, seen = [], set[int]()
    for i, (t, begin, stride) in enumerate(zip(tensors, begins, strides, strict=True)):
        if begin in seen or (0 in stride and is_expanded(t)):
            found.append(i)
        elif begin:  # 0 without entries or without memory
            seen.add(begin)
    return found


def is_expanded(tensor: Tensor) -> bool:
    """True if several entries of a tensor are one number in memory."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def real_views(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor as :func:`as_real` does."""
    if any(dtype.is_complex for dtype in set(map(_dtype, tensors))):
        return [as_real(t) for t in tensors]
    return list(tensors)


def as_real(tensor: Tensor) -> Tensor:
    """Return a real view: complex entries as pairs, as ``torch.optim`` treats them."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def reuse(old: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Return each of ``old`` that can hold a copy of its counterpart, else a new uninitialized tensor that can."""
    known = [a for a in old if a is not None]
    if len(known) == len(like) and all(list(map(of, known)) == list(map(of, like)) for of in _KIND):
        return known  # lists are compared in a fraction of the time that pairs take
    pairs = zip(old, like, strict=True)
    return [
        a if a is not None and all(of(a) == of(b) for of in _KIND) else torch.empty_like(b, requires_grad=False)
        for a, b in pairs
    ]
