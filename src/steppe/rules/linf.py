"""The perturbation of SAM with p = inf: along the sign of the gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from steppe import papers
from steppe.papers import Paper
from steppe.rules.ops import foreach
from steppe.rules.protocols import Point, ScaledDirection


@dataclass(frozen=True)
class LInf:
    """Perturb every coordinate by the same length (SAM with p = inf): e = rho sign(g).

    |e|_inf = rho and |e|_2 = rho sqrt(n) for n weights, so rho must be far smaller than for :class:`L2`. A coordinate
    with a zero gradient is not perturbed. The paper tries p = inf on one network, where p = 2 is more accurate.

    Example:
        >>> w, g = torch.zeros(3), torch.tensor([3.0, -4.0, 0.0])
        >>> direction, scale = LInf()(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
        >>> 0.05 * scale * direction[0]
        tensor([ 0.0500, -0.0500,  0.0000])

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412,
        appendix C.5.
    """

    paper: ClassVar[Paper] = papers.SAM
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point) -> ScaledDirection:
        return ScaledDirection(foreach(torch._foreach_sign, point.gradients))
