"""Data as batches that can be walked through again and again, and the proof that they stay the same."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from steppe._tensors.ops import accumulator, as_real


class Batches:
    """Batches of data, with their sizes; a pair of tensors (inputs, targets) is cut into batches of ``batch_size``."""

    def __init__(self, data: Any, batch_size: int, size: Callable[[Any], int] | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch needs at least one sample")
        self._size = size or length
        if isinstance(data, tuple) and len(data) > 1 and all(isinstance(t, Tensor) for t in data):
            if len({len(t) for t in data}) > 1:
                lengths = ", ".join(str(len(t)) for t in data)
                raise ValueError(f"data: tensors of {lengths} entries, and inputs and targets must be of one length")
            self._batches: Any = _Cut(data, batch_size)
        elif isinstance(data, Iterator):
            raise TypeError(
                f"data is {type(data).__name__}, which can be walked through once only, and a measure needs many "
                "passes: give a list of batches, a DataLoader, or a pair of tensors"
            )
        else:
            self._batches = data

    @property
    def number(self) -> int | None:
        """How many batches there are, where that is known before walking through them."""
        try:
            return len(self._batches)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for batch in self._batches:
            yield batch, self._size(batch)

    def only(self, batch: Any) -> "Batches":
        """Batches of which there is one."""
        return Batches([batch], 1, self._size)

    def parts(self, batch: Any, m: int) -> Iterator[Any]:
        """Cut a batch into parts of m samples, along the first dimension of its tensors; the last may be smaller."""
        whole = length(batch)  # of its tensors, whatever the loss is a mean over
        for begin in range(0, whole, m):

            def part(tensor: Tensor, begin: int = begin) -> Tensor:
                return tensor[begin : begin + m] if tensor.dim() > 0 and len(tensor) == whole else tensor

            yield _each(batch, part)


class _Cut:
    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int) -> None:
        self._tensors, self._batch_size = tensors, batch_size

    def __len__(self) -> int:
        return -(-len(self._tensors[0]) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(torch.split(t, self._batch_size) for t in self._tensors), strict=True)


class Fingerprint:
    """What tells one pass over the data from another: how many samples there were, and a sum over all their entries.

    Their order does not matter to it; augmentation, or another choice of samples, does.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._sums: list[Tensor] = []

    def add(self, batch: Any, size: int) -> None:
        """Count a batch."""
        self.samples += size
        self._sums += [_by_place(t.detach()) for t in _tensors(batch) if t.numel() > 0]

    def compare(self, before: "Fingerprint") -> None:
        """Raise ValueError where this pass saw other data than the one before."""
        (now, _), (then, scale) = self._sum(), before._sum()
        if self.samples != before.samples or abs(now - then) > 1e-9 * scale:
            raise ValueError(
                f"data: one pass saw {before.samples} samples, and the next one {self.samples}, or others. Losses are "
                "compared between passes here: switch augmentation off, and draw samples once and for all"
            )

    def _sum(self) -> list[float]:
        return torch.stack([s.cpu() for s in self._sums]).sum(0).tolist() if self._sums else [0.0, 0.0]


def _by_place(tensor: Tensor) -> Tensor:
    """A sum over the entries, each by its place in the sample, and how large a rounding error of it may be."""
    tensor = as_real(tensor)
    rows = tensor.reshape(len(tensor) if tensor.dim() else 1, -1).to(accumulator(tensor.device))
    ramp = torch.linspace(1.0, 2.0, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.stack([(rows @ ramp).sum(), (rows.abs() @ ramp).sum()])


def length(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor."""
    for tensor in _tensors(batch):
        if tensor.dim() > 0:
            return len(tensor)
    raise TypeError(
        f"a batch is {type(batch).__name__} and holds no tensor, so its number of samples is not known: say size=, "
        "(batch) -> samples"
    )


def cast(tree: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
    """Give the tensors in a batch another device, and those of floating point another dtype."""

    def one(tensor: Tensor) -> Tensor:
        # autograd refuses what was made in inference mode; a copy that is made outside of it will do
        tensor = tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    return _each(tree, one)


def _each(tree: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        return of(tree)
    if isinstance(tree, Mapping):
        return {k: _each(v, of) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_each(v, of) for v in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_each(v, of) for v in tree)
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in it, in order."""
    found: list[Tensor] = []
    _each(tree, lambda t: (found.append(t), t)[1])  # type: ignore[func-returns-value]
    return found
