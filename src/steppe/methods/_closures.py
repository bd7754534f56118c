"""Shared by the closures: the backward of a loss that may be scaled, and checks of a batch."""

from collections.abc import Callable, Sequence

from torch import Tensor

from steppe.sam import SAM

Loss = Callable[..., Tensor]


def backward(optimizer: SAM, value: Tensor) -> None:
    """The backward of a loss, multiplied by the loss scale if the optimizer knows of one."""
    loss = value if optimizer.scaler is None else optimizer.scaler.scale(value)
    loss.backward()  # type: ignore[no-untyped-call]


def is_last(optimizer: SAM) -> bool:
    sam_pass = optimizer.current_pass
    if sam_pass is None:
        return True
    if sam_pass.is_last is None:
        raise RuntimeError(
            f"{optimizer.cadence} decides by the gradient at w whether to climb, so nobody knows yet whether this pass "
            "will go down, and a part of the batch must not: take a cadence that goes by the step's number"
        )
    return sam_pass.is_last


def check_share(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be more than 0 and at most 1, got {value}: it is a share of the samples")
    return value


def count_samples(batch: Sequence[Tensor]) -> int:
    lengths = {len(t) for t in batch}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"the tensors of a batch hold one sample in each row, and these have {sorted(lengths)} rows: give at least "
            "one tensor, all of the same length, and at least one sample"
        )
    return lengths.pop()
