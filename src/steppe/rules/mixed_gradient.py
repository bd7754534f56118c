"""A mixture of the gradients at w and at w + e, as several methods use it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe._checks import check_nonnegative
from steppe.rules.ops import foreach
from steppe.rules.protocols import Point


@dataclass(frozen=True)
class MixedGradient:
    """Update with a mixture of both gradients: (1 - alpha) g + alpha g_s; at a step without perturbation, g.

    alpha = 1 is SAM, and 0 is the base optimizer.

    Example:
        >>> point = Point([torch.zeros(1)], [torch.tensor([1.0])], rho=[0.05], base_state=[{}], step=0)
        >>> MixedGradient(alpha=0.75)(point, [torch.tensor([2.0])])
        [tensor([1.7500])]
    """

    needs_unperturbed_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    alpha: float = 0.5
    """alpha, the share of g_s."""

    def __post_init__(self) -> None:
        check_nonnegative("alpha", self.alpha, "the share of g_s")

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if not perturbed:
            return point.gradients
        return foreach(torch._foreach_lerp, point.gradients, perturbed, weight=self.alpha)
