"""The combination of SAM: the gradient at w + e."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steppe import papers
from steppe.papers import Paper
from steppe.rules.protocols import Point


@dataclass(frozen=True)
class Perturbed:
    """Go down with the gradient at w + e, as SAM does: g_s; at a step that did not climb, g.

    >>> import torch
    >>> at = Point([torch.zeros(1)], [torch.tensor([1.0])], rho=[0.05], base_state=[{}], step=0)
    >>> Perturbed()(at, [torch.tensor([2.0])]), Perturbed()(at, None)
    ([tensor([2.])], [tensor([1.])])

    Source: Foret et al., arXiv 2010.01412.
    """

    paper: ClassVar[Paper] = papers.SAM
    needs_unperturbed_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return point.gradients if perturbed is None else perturbed
