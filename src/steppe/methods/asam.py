"""ASAM: perturb in proportion to the weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from steppe._checks import check_nonnegative
from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho, repeated_on_subset
from steppe.papers import ICML, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import foreach, norm, reciprocal
from steppe.sam import SAM

ASAM_PAPER = Paper(
    "kwon2021asam",
    ("Jungmin Kwon", "Jeongseop Kim", "Hyunseo Park", "In Kwon Choi"),
    "{ASAM}: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
    "2102.11600",
    2021,
    ICML,
)


@dataclass(frozen=True)
class Adaptive:
    """Perturb in proportion to the weights (ASAM): e = rho T^2 g / |T g|, T = diag(|w| + eta).

    The neighborhood |T^-1 e| <= rho does not change when a network is rescaled without changing its function, so
    rho is larger than SAM's: the paper uses 0.5 to 2. The authors' code uses T = 1 for parameters that are not called
    "weight"; here, as in the paper's formula, T is the same for all.

    Example:
        >>> w, g = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> direction, scale = Adaptive(eta=0.0)(Point([w], [g], rho=[0.5], base_state=[{}], step=0))
        >>> 0.5 * scale * direction[0]
        tensor([1., 0.])

    References:
        Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks,
        arXiv 2102.11600.
    """

    paper: ClassVar[Paper] = ASAM_PAPER
    scale_free: ClassVar[bool] = True

    eta: float = 0.01
    """eta, which lets weights at zero be perturbed; the paper's value."""

    def __post_init__(self) -> None:
        check_nonnegative("eta", self.eta, "added to |w| in T = |w| + eta")

    def __call__(self, point: Point) -> ScaledDirection:
        T = foreach(torch._foreach_abs, point.weights)
        foreach(torch._foreach_add_, T, scalar=self.eta)
        Tg = foreach(torch._foreach_mul, T, point.gradients)
        foreach(torch._foreach_mul_, T, Tg)  # T^2 g, in the memory of T
        return ScaledDirection(T, reciprocal(norm(Tg)))


def asam(
    base_optimizer: Base,
    rho: Rho = 0.5,
    *,
    eta: float = 0.01,
    ascent_steps: int = 1,
    only: Iterable[Tensor] | None = None,
    **options: Unpack[Options],
) -> SAM:
    """ASAM: SAM with a perturbation in proportion to the weights. 1 + ascent_steps passes per step.

    e = rho T^2 g / |T g|,   T = diag(|w| + eta).

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius in units of the weights; usually 0.5 to 2.
        eta: eta, which lets weights at zero be perturbed; usually 0.01.
        ascent_steps: K, the number of ascent steps, each of length rho / K; usually 1.
        only: The parameters to perturb; by default all.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> asam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        Adaptive(eta=0.01)

    References:
        Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks,
        arXiv 2102.11600.
    """
    return SAM(base_optimizer, rho, **options, perturbation=repeated_on_subset(Adaptive(eta), ascent_steps, only))


CARD = MethodCard(
    name="asam",
    function=asam,
    label="ASAM",
    paper=ASAM_PAPER,
    summary="Perturb the weights in proportion to their size. The neighborhood does not change when a network is "
    "rescaled without changing its function.",
    equation="e = rho T^2 g / |T g|,   T = diag(|w| + eta)",
    cost="1 + ascent_steps",
    passes=lambda ascent_steps: 1 + ascent_steps,
    memory=COPY,
    when="When layers can be rescaled without changing the function, as before a normalization layer.",
    when_not="With SAM's rho: ASAM's rho is relative to the weights, and about ten times larger.",
    usual={
        "rho": "0.5 to 2",
        "eta": "0.01; 0 in the example of the official code",
        "ascent_steps": "1",
        "only": "all parameters",
    },
    verified="official code, same steps",
    checked="https://github.com/SamsungLabs/ASAM: weights agree (2e-16). Theirs uses T = 1 for parameters that are "
    'not called "weight"; here, as in the paper\'s formula, T is the same for all.',
    caveats=("A weight at zero is perturbed in proportion to eta only, and with eta = 0 not at all.",),
    other_measurements=(
        "[Cosine schedule and momentum](../evidence/family.md), ten seeds: 0.4 points better than SGD, not "
        "distinguishable from averaged weights; calibration error 5.3 smaller. With 40 % wrong labels 24.9 "
        "better, as SAM, and better under corruptions by 23.0, where SAM is by 19.6.",
    ),
    comparison=Comparison(
        summary=f"perturbs in proportion to the weights, at 10 x rho ({USUAL_RATIO})",
        rho_factor=10.0,
        capturable=True,
    ),
)
