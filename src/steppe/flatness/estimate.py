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


def weighted_standard_error(residuals: Tensor) -> float:
    """Return the standard error of a weighted mean of n samples; NaN for a single one.

    For weights that sum to 1 and are equal it is that of :meth:`Estimate.of`.

    Args:
        residuals: weights * (samples - mean), (n,); of a quotient of means a / b, to first order,
            weights * (a_i - quotient * b_i) / b.
    """
    n = len(residuals)
    return float((residuals.square().sum() * n / (n - 1)).sqrt()) if n > 1 else math.nan
