"""LookSAM: perturb at every k-th step, reuse the direction in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

from torch import Tensor
from torch.optim import Optimizer

from steppe.methods._card import COPY_AND_G, NO_CODE, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import CVPR, Paper
from steppe.rules import Point
from steppe.rules.ops import add_scaled_, check_weight, copy_, norm, orthogonal, reciprocal, where_finite
from steppe.rules.periodic import Periodic
from steppe.sam import SAM

LOOKSAM_PAPER = Paper(
    "liu2022looksam",
    ("Yong Liu", "Siqi Mai", "Xiangning Chen", "Cho-Jui Hsieh", "Yang You"),
    "Towards Efficient and Scalable Sharpness-Aware Minimization",
    "2203.02714",
    2022,
    CVPR,
)


@dataclass(frozen=True)
class GradientReuse:
    """Remember where g_s points away from g, and go there between climbs too (LookSAM): g + alpha |g|/|g_v| g_v.

    At a climb, go down with g_s and remember g_v = g_s - (g.g_s / |g|^2) g, its part orthogonal to g; norms and
    products run over all parameters together. Before the first climb, and where g_v = 0, go down with g. Combine it
    with :class:`~steppe.Periodic`: ``Periodic(5)`` costs 1.2 passes a step. It keeps one more copy of the gradient.

    A g_v that is not finite is not remembered: the one before it stays. No code of the authors was found to compare
    with. The implementation in pytorch_optimizer projects and scales each tensor on its own.

    >>> w, g = torch.zeros(2), torch.tensor([3.0, 0.0])
    >>> climb = Point([w], [g], rho=[0.05], base_state=[{}], step=0)
    >>> between = Point([w], [g], rho=[0.05], base_state=[{}], step=1, memory=climb.memory)
    >>> GradientReuse(alpha=0.5)(climb, [torch.tensor([3.0, 0.1])]), GradientReuse(alpha=0.5)(between, None)
    ([tensor([3.0000, 0.1000])], [tensor([3.0000, 1.5000])])

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """

    paper: ClassVar[Paper] = LOOKSAM_PAPER
    needs_unperturbed_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    alpha: float = 0.7
    """alpha, the length of the remembered part in units of |g|; 0.7 is usual."""

    def __post_init__(self) -> None:
        check_weight("alpha", self.alpha, "it is the length of the remembered part in units of |g|")

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if perturbed is not None:
            self._remember(point, orthogonal(perturbed, point.gradients))
            return perturbed
        down = [g.clone() for g in point.gradients]
        reused = [(d, own["g_v"]) for d, own in zip(down, point.memory_of(self), strict=True) if "g_v" in own]
        g_v = [v for _, v in reused]
        length = self.alpha * point.gradient_norm
        add_scaled_([d for d, _ in reused], length * reciprocal(norm(g_v)).to(length.device), g_v)
        return down

    def _remember(self, point: Point, g_v: Sequence[Tensor]) -> None:
        memory = point.memory_of(self)
        trusted = where_finite(norm(g_v), g_v, [own.get("g_v", 0.0) for own in memory])
        # in place: a CUDA graph knows tensors, and no dictionaries
        copy_([own.setdefault("g_v", v) for own, v in zip(memory, trusted, strict=True)], trusted)


def looksam(
    base_optimizer: Optimizer, rho: Rho = 0.05, *, k: int = 5, alpha: float = 0.7, **options: Unpack[Options]
) -> SAM:
    """LookSAM: climb at every k-th step, and reuse between where g_s pointed away from g. 1 + 1/k passes a step.

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """
    return SAM(base_optimizer, rho, **options, combination=GradientReuse(alpha), cadence=Periodic(k))


CARD = MethodCard(
    name="looksam",
    function=looksam,
    label="LookSAM",
    about="So most steps cost one pass, and still go where the climb pointed.",
    equation="step 0, k, 2k, ...:  g_v = g_s - (g.g_s / |g|^2) g,   w <- Base(w, g_s)\n"
    "between:             w <- Base(w, g + alpha |g| / |g_v| g_v)",
    cost="1 + 1/k",
    passes=lambda k: 1 + 1 / k,
    memory=f"{COPY_AND_G}; from step to step, g_v",
    when="Where a second pass at every step is too dear.",
    when_not="Where memory for two more gradients is short: `late_sam` and `random_sam` keep none.",
    usual={"rho": "0.1 in a third-party implementation", "k": "5", "alpha": "0.7"},
    checked=f"{NO_CODE} The third-party https://github.com/Leminhbinh0209/LookSAM (global norms, our formula) "
    "agrees. That of pytorch_optimizer projects a tensor at a time, and pays 2.0 passes a step at k = 5 "
    "([conformance](../conformance.md), C8b).",
    caveats=("A g_v that is not finite is not remembered: the one before it stays.",),
    comparison=Comparison(summary="climbs at every k-th step and reuses that between, at SAM's rho", capturable=True),
)
