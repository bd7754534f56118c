"""Lists of tensors seen as one long vector: its norm, its dot products, and a scaled sum into it."""

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
    over_ranks,
    reduced,
    shard_like,
)

# On a CPU one float32 sum over 50 M squares is off by 3 %; over so few it is right to 2e-7, whatever the entries.
_PIECE = 256
# Outside this range of norms the squares of float32 gradients begin to overflow or to vanish.
_SAFE = (1e-15, 1e15)
# So many entries are multiplied in the wide dtype at once: few kernels, and little memory beside the tensors.
_RUN = 1 << 20
_FUSIBLE = (torch.float32, torch.bfloat16, torch.float16)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors as one vector, |x| = sqrt(sum_i |x_i|^2).

    It is right to 1e-6 at 100 M elements, and finite whenever the true norm is: half-precision, huge and tiny
    entries included. On an accelerator nothing is read back to the host.

    Args:
        tensors: real tensors of any shapes, floating dtypes and devices; of sharded ones (``DTensor``), each counts as
            a whole, and every rank must ask.

    Returns:
        A 0-dim tensor, on an accelerator if any of the tensors is; float64 (float32 where the device has none).
        Zero for an empty sequence.

    >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5., dtype=torch.float64)
    """
    if all_plain(tensors) or not any(is_sharded(t) for t in tensors):
        return _norm_here(tensors)
    tensors = [reduced(t) for t in tensors]
    kinds = by_placement(tensors)
    parts = [over_ranks(_norm_here([local(tensors[i]) for i in at]).square(), kind) for kind, at in kinds.items()]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum().sqrt()


def _norm_here(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of what lies on this rank."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    elsewhere = [t for t in tensors if not t.is_cpu]
    on_cpu = [t for t in tensors if t.is_cpu] if elsewhere else tensors
    home = (elsewhere or on_cpu)[0].device
    wide = accumulator(home)
    parts = _pieces(on_cpu)
    if elsewhere:
        parts.append(torch.stack([n.to(home) for n in torch._foreach_norm(elsewhere, 2, dtype=wide)]))
    total = _norm_of_norms(parts, home, wide)
    if not elsewhere and not _SAFE[0] < float(total) < _SAFE[1]:
        # Rare, and on a CPU the look at the value costs no synchronization.
        total = _norm_of_norms([torch.linalg.vector_norm(t, dtype=wide).reshape(1) for t in on_cpu], home, wide)
    return total


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether no entry is NaN or infinite, as a 0-dim tensor: on an accelerator if any of the tensors is.

    >>> all_finite([torch.ones(2), torch.tensor(float("inf"))])
    tensor(False)
    """
    # NaN and inf stay in a sum, which costs two thirds of a norm; one that overflows asks for the longer look
    if all_plain(tensors) and all(t.is_cpu for t in tensors) and math.isfinite(sum(float(t.sum()) for t in tensors)):
        return torch.tensor(True)
    return norm(tensors).isfinite()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors as two vectors, x.y = sum_i x_i y_i.

    Products and sum are those of float64 (float32 where the device has none), so nothing overflows on the way. On an
    accelerator nothing is read back to the host.

    Args:
        xs: real tensors of any shapes, floating dtypes and devices; sharded ones count as a whole.
        ys: as many, of the same shapes, on the same devices.

    Returns:
        A 0-dim tensor, on an accelerator if any of the tensors is. Zero for empty sequences.

    >>> dot([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([4.0, 5.0]), torch.tensor(-1.0)])
    tensor(11., dtype=torch.float64)
    """
    if not any(is_sharded(x) for x in xs):
        return _dot_here(xs, ys)
    xs, total = [reduced(x) for x in xs], torch.zeros((), dtype=torch.float64)
    for kind, at in by_placement(xs).items():
        part = _dot_here([local(xs[i]) for i in at], [local(ys[i], like=xs[i]) for i in at])
        total = total.to(part.device) + over_ranks(part, kind)
    return total


def _dot_here(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The inner product of what lies on this rank."""
    home = next((x.device for x in xs if x.device.type != "cpu"), torch.device("cpu"))
    total = torch.zeros((), dtype=accumulator(home), device=home)
    pieces: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for x, y in zip(xs, ys, strict=True):
        both = zip(torch.split(_flat(x), _RUN), torch.split(_flat(y, like=x), _RUN), strict=True)
        pieces.setdefault(x.device, []).extend(both)
    for device, pairs in pieces.items():
        wide = accumulator(device)
        for run in _runs(pairs):
            left, right = (torch.cat(side).to(wide) for side in zip(*run, strict=True))
            total += torch.dot(left, right).to(total)
    return total


def accumulator(device: torch.device) -> torch.dtype:
    """Return the widest dtype in which ``device`` can accumulate: float64, or float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def reciprocal(length: Tensor) -> Tensor:
    """Return 1 / length, and 0 where length is 0, so that a zero vector stays one when it is normalized.

    Lengths under float32's smallest normal number count as 0: their reciprocal is not a float32.

    >>> reciprocal(torch.tensor([0.0, 4.0]))
    tensor([0.0000, 0.2500])
    """
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(length < tiny, 0.0, length.clamp_min(tiny).reciprocal())


def where_finite(length: Tensor, values: Sequence[Tensor], otherwise: Sequence[Tensor | float]) -> list[Tensor]:
    """Return copies of the values if ``length`` is finite, else of what comes ``otherwise``, without a look at it.

    It is for memories: what was infinite once would be so for ever, and on an accelerator nobody knows yet that the
    step will be skipped.

    >>> where_finite(torch.tensor(float("nan")), [torch.ones(2)], [0.0])
    [tensor([0., 0.])]
    """
    finite = length.isfinite()
    return [torch.where(finite.to(v.device), v, o) for v, o in zip(values, otherwise, strict=True)]


def add_scaled_(targets: Sequence[Tensor], alpha: Tensor, directions: Sequence[Tensor]) -> None:
    """Add in place, targets += alpha * directions, in one pass over memory.

    Args:
        targets: real tensors, changed in place.
        alpha: a 0-dim tensor; it is never read on the host.
        directions: as many tensors, of the same shapes.

    >>> w = [torch.ones(2)]
    >>> add_scaled_(w, torch.tensor(0.5), [torch.tensor([2.0, 4.0])])
    >>> w
    [tensor([2., 3.])]
    """
    targets, directions = _side_by_side(targets, directions)
    for (device, dtype, along), at in _alike(targets, directions).items():
        ts, ds = [targets[i] for i in at], [directions[i] for i in at]
        factor = alpha.to(device, torch.float32 if dtype == along == torch.float32 or dtype.itemsize == 2 else None)
        if device.type == "cuda" and dtype == along and dtype in _FUSIBLE and all_plain(ts, ds):
            ts, ds = _add_scaled_fused_(ts, factor, ds)
        if ts and dtype.itemsize > 2:
            torch._foreach_addcmul_(ts, ds, [factor] * len(ts))
        elif ts:
            # In half precision alpha itself would be rounded, and beyond 65504 be infinite: multiply in float32.
            for t, d in zip(ts, ds, strict=True):
                t.add_(d.float() * factor)


def copy_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy in place, each value into its target, in few kernels."""
    if targets:
        targets, values = _side_by_side(targets, values)
        torch._foreach_copy_(targets, values)


def _side_by_side(targets: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What this rank holds of both."""
    if all_plain(targets, values):
        return list(targets), list(values)
    here = [_here(value, target) for value, target in zip(values, targets, strict=True)]
    return locals_of(targets), here


def _alike(
    targets: Sequence[Tensor], directions: Sequence[Tensor]
) -> dict[tuple[torch.device, torch.dtype, torch.dtype], Sequence[int]]:
    """The positions that have the target's device and dtype, and the direction's dtype, in common."""
    kinds = [(t.device, t.dtype, d.dtype) for t, d in zip(targets, directions, strict=True)]
    alike: dict[tuple[torch.device, torch.dtype, torch.dtype], Sequence[int]] = dict.fromkeys(kinds, ())
    if len(alike) == 1:
        return dict.fromkeys(alike, range(len(kinds)))
    return {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in alike}


def _here(value: Tensor, target: Tensor) -> Tensor:
    """What this rank holds of a value, laid out as the target."""
    if is_sharded(target) and not is_sharded(value):
        value = shard_like(value, target)
    return local(value, like=target)


def _add_scaled_fused_(
    targets: Sequence[Tensor], alpha: Tensor, directions: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The sum as a plain step of SGD upwards: the one multi-tensor kernel whose factor is a tensor.

    Returned are the targets that it does not take, with their directions.
    """
    views = list(map(_in_step, directions, targets))
    taken = [i for i, view in enumerate(views) if view is not None]
    torch._fused_sgd_(
        [targets[i] for i in taken],
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


def _in_step(direction: Tensor, target: Tensor) -> Tensor | None:
    """The direction with the target's strides, which a fused kernel wants; None where that takes more than a view.

    A channels-last 1x1 convolution and its gradient may have other strides along the dimensions of size 1.
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
    """Return each as :func:`as_real` does."""
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


def _pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms of short pieces, each accurate in its own dtype, so that only their number needs a wide sum."""
    short: list[Tensor] = []
    long: list[Tensor] = []
    for t in tensors:
        (short if t.numel() <= _PIECE and t.dtype.itemsize > 2 else long).append(t)
    parts = [torch.stack(torch._foreach_norm(short, 2))] if short else []
    for t in long:
        line = _flat(t)
        cut = line.numel() - line.numel() % _PIECE
        dtype = torch.float32 if t.dtype.itemsize <= 2 else t.dtype
        parts.append(torch.linalg.vector_norm(line[:cut].view(-1, _PIECE), dim=1, dtype=dtype))
        if cut < line.numel():
            parts.append(torch.linalg.vector_norm(line[cut:], dtype=dtype).reshape(1))
    return parts


def _flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The entries in the order of memory (of ``like``): a view for every dense layout, channels-last too."""
    if tensor.is_contiguous() and (like is None or like.is_contiguous()):
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=(tensor if like is None else like).stride().__getitem__, reverse=True)
    return tensor.permute(order).reshape(-1)


def _runs(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Neighboring pairs together, as long as they have no more than ``_RUN`` entries."""
    run: list[tuple[Tensor, Tensor]] = []
    length = 0
    for pair in pairs:
        if length + pair[0].numel() > _RUN:
            yield run
            run, length = [], 0
        run.append(pair)
        length += pair[0].numel()
    yield run


def _norm_of_norms(parts: Sequence[Tensor], home: torch.device, wide: torch.dtype) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(torch.cat([p.to(home) for p in parts]), dtype=wide)
    return total
