"""What is estimated, with how well."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` independent draws, with its standard error; NaN for a single draw, 0 for what is exact."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float] | Tensor) -> "Estimate":
        """Estimate from draws of equal weight.

        >>> Estimate.of([1.0, 2.0, 3.0])
        Estimate(value=2.0, error=0.5773502691896258, n=3)
        """
        x = torch.as_tensor(samples, dtype=torch.float64)
        error = float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        return cls(float(x.mean()), error, len(x))
