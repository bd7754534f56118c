"""Iterate over the same batches many times, and check that each pass yields the same samples."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from steppe._checks import check_count
from steppe._tensors.in_place import as_real
from steppe._tensors.reductions import accumulator


class Batches:
    """Batches with their sizes; a tuple or dictionary of tensors is split into batches of ``batch_size``."""

    def __init__(self, data: Any, batch_size: int, size: Callable[[Any], float] | None = None) -> None:
        check_count("batch_size", batch_size, "the number of samples of a batch")
        self.size = num_samples if size is None else _as_number(size)
        if is_tensors(data):
            lengths = [len(t) for t in list_tensors(data)]
            if len(set(lengths)) > 1:
                listed = ", ".join(str(length) for length in lengths)
                raise ValueError(f"data: tensors of {listed} entries, but inputs and targets must have the same length")
            self._batches: Any = _TensorBatches(data, batch_size)
        elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            raise TypeError(
                f"data is {type(data).__name__}, a data set of single samples, each of which would be taken for a "
                "batch: wrap it in a DataLoader, with shuffle=False and no augmentation"
            )
        elif isinstance(data, Iterator):
            raise TypeError(
                f"data is {type(data).__name__}, an iterator that can be consumed only once, but a measurement needs "
                "many passes: pass a list of batches, a DataLoader, or a pair of tensors"
            )
        else:
            self._batches = data

    @property
    def number(self) -> int | None:
        """Number of batches; None if it is unknown before iterating."""
        try:
            return len(self._batches)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        for batch in self._batches:
            yield batch, self.size(batch)

    def single(self, batch: Any) -> "Batches":
        """Return batches that consist of this one, with the same definition of size."""
        return Batches([batch], 1, self.size)


def _as_number(size: Callable[[Any], float]) -> Callable[[Any], float]:
    """Return a function batch -> size whose results are numbers, also of one that returns tensors."""

    def number(batch: Any) -> float:
        found = float(size(batch))
        if not 0 <= found < math.inf:
            raise ValueError(
                f"size= returned {found} for a batch: it must be the number of terms that the loss averages over, or "
                "the sum of their weights, so finite and not negative"
            )
        return whole_if_possible(found)

    return number


def whole_if_possible(number: float) -> float:
    """Return a whole number as an int, and any other as it is.

    >>> whole_if_possible(3.0), whole_if_possible(2.5)
    (3, 2.5)
    """
    return int(number) if number.is_integer() else number


class _TensorBatches:
    """Split a tuple or dictionary of tensors of equal length into views of ``batch_size`` rows.

    A single last row joins the batch before it: BatchNorm has no statistics of one sample.
    """

    def __init__(self, tensors: tuple[Tensor, ...] | Mapping[str, Tensor], batch_size: int) -> None:
        self._tensors, self._batch_size = tensors, batch_size

    def __len__(self) -> int:
        whole, rest = divmod(num_samples(self._tensors), self._batch_size)
        return whole + (rest > 1 or (rest == 1 and whole == 0))

    def __iter__(self) -> Iterator[Any]:
        begins = [i * self._batch_size for i in range(len(self))]
        for begin, end in pairwise([*begins, num_samples(self._tensors)]):
            yield rows(self._tensors, begin, end)


class Fingerprint:
    """A checksum of the samples of one pass: their number, and a weighted sum over all entries.

    It does not depend on the order of the samples. Augmentation or another selection of samples changes it.

    Args:
        by_batch: Compare also which samples are in a batch together.
    """

    def __init__(self, *, by_batch: bool = False) -> None:
        self.samples: float = 0
        self._by_batch = by_batch
        self._sums: list[Tensor] = []  # of each batch

    def add(self, batch: Any, size: float) -> None:
        """Add a batch."""
        self.samples += size
        sums = [_weighted_sums(t.detach()) for t in list_tensors(batch) if t.numel() > 0]
        self._sums += [torch.stack(sums).sum(0)] if sums else []

    def compare(self, previous: "Fingerprint") -> None:
        """Raise ValueError if this pass had other samples than the previous one, or had them in other batches."""
        (now, _), (then, scales) = self._table(), previous._table()
        allowed = 1e-9 * float(scales.sum())
        # sums of weights differ by rounding if the batches are others
        whole = isinstance(self.samples, int) and isinstance(previous.samples, int)
        same_number = math.isclose(self.samples, previous.samples, rel_tol=0.0 if whole else 1e-6)
        if not same_number or abs(float(now.sum() - then.sum())) > allowed:
            raise ValueError(
                f"data: two passes had different samples ({previous.samples} and {self.samples} of them), so their "
                "losses cannot be compared. Switch augmentation off, and draw the samples once"
            )
        if self._by_batch and (len(now) != len(then) or bool(((now - then).abs() > allowed).any())):
            raise ValueError(
                "data: two passes had the same samples in other batches, but with batch_norm='train' the loss depends "
                "on which samples share a batch, so the losses cannot be compared. Pass a list of batches, or a "
                "DataLoader with shuffle=False, or one without generator=, which is shuffled alike in all passes"
            )

    def _table(self) -> tuple[Tensor, Tensor]:
        """Return the sums of each batch in ascending order, whatever that of the batches, with their scales."""
        sums = torch.stack([s.cpu() for s in self._sums]) if self._sums else torch.zeros(0, 2)
        return sums[:, 0].sort().values, sums[:, 1]


def _weighted_sums(tensor: Tensor) -> Tensor:
    """Sum the entries and their absolute values, weighted by position in the sample; the second bounds rounding."""
    tensor = as_real(tensor)
    rows = tensor.reshape(len(tensor) if tensor.dim() else 1, -1).to(accumulator(tensor.device))
    ramp = torch.linspace(1.0, 2.0, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.stack([(rows @ ramp).sum(), (rows.abs() @ ramp).sum()])


def is_tensors(data: Any) -> bool:
    """Return True if all data are given as a tuple (inputs, targets) or a dictionary of tensors."""
    if isinstance(data, Mapping):
        return len(data) > 0 and all(isinstance(t, Tensor) and t.dim() > 0 for t in data.values())
    return isinstance(data, tuple) and len(data) > 1 and all(isinstance(t, Tensor) for t in data)


def split_rows(batch: Any, m: int) -> Iterator[Any]:
    """Split a batch into parts of m samples along the first dimension of its tensors; the last may be smaller."""
    length = num_samples(batch)  # rows of the tensors; `size` may count something else, such as tokens
    for begin in range(0, length, m):
        yield rows(batch, begin, begin + m)


def rows(batch: Any, begin: int, end: int) -> Any:
    """Return the samples from ``begin`` to ``end`` of a batch, along the first dimension of its tensors."""
    length = num_samples(batch)
    return map_tensors(batch, lambda t: t[begin:end] if t.dim() > 0 and len(t) == length else t)


def join_rows(a: Any, b: Any) -> Any:
    """Return two batches as one; None if their tensors do not fit, or have not one row for each sample."""
    others = list_tensors(b)
    pairs = list(zip(list_tensors(a), others, strict=False))
    if len(pairs) != len(others) or not all(
        s.dim() and s.shape[1:] == t.shape[1:] and len(s) == num_samples(a) and len(t) == num_samples(b)
        for s, t in pairs
    ):
        return None
    rest = iter(others)
    return map_tensors(a, lambda tensor: torch.cat([tensor, next(rest)]))


def num_samples(batch: Any) -> int:
    """Return the number of samples of a batch: the length of its first tensor.

    Raises:
        TypeError: The batch holds no tensor of at least one dimension.
    """
    for tensor in list_tensors(batch):
        if tensor.dim() > 0:
            return len(tensor)
    raise TypeError(
        f"a batch is {type(batch).__name__} and holds no tensor, so its number of samples is unknown: pass size=, "
        "(batch) -> number of samples"
    )


def num_targets(batch: Any) -> int:
    """Return the number of samples of a batch (*inputs, targets): the length of the targets, if they are a tensor.

    The first dimension of an input may be another: time (a recurrent layer without ``batch_first``), or the tokens of
    all samples in a row (``EmbeddingBag``, ``PackedSequence``).
    """
    targets = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return len(targets) if isinstance(targets, Tensor) and targets.dim() > 0 else num_samples(batch)


def lengths(batch: Any) -> list[int]:
    """Return the lengths of the tensors of a batch, each once, but those of 1, which broadcast."""
    return list(dict.fromkeys(len(t) for t in list_tensors(batch) if t.dim() > 0 and len(t) != 1))


def cast(tree: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
    """Move all tensors of a batch to a device, and those of floating point to a dtype."""

    def one(tensor: Tensor) -> Tensor:
        # autograd rejects tensors made in inference mode; a copy made outside of it is accepted
        tensor = tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    return map_tensors(tree, one)


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested dictionaries, lists and tuples.

    torch.utils._pytree would leave out mappings other than the built-in ones, such as transformers' BatchEncoding.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {k: map_tensors(v, function) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(v, function) for v in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(v, function) for v in tree)
    return tree


def list_tensors(tree: Any) -> list[Tensor]:
    """List all tensors of a nested structure, in order."""
    found: list[Tensor] = []
    map_tensors(tree, lambda t: (found.append(t), t)[1])  # type: ignore[func-returns-value]
    return found
