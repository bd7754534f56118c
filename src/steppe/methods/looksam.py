"""LookSAM: perturb once per interval, and reuse the direction in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_nonnegative
from steppe._tensors.in_place import pieces
from steppe._tensors.reductions import projection
from steppe.methods._card import COPY_AND_G, NO_CODE, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import CVPR, Paper
from steppe.rules import Point
from steppe.rules.ops import add_scaled_, copy_, norm, reciprocal, where_finite
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
    """Reuse the part of g_s that differs from g at the steps in between (LookSAM): g + alpha |g|/|g_v| g_v.

    At a perturbed step, the update gradient is g_s, and g_v = g_s - (g.g_s / |g|^2) g, its part orthogonal to g, is
    stored; norms and products run over all parameters together. Before the first perturbed step, and where g_v = 0,
    the update gradient is g. Use it with :class:`~steppe.Periodic`: ``Periodic(5)`` costs 1.2 passes per step. The
    memory is one more copy of the gradient.

    A g_v that is not finite is not stored: the previous one is kept. No code by the authors was found to compare
    with. The implementation in pytorch_optimizer projects and scales each tensor by itself.

    Example:
        >>> import torch
        >>> w, g = torch.zeros(2), torch.tensor([3.0, 0.0])
        >>> first = Point([w], [g], rho=[0.05], base_state=[{}], step=0)
        >>> GradientReuse(alpha=0.5)(first, [torch.tensor([3.0, 0.1])])
        [tensor([3.0000, 0.1000])]
        >>> second = Point([w], [g], rho=[0.05], base_state=[{}], step=1, memory=first.memory)
        >>> GradientReuse(alpha=0.5)(second, None)
        [tensor([3.0000, 1.5000])]

    References:
        Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """

    paper: ClassVar[Paper] = LOOKSAM_PAPER
    needs_unperturbed_gradient: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    alpha: float = 0.7
    """alpha, the length of the reused part in units of |g|; usually 0.7."""

    def __post_init__(self) -> None:
        check_nonnegative("alpha", self.alpha, "the length of the reused part in units of |g|")

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if perturbed is not None:
            self._store(point, perturbed)
            return perturbed
        update = [g.clone() for g in point.gradients]
        reused = [(u, own["g_v"]) for u, own in zip(update, point.memory_of(self), strict=True) if "g_v" in own]
        g_v = [v for _, v in reused]
        length = self.alpha * point.gradient_norm
        add_scaled_([u for u, _ in reused], length * reciprocal(norm(g_v)).to(length.device), g_v)
        return update

    def _store(self, point: Point, g_s: Sequence[Tensor]) -> None:
        """Store g_v = g_s - c g, piece by piece: whole lists of temporary tensors would be the peak of the step."""
        c = projection(g_s, point.gradients)
        trusted = norm(g_s) + c  # not finite if an entry of g_s or g is not
        memory = point.memory_of(self)
        for own, w, g in zip(memory, point.weights, g_s, strict=True):
            if "g_v" not in own:
                own["g_v"] = torch.zeros_like(w, dtype=g.dtype)
        # in place: a CUDA graph replays operations on these tensors, and would not see a new one in the dictionary
        for stored, xs, ys in pieces([own["g_v"] for own in memory], g_s, point.gradients):
            g_v = [x.clone() for x in xs]
            add_scaled_(g_v, -c, ys)
            copy_(stored, where_finite(trusted, g_v, stored))


def looksam(
    base_optimizer: Base, rho: Rho = 0.05, *, interval: int = 5, alpha: float = 0.7, **options: Unpack[Options]
) -> SAM:
    """LookSAM: SAM once per interval, and its direction reused in between. 1 + 1/interval passes per step.

    Between the perturbed steps w <- Base(w, g + alpha |g| / |g_v| g_v), where g_v is the last part of g_s orthogonal
    to g.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; 0.1 in a third-party implementation.
        interval: k, the number of steps from one perturbed step to the next; usually 5.
        alpha: alpha, the length of the reused part in units of |g|; usually 0.7.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> import torch
        >>> looksam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).cadence
        Periodic(interval=5)

    References:
        Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714.
    """
    return SAM(base_optimizer, rho, **options, combination=GradientReuse(alpha), cadence=Periodic(interval))


CARD = MethodCard(
    name="looksam",
    function=looksam,
    label="LookSAM",
    paper=LOOKSAM_PAPER,
    summary="Perturb once per interval, and reuse in between the part of g_s orthogonal to g. Most steps cost one "
    "pass, and still follow the direction of the last perturbation.",
    equation="step 0, k, 2k, ...:  g_v = g_s - (g.g_s / |g|^2) g,   w <- Base(w, g_s)           k = interval\n"
    "in between:          w <- Base(w, g + alpha |g| / |g_v| g_v)",
    cost="1 + 1/interval",
    passes=lambda interval: 1 + 1 / interval,
    memory=f"{COPY_AND_G}; from step to step, g_v",
    when="When a second pass at every step is too expensive.",
    when_not="When there is no memory for two more gradients: `late_sam` and `random_sam` keep none.",
    usual={"rho": "0.1 in a third-party implementation", "interval": "5", "alpha": "0.7"},
    verified="other code, same steps",
    checked=f"{NO_CODE} The third-party https://github.com/Leminhbinh0209/LookSAM has global norms and our "
    "formula, but as published it stores parameters in place of the gradients of the first step. Another port agrees "
    "(2e-11). That of pytorch_optimizer projects one tensor at a time, and makes 2.0 passes per step at k = 5 "
    "([conformance](../conformance.md), C8b).",
    caveats=(
        "A g_v that is not finite is not stored: the previous one is kept.",
        "A perturbation for each micro-batch (`closures.micro_batches`) is an error: they would exchange one g_v.",
    ),
    other_measurements=(
        "[Cosine schedule and momentum](../evidence/annealed.md), ten seeds: 3.6 points worse than SGD.",
        "[The same with 40 % wrong labels](../evidence/price.md), at rho 0.025 and held-out, two runs: 78.6 % with an "
        "interval of 4 and 79.5 with 3, where SAM has 80.6 (SGD, 20 runs on the test data: 56.1).",
    ),
    comparison=Comparison(
        summary="perturbs once per interval and reuses the direction in between, at SAM's rho", capturable=True
    ),
)
