"""ZSharp: perturb along the gradient's outlying entries."""

import math
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_below_one
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import full_tensor, norm, reciprocal, shard_like
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
    """Perturb along the gradient's outlying entries (ZSharp): e = rho h / |h|, h = g where |z| > q, else 0.

    In each tensor z = (g - mean(g)) / std(g), and q is the percentile of |z|. Tensors of fewer than two dimensions
    (biases, norm layers) keep all of g, and so does a tensor in which only zeros would be left. A zero gradient gives
    e = 0.

    The choice of the filtered tensors, each with its own percentile, is as in the authors' code. That code then
    perturbs each filtered tensor by rho separately; here, as in the paper's formula, rho is the length of the whole e.

    Example:
        >>> w, g = torch.zeros(2, 2), torch.tensor([[3.0, 0.1], [-0.1, 0.2]])
        >>> direction, scale = ZScore(percentile=0.5)(Point([w], [g], rho=[0.05], base_state=[{}], step=0))
        >>> direction[0]
        tensor([[ 3.0000,  0.0000],
                [-0.1000,  0.0000]])

    References:
        Yun, Sharpness-Aware Minimization with Z-Score Gradient Filtering, arXiv 2505.02369.
    """

    paper: ClassVar[Paper] = ZSHARP_PAPER
    scale_free: ClassVar[bool] = True

    percentile: float = 0.95
    """Q_p as a fraction: 0.95, the authors' value, keeps the top 5 % of each tensor."""

    def __post_init__(self) -> None:
        meaning = "the fraction of each tensor that is not perturbed, 0.95 for the top 5 %"
        check_below_one("percentile", self.percentile, meaning)

    def __call__(self, point: Point) -> ScaledDirection:
        h = [shard_like(self._filter(full_tensor(g)), g) if g.dim() > 1 and g.numel() else g for g in point.gradients]
        return ScaledDirection(h, reciprocal(norm(h)))

    def _filter(self, g: Tensor) -> Tensor:
        # |z| > q holds for the same entries without std, and with the next |z| below q in place of q: one selection.
        # torch.quantile sorts, and takes no more than 16 M entries; kthvalue is slow on CUDA (pytorch issue 75599).
        z = (g - g.mean()).abs().flatten()
        below = math.floor(self.percentile * (z.numel() - 1))
        q = z.topk(z.numel() - below, sorted=False).values.min()
        left = torch.where(z.view(g.shape) > q, g, 0.0)
        return torch.where(left.any(), left, g)


def zsharp(base_optimizer: Base, rho: Rho = 0.05, *, percentile: float = 0.95, **options: Unpack[Options]) -> SAM:
    """ZSharp: SAM along the gradient's outlying entries, by z-score in each tensor. Two passes per step.

    e = rho h / |h|, with h = g where |z| is above its percentile, else 0.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; the paper's values are unverified.
        percentile: Q_p as a fraction; usually 0.95, which keeps the top 5 % of each tensor.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: The percentile is out of range.

    Example:
        >>> zsharp(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        ZScore(percentile=0.95)

    References:
        Yun, Sharpness-Aware Minimization with Z-Score Gradient Filtering, arXiv 2505.02369.
    """
    return SAM(base_optimizer, rho, **options, perturbation=ZScore(percentile))


CARD = MethodCard(
    name="zsharp",
    function=zsharp,
    label="ZSharp",
    paper=ZSHARP_PAPER,
    summary="Perturb along the gradient's outlying entries, by z-score in each tensor. By default these are the top "
    "5 % of each tensor.",
    equation="z = (g - mean(g)) / std(g)   in each tensor\n"
    "h = g where |z| > q, else 0;   q = the percentile of |z|\n"
    "e = rho h / |h|",
    cost="2",
    passes=2,
    memory=COPY,
    when="To perturb along few, outlying coordinates.",
    when_not="To save time: both passes are full, and each perturbed step ranks the entries of each tensor.",
    usual={"rho": "0.05 (official code)", "percentile": "0.95"},
    verified="official code, read",
    checked="https://github.com/YUNBLAK/Sharpness-Aware-Minimization-with-Z-Score-Gradient-Filtering: the same "
    "filter, but each filtered tensor is perturbed by its own rho; here, as in the paper's formula, rho is the length "
    "of the whole e.",
    caveats=("Biases and norm layers (fewer than two dimensions) keep all of g.",),
    comparison=Comparison(summary="perturbs along the gradient's outlying entries, at SAM's rho", capturable=True),
)
