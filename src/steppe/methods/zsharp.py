"""ZSharp: perturb along the gradient's outlying entries."""

import math
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import norm, reciprocal, shard_like, whole
from steppe.sam import SAM

ZSHARP_PAPER = Paper(
    "yun2025zsharp",
    ("Vincent-Daniel Yun",),
    "Sharpness-Aware Minimization with {Z}-Score Gradient Filtering",
    "2505.02369",
    2025,
)


@dataclass(frozen=True)
class ZScore:
    """Climb along the gradient's outstanding entries (ZSharp): e = rho g~ / |g~|, g~ = g where |z| > q, else 0.

    In each tensor z = (g - mean(g)) / std(g), and q is the percentile of |z|. Tensors of fewer than two dimensions
    (biases, norm layers) keep all of g, and so does a tensor of which nothing but zeros would be left. A zero gradient
    gives e = 0.

    Which tensors are filtered, and by a percentile of their own, is as in the authors' code. That then climbs by rho
    in each filtered tensor separately; here, as in the paper's formula, rho is the length of the whole e.

    >>> w, g = torch.zeros(2, 2), torch.tensor([[3.0, 0.1], [-0.1, 0.2]])
    >>> direction, scale = ZScore(percentile=0.5)(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
    >>> direction[0]
    tensor([[ 3.0000,  0.0000],
            [-0.1000,  0.0000]])

    Source: Yun, Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks, arXiv 2505.02369.
    """

    paper: ClassVar[Paper] = ZSHARP_PAPER
    scale_free: ClassVar[bool] = True

    percentile: float = 0.95
    """Q_p, as a fraction: 0.95, the authors' value, keeps the top 5 % of each tensor."""

    def __post_init__(self) -> None:
        if not 0 <= self.percentile < 1:
            raise ValueError(
                f"percentile must be at least 0 and less than 1, got {self.percentile}: it is the fraction of each "
                "tensor that does not climb, 0.95 for the top 5 %"
            )

    def __call__(self, point: Point) -> ScaledDirection:
        filtered = [shard_like(self._filter(whole(g)), g) if g.dim() > 1 and g.numel() else g for g in point.gradients]
        return ScaledDirection(filtered, reciprocal(norm(filtered)))

    def _filter(self, g: Tensor) -> Tensor:
        # |z| > q holds for the same entries without std, and with the next |z| below q in place of q: one selection.
        # torch.quantile sorts, and takes no more than 16 M entries; kthvalue is slow on CUDA (pytorch issue 75599).
        z = (g - g.mean()).abs().flatten()
        below = math.floor(self.percentile * (z.numel() - 1))
        q = z.topk(z.numel() - below, sorted=False).values.min()
        left = torch.where(z.view(g.shape) > q, g, 0.0)
        return torch.where(left.any(), left, g)


def zsharp(base_optimizer: Optimizer, rho: Rho = 0.05, *, percentile: float = 0.95, **options: Unpack[Options]) -> SAM:
    """ZSharp: climb along the gradient's outstanding entries, by z-score in each tensor. Two passes a step.

    Source: Yun, Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks, arXiv 2505.02369.
    """
    return SAM(base_optimizer, rho, **options, perturbation=ZScore(percentile))


CARD = MethodCard(
    name="zsharp",
    function=zsharp,
    label="ZSharp",
    about="By default the top 5 % of each tensor climb.",
    equation="z = (g - mean(g)) / std(g)   in each tensor\n"
    "h = g where |z| > q, else 0;   q = the percentile of |z|\n"
    "e = rho h / |h|",
    cost="2",
    passes=2,
    memory=COPY,
    when="To climb along few, outstanding coordinates.",
    when_not="To save time: the passes are whole, and each tensor is ranked at every climb.",
    usual={"rho": "unverified", "percentile": "0.95"},
    checked="The official code, https://github.com/YUNBLAK/Sharpness-Aware-Minimization-with-Z-Score-Gradient-"
    "Filtering, was read: the same filter, but each filtered tensor climbs by a rho of its own; here, as in the "
    "paper's formula, rho is the length of the whole e.",
    caveats=("Biases and norm layers (fewer than two dimensions) keep all of g.",),
    comparison=Comparison(summary="climbs along the gradient's outstanding entries, at SAM's rho", capturable=True),
)
