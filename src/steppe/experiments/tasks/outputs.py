"""The outputs and targets of a split, put together from those of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.samples import Samples
from steppe.flatness._batches import list_tensors, map_tensors


def spread_out(samples: Samples, batch_size: int) -> list[Tensor]:
    """Return the positions of the batches of an evaluation; each is spread over the split, so the halves are alike."""
    n = len(samples)
    if samples.sizes is not None:
        return list(torch.split(torch.arange(n), samples.sizes))
    number = max(min(2, n), -(-n // batch_size))
    return [torch.arange(i, n, number) for i in range(number)]


def in_order(parts: list[tuple[Any, Any]], positions: list[Tensor]) -> tuple[Any, Any]:
    """Concatenate the outputs and targets of batches, in the order of the samples.

    They stay in that of the batches where their rows are not the samples, as those of the tokens of texts.
    """
    whole = concatenated(parts)
    sizes = zip(parts, map(len, positions), strict=True)
    by_sample = all(t.dim() > 0 and len(t) == size for part, size in sizes for t in list_tensors(part))
    if len(parts) == 1 or not by_sample:
        return whole
    order = torch.cat(positions).argsort()
    ordered: tuple[Any, Any] = map_tensors(whole, lambda tensor: tensor[order])
    return ordered


def concatenated(parts: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Concatenate outputs and targets, trees of tensors, along their first dimension."""
    joined = iter([_joined(row) for row in zip(*map(list_tensors, parts), strict=True)])
    whole: tuple[Any, Any] = map_tensors(parts[0], lambda _: next(joined))
    return whole


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    rows = [t.reshape(1) if t.dim() == 0 else t for t in tensors]
    shapes = {tuple(row.shape[1:]) for row in rows}
    if len(shapes) > 1:
        named = ", ".join(f"(n, {str(shape)[1:]}" for shape in sorted(shapes)[:3])
        raise ExperimentError(
            "a metric is computed from the outputs and targets of all samples together, and those of batches differ in "
            f"shape: {named}{', ...' if len(shapes) > 3 else ''}. Pad all batches to one length, in the data; or "
            "return the tokens in one dimension from predict=, (logits[mask], targets[mask])"
        )
    return torch.cat(rows)
