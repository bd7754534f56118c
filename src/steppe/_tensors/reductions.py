"""Lists of tensors as one long vector: norm, dot product, finiteness."""

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from steppe._tensors.dtensor import all_plain, by_placement, is_sharded, local, reduced, sum_over_ranks

_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")
# Squares in one float32 sum: a CPU's sum of 50 M of them is off by 3 %, and one of 256 is right to 2e-7.
_PIECE_SIZE = 256
# Outside this range of norms, squares of float32 entries overflow or underflow.
_SAFE = (1e-15, 1e15)
# Tensors of so few entries are concatenated: a copy of them takes less time than one operation for each.
_CONCATENATED = 1 << 11
# Entries that are multiplied in the wide dtype at once: few kernels, and little memory beside the tensors.
_CHUNK = 1 << 20


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors as one vector, |x| = sqrt(sum_i |x_i|^2).

    The relative error is below 1e-6 at 100 M elements. The result is finite whenever the true norm is, for half
    precision and for huge and tiny entries. On an accelerator, nothing is read back to the host.

    Args:
        tensors: Real tensors of any shapes, floating dtypes and devices. A sharded one (``DTensor``) counts as the full
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


def _piece_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return norms of short pieces, each accurate in its own dtype; only their few squares need a wide sum."""
    norms = []
    for flat in _flat_parts(tensors):
        size = flat.numel()
        cut = size - size % _PIECE_SIZE
        dtype = torch.float32 if flat.dtype.itemsize <= 2 else None
        if cut:
            norms.append(torch.linalg.vector_norm(flat[:cut].view(-1, _PIECE_SIZE), dim=1, dtype=dtype))
        if cut < size or not size:
            norms.append(torch.linalg.vector_norm(flat[cut:], dtype=dtype).view(1))
    return norms


def _flat_parts(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the entries of all tensors in flat ones: of a large tensor its own, small ones of one dtype together."""
    sizes = list(map(Tensor.numel, tensors))
    if max(sizes, default=0) > _CONCATENATED:
        yield from (_flat(t) for t, size in zip(tensors, sizes, strict=True) if size > _CONCATENATED)
        tensors = [t for t, size in zip(tensors, sizes, strict=True) if size <= _CONCATENATED]
    dtypes = set(map(_dtype, tensors))
    for dtype in dtypes:
        same = list(tensors) if len(dtypes) == 1 else [t for t in tensors if t.dtype is dtype]
        yield torch._C._nn.flatten_dense_tensors(same)


def _norm_of_norms(norms: Sequence[Tensor], device: torch.device, wide: torch.dtype) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(torch.cat([n.to(device) for n in norms]), dtype=wide)
    return total


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return a 0-dim tensor that is True if no entry is NaN or infinite; on an accelerator if any of the tensors is.

    >>> all_finite([torch.ones(2), torch.tensor(float("inf"))])
    tensor(False)
    """
    # A sum keeps NaN and inf, in two thirds of the time of a norm. If it is not finite, it may have overflowed.
    on_cpu = all_plain(tensors) and all(map(_is_cpu, tensors))
    if on_cpu and math.isfinite(sum(float(flat.sum()) for flat in _flat_parts(tensors))):
        return torch.tensor(True)
    return norm(tensors).isfinite()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors as two vectors, x.y = sum_i x_i y_i.

    Products and sums are computed in float64 (float32 where the device has none), so that nothing overflows. On an
    accelerator, nothing is read back to the host.

    Args:
        xs: Real tensors of any shapes, floating dtypes and devices; a sharded one counts as the full tensor.
        ys: As many, of the same shapes, on the same devices.

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


def projection(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Return the coefficient of the projection of x on y, each list as one vector: x.y / |y|^2, and 0 where y is 0.

    >>> projection([torch.tensor([3.0, 4.0])], [torch.tensor([2.0, 0.0])])
    tensor(1.5000, dtype=torch.float64)
    """
    square = dot(ys, ys)
    return torch.where(square == 0, 0.0, dot(xs, ys) / square)


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
