"""The perturbation of SAM: along the gradient, of length rho."""

from dataclasses import dataclass
from typing import ClassVar

from steppe import papers
from steppe.papers import Paper
from steppe.rules.ops import reciprocal
from steppe.rules.protocols import Perturbation, Point, ScaledDirection


@dataclass(frozen=True)
class L2(Perturbation):  # a subclass, since LightningCLI turns default values that are pure dataclasses into dicts
    """Perturb along the gradient (SAM): e = rho g / |g|.

    The norm runs over all perturbed parameters together. A zero gradient gives e = 0.

    Example:
        >>> import torch
        >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
        >>> direction, scale = L2()(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
        >>> 0.05 * scale * direction[0]
        tensor([0.0300, 0.0400])

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    paper: ClassVar[Paper] = papers.SAM
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point) -> ScaledDirection:
        return ScaledDirection(point.gradients, reciprocal(point.gradient_norm))
