"""ASAM: perturb in proportion to the weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Options, Rho, modified
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
    """Climb in proportion to the weights (ASAM): e = rho T^2 g / |T g|, T = diag(|w| + eta).

    The neighborhood |T^-1 e| <= rho does not change when a network is rescaled without changing its function, so
    rho is larger than SAM's: the paper uses 0.5 to 2. The authors' code takes T = 1 for parameters that are not called
    "weight"; here, as in the paper's formula, T is the same for all.

    >>> w, g = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    >>> direction, scale = Adaptive(eta=0.0)(Point([w], [g], rho=[0.5], base_state=[{}], step=0))
    >>> 0.5 * scale * direction[0]
    tensor([1., 0.])

    Source: Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
    Networks, arXiv 2102.11600.
    """

    paper: ClassVar[Paper] = ASAM_PAPER
    scale_free: ClassVar[bool] = True

    eta: float = 0.01
    """eta, which keeps weights at zero movable; the paper's value."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta < float("inf"):
            raise ValueError(
                f"eta must be finite and not negative, got {self.eta}: it is added to |w| in T = |w| + eta"
            )

    def __call__(self, point: Point) -> ScaledDirection:
        T = foreach(torch._foreach_abs, point.weights)
        foreach(torch._foreach_add_, T, scalar=self.eta)
        Tg = foreach(torch._foreach_mul, T, point.gradients)
        foreach(torch._foreach_mul_, T, Tg)  # T^2 g, in the place of T
        return ScaledDirection(T, reciprocal(norm(Tg)))


def asam(
    base_optimizer: Optimizer,
    rho: Rho = 0.5,
    *,
    eta: float = 0.01,
    steps: int = 1,
    only: Iterable[Tensor] | None = None,
    **options: Unpack[Options],
) -> SAM:
    """ASAM: climb in proportion to the weights, e = rho T^2 g / |T g|, T = |w| + eta. Two passes a step.

    ``steps`` and ``only`` are those of :func:`sam`.

    >>> import torch
    >>> asam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
    Adaptive(eta=0.01)

    Source: Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
    Networks, arXiv 2102.11600.
    """
    return SAM(base_optimizer, rho, **options, perturbation=modified(Adaptive(eta), steps, only))


CARD = MethodCard(
    name="asam",
    function=asam,
    label="ASAM",
    about="Its neighborhood does not change when a network is rescaled without changing its function.",
    equation="e = rho T^2 g / |T g|,   T = diag(|w| + eta)",
    cost="1 + steps",
    passes=lambda steps: 1 + steps,
    memory=COPY,
    when="Where layers can be rescaled without changing the function, as before a normalization layer.",
    when_not="With SAM's rho: this one is in units of the weights, and wants about ten times more.",
    usual={"rho": "0.5 to 2", "eta": "0.01", "steps": "1", "only": "all parameters"},
    checked="The official code, https://github.com/SamsungLabs/ASAM: weights agree (2e-16). Theirs takes T = 1 for "
    'parameters that are not called "weight"; here, as in the paper\'s formula, T is the same for all.',
    caveats=("A weight at zero climbs by eta's share only, and with eta = 0 not at all.",),
    comparison=Comparison(
        summary=f"climbs in proportion to the weights, at 10 x rho ({USUAL_RATIO})", rho_factor=10.0, capturable=True
    ),
)
