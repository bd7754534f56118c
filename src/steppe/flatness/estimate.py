"""A sample mean with its standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` independent samples with its standard error, s / sqrt(n)."""

    value: float
    """The mean."""
    error: float
    """Its standard error: NaN for a single sample, 0 for an exact value."""
    n: int
    """Number of samples."""

    @classmethod
    def of(cls, samples: Sequence[float] | Tensor) -> "Estimate":
        """Return the mean of equally weighted samples, (n,), with its standard error.

        Example:
            >>> Estimate.of([1.0, 2.0, 3.0])
            Estimate(value=2.0, error=0.5773502691896258, n=3)
        """
        x = torch.as_tensor(samples, dtype=torch.float64)
        error = float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        return cls(float(x.mean()), error, len(x))
