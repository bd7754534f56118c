"""Shared by the methods that build closures and losses: which pass runs, and checks of batches and losses."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from steppe._engine.stage import Stage
from steppe.sam import SAM

Loss = Callable[..., Tensor]


def is_last(optimizer: SAM) -> bool:
    """Return True if the gradient of the current pass is used for the update, so that it must cover the whole batch.

    Raises:
        RuntimeError: The cadence decides after this pass, from its gradient.
    """
    sam_pass = optimizer.current_pass
    if sam_pass is None:
        return True
    if sam_pass.is_last is None:
        raise RuntimeError(
            f"{optimizer.cadence} decides by the gradient at w whether to perturb, so during the first pass it is not "
            "known whether a part of the batch is enough: use a cadence that decides by the step's number"
        )
    return sam_pass.is_last


def is_between_classic_passes(optimizer: SAM) -> bool:
    """Return True between ``first_step()`` and ``second_step()``, which run no pass that a loss could depend on."""
    return optimizer._engine.stage is Stage.AFTER_FIRST_STEP


def one_number(value: Any) -> Tensor:
    """Return what a loss returned; ValueError unless it is a tensor of one number."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss returned {found}, and its derivative is needed: return the mean, one number")
    return value


def count_samples(batch: Sequence[Tensor]) -> int:
    """Return the number of samples in a batch.

    Raises:
        TypeError: The batch is no list or tuple of tensors.
        ValueError: The tensors have not all the same number of rows, at least one.
    """
    if not isinstance(batch, list | tuple) or not all(isinstance(t, Tensor) for t in batch):
        kinds = ", ".join(type(t).__name__ for t in batch) if isinstance(batch, list | tuple) else ""
        raise TypeError(
            f"the batch is a {type(batch).__name__}{f' of {kinds}' if kinds else ''}, and parts of its samples are "
            "needed: give a tuple of tensors with one sample in each row, which the loss gets as its arguments, "
            "(x, y) or (batch['x'], batch['y'])"
        )
    lengths = {len(t) for t in batch}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"the tensors of a batch hold one sample in each row, and these have {sorted(lengths)} rows: give at least "
            "one tensor, all of the same length, and at least one sample"
        )
    return lengths.pop()
