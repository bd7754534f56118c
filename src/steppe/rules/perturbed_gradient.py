"""The combination of SAM: the gradient at w + e."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steppe import papers
from steppe.papers import Paper
from steppe.rules.protocols import Combination, Point


@dataclass(frozen=True)
class PerturbedGradient(Combination):  # a subclass for the same reason as L2
    """Update with the gradient at w + e (SAM): g_s; at a step without perturbation, g.

    Example:
        >>> import torch
        >>> point = Point([torch.zeros(1)], [torch.tensor([1.0])], rho=[0.05], base_state=[{}], step=0)
        >>> PerturbedGradient()(point, [torch.tensor([2.0])]), PerturbedGradient()(point, None)
        ([tensor([2.])], [tensor([1.])])

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    paper: ClassVar[Paper] = papers.SAM
    needs_unperturbed_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return point.gradients if perturbed is None else perturbed
