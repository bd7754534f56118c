"""Lists of tensors as one long vector: norm, dot product, scaled addition."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from steppe._tensors.dtensor import (
    all_plain,
    by_placement,
    is_sharded,
    local,
    locals_of,
    reduced,
    shard_like,
    sum_over_ranks,
)

# Squares in one float32 sum: a CPU's sum of 50 M of them is off by 3 %, and one of 256 is right to 2e-7.
_PIECE_SIZE = 256
# Outside this range of norms, squares of float32 entries overflow or underflow.
_SAFE = (1e-15, 1e15)
# Entries that are multiplied in the wide dtype at once: few kernels, and little memory beside the tensors.
_CHUNK = 1 << 20
_FUSIBLE = (torch.float32, torch.bfloat16, torch.float16)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors as one vector, |x| = sqrt(sum_i |x_i|^2).

    The relative error is below 1e-6 at 100 M elements. The result is finite whenever the true norm is, for half
    precision and for huge and tiny entries. On an accelerator, nothing is read back to the host.

    Args:
        tensors: real tensors of any shapes, floating dtypes and devices. A sharded one (``DTensor``) counts as the full
            tensor; all ranks have to call this function then.

    Returns:
        A 0-dim tensor, on an accelerator if any of the tensors is; float64 (float32 where the device has none).
        Zero for an empty sequence.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5., dtype=torch.float64)
    """
    if all_plain(tensors) or not any(is_sharded(t) for t in tensors):
        return _local_norm(tensors)
    tensors = [reduced(t) for t in tensors]
    squares = [
        sum_over_ranks(_local_norm([local(tensors[i]) for i in positions]).square(), placement)
        for placement, positions in by_placement(tensors).items()
    ]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def _local_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of plain tensors, on any devices."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    on_accelerator = [t for t in tensors if not t.is_cpu]
    on_cpu = [t for t in tensors if t.is_cpu] if on_accelerator else tensors
    device = (on_accelerator or on_cpu)[0].device
    wide = accumulator(device)
    norms = _piece_norms(on_cpu)
    if on_accelerator:
        norms.append(torch.stack([n.to(device) for n in torch._foreach_norm(on_accelerator, 2, dtype=wide)]))
    total = _norm_of_norms(norms, device, wide)
    if not on_accelerator and not _SAFE[0] < float(total) < _SAFE[1]:
        # Rare, and reading a value on a CPU does not synchronize.
        total = _norm_of_norms([torch.linalg.vector_norm(t, dtype=wide).reshape(1) for t in on_cpu], device, wide)
    return total


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return a 0-dim tensor that is True if no entry is NaN or infinite; on an accelerator if any of the tensors is.

    >>> all_finite([torch.ones(2), torch.tensor(float("inf"))])
    tensor(False)
    """
    # A sum keeps NaN and inf, in two thirds of the time of a norm. If it is not finite, it may have overflowed.
    if all_plain(tensors) and all(t.is_cpu for t in tensors) and math.isfinite(sum(float(t.sum()) for t in tensors)):
        return torch.tensor(True)
    return norm(tensors).isfinite()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors as two vectors, x.y = sum_i x_i y_i.

    Products and sums are computed in float64 (float32 where the device has none), so that nothing overflows. On an
    accelerator, nothing is read back to the host.

    Args:
        xs: real tensors of any shapes, floating dtypes and devices; a sharded one counts as the full tensor.
        ys: as many, of the same shapes, on the same devices.

    Returns:
        A 0-dim tensor, on an accelerator if any of the tensors is. Zero for empty sequences.

    Example:
        >>> dot([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([4.0, 5.0]), torch.tensor(-1.0)])
        tensor(11., dtype=torch.float64)
    """
    if not any(is_sharded(x) for x in xs):
        return _local_dot(xs, ys)
    xs, total = [reduced(x) for x in xs], torch.zeros((), dtype=torch.float64)
    for placement, positions in by_placement(xs).items():
        part = _local_dot([local(xs[i]) for i in positions], [local(ys[i], like=xs[i]) for i in positions])
        total = total.to(part.device) + sum_over_ranks(part, placement)
    return total


def _local_dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Return the inner product of plain tensors, on any devices."""
    result_device = next((x.device for x in xs if x.device.type != "cpu"), torch.device("cpu"))
    total = torch.zeros((), dtype=accumulator(result_device), device=result_device)
    pieces: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for x, y in zip(xs, ys, strict=True):
        pairs_of_x = zip(torch.split(_flat(x), _CHUNK), torch.split(_flat(y, like=x), _CHUNK), strict=True)
        pieces.setdefault(x.device, []).extend(pairs_of_x)
    for device, pairs in pieces.items():
        wide = accumulator(device)
        for chunk in _chunks(pairs):
            left, right = (torch.cat(side).to(wide) for side in zip(*chunk, strict=True))
            total += torch.dot(left, right).to(total)
    return total


def accumulator(device: torch.device) -> torch.dtype:
    """Return the widest dtype in which ``device`` can accumulate: float64, or float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def reciprocal(length: Tensor) -> Tensor:
    """Return 1 / length, and 0 where length is 0, so that a normalized zero vector stays zero.

    Lengths below float32's smallest normal number count as 0, because their reciprocal is not a float32.

    >>> reciprocal(torch.tensor([0.0, 4.0]))
    tensor([0.0000, 0.2500])
    """
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(length < tiny, 0.0, length.clamp_min(tiny).reciprocal())


def where_finite(length: Tensor, values: Sequence[Tensor], otherwise: Sequence[Tensor | float]) -> list[Tensor]:
    """Return copies of the values if ``length`` is finite, else of ``otherwise``, without reading it on the host.

    For memories: an infinite value would stay there, and on an accelerator the host does not know yet that the step
    will be skipped.

    >>> where_finite(torch.tensor(float("nan")), [torch.ones(2)], [0.0])
    [tensor([0., 0.])]
    """
    finite = length.isfinite()
    return [torch.where(finite.to(v.device), v, o) for v, o in zip(values, otherwise, strict=True)]


def add_scaled_(targets: Sequence[Tensor], alpha: Tensor, directions: Sequence[Tensor]) -> None:
    """Add in place, targets += alpha * directions, in one sweep over memory.

    Args:
        targets: real tensors, changed in place.
        alpha: a 0-dim tensor; it is never read on the host.
        directions: as many tensors, of the same shapes.

    Example:
        >>> w = [torch.ones(2)]
        >>> add_scaled_(w, torch.tensor(0.5), [torch.tensor([2.0, 4.0])])
        >>> w
        [tensor([2., 3.])]
    """
    targets, directions = _local_pairs(targets, directions)
    for (device, dtype, other), positions in _by_kind(targets, directions).items():
        ts, ds = [targets[i] for i in positions], [directions[i] for i in positions]
        factor = alpha.to(device, torch.float32 if dtype == other == torch.float32 or dtype.itemsize == 2 else None)
        if device.type == "cuda" and dtype == other and dtype in _FUSIBLE and all_plain(ts, ds):
            ts, ds = _add_scaled_fused_(ts, factor, ds)
        if ts and dtype.itemsize > 2:
            torch._foreach_addcmul_(ts, ds, [factor] * len(ts))
        elif ts:
            # Multiply in float32: in float16 alpha would be rounded, and infinite beyond 65504.
            for t, d in zip(ts, ds, strict=True):
                t.add_(d.float() * factor)


def copy_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its target, in place and in few kernels."""
    if targets:
        targets, values = _local_pairs(targets, values)
        torch._foreach_copy_(targets, values)


def _local_pairs(targets: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return this rank's shards of both, placed as the targets."""
    if all_plain(targets, values):
        return list(targets), list(values)
    return locals_of(targets), [_local_value(value, target) for value, target in zip(values, targets, strict=True)]


def _local_value(value: Tensor, target: Tensor) -> Tensor:
    if is_sharded(target) and not is_sharded(value):
        value = shard_like(value, target)
    return local(value, like=target)


def _by_kind(
    targets: Sequence[Tensor], directions: Sequence[Tensor]
) -> dict[tuple[torch.device, torch.dtype, torch.dtype], Sequence[int]]:
    """Return positions by the target's device, the target's dtype and the direction's dtype."""
    kinds = [(t.device, t.dtype, d.dtype) for t, d in zip(targets, directions, strict=True)]
    positions: dict[tuple[torch.device, torch.dtype, torch.dtype], Sequence[int]] = dict.fromkeys(kinds, ())
    if len(positions) == 1:
        return dict.fromkeys(positions, range(len(kinds)))
    return {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in positions}


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
    strides, theirs = target.stride(), direction.stride()
    if not (target.is_contiguous() or (target.dim() == 4 and target.is_contiguous(memory_format=torch.channels_last))):
        return None
    if strides == theirs:
        return direction
    if any(size > 1 and a != b for size, a, b in zip(target.shape, strides, theirs, strict=True)):
        return None
    return direction.as_strided(target.shape, strides)


def real_views(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor as :func:`as_real` does."""
    if any(dtype.is_complex for dtype in {t.dtype for t in tensors}):
        return [as_real(t) for t in tensors]
    return list(tensors)


def as_real(tensor: Tensor) -> Tensor:
    """Return a real view: complex entries as pairs, as ``torch.optim`` treats them."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def reuse(old: Tensor | None, like: Tensor) -> Tensor:
    """Return ``old`` where it can hold a copy of ``like``, else a new uninitialized tensor that can."""
    if old is not None and old.shape == like.shape and old.dtype == like.dtype and old.device == like.device:
        return old
    return torch.empty_like(like, requires_grad=False)


def _piece_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return norms of short pieces, each accurate in its own dtype; only their few squares need a wide sum."""
    short: list[Tensor] = []
    long: list[Tensor] = []
    for t in tensors:
        (short if t.numel() <= _PIECE_SIZE and t.dtype.itemsize > 2 else long).append(t)
    norms = [torch.stack(torch._foreach_norm(short, 2))] if short else []
    for t in long:
        line = _flat(t)
        cut = line.numel() - line.numel() % _PIECE_SIZE
        dtype = torch.float32 if t.dtype.itemsize <= 2 else t.dtype
        norms.append(torch.linalg.vector_norm(line[:cut].view(-1, _PIECE_SIZE), dim=1, dtype=dtype))
        if cut < line.numel():
            norms.append(torch.linalg.vector_norm(line[cut:], dtype=dtype).reshape(1))
    return norms


def _flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the entries in the memory order of ``like``: a view for every dense layout, channels-last included."""
    if tensor.is_contiguous() and (like is None or like.is_contiguous()):
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=(tensor if like is None else like).stride().__getitem__, reverse=True)
    return tensor.permute(order).reshape(-1)


def _chunks(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Group neighboring pairs into chunks of at most ``_CHUNK`` entries."""
    chunk: list[tuple[Tensor, Tensor]] = []
    length = 0
    for pair in pairs:
        if length + pair[0].numel() > _CHUNK:
            yield chunk
            chunk, length = [], 0
        chunk.append(pair)
        length += pair[0].numel()
    yield chunk


def _norm_of_norms(norms: Sequence[Tensor], device: torch.device, wide: torch.dtype) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(torch.cat([n.to(device) for n in norms]), dtype=wide)
    return total
