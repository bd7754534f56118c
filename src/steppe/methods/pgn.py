"""PGN: penalize the gradient norm."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

from steppe._checks import check_nonnegative
from steppe.methods._card import COPY_AND_G, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import ICML, Paper
from steppe.rules.mixed_gradient import MixedGradient
from steppe.sam import SAM

PGN_PAPER = Paper(
    "zhao2022pgn",
    ("Yang Zhao", "Hao Zhang", "Xiuyuan Hu"),
    "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning",
    "2202.03599",
    2022,
    ICML,
)


@dataclass(frozen=True)
class PenalizedNorm(MixedGradient):
    """Penalize the gradient norm, L(w) + lambda |g(w)| (PGN): (1 - alpha) g + alpha g_s.

    With the radius rho as the paper's r, alpha = lambda / r; alpha = 1 is SAM. At a step without perturbation, the
    update gradient is g.

    The authors' code has a flag, on by default, that uses g / |g| in place of g in the first term; here, as in the
    paper's formula, it is g.

    Example:
        >>> import torch
        >>> from steppe.rules import Point
        >>> point = Point([torch.zeros(1)], [torch.tensor([1.0])], rho=[0.05], base_state=[{}], step=0)
        >>> PenalizedNorm(alpha=0.75)(point, [torch.tensor([2.0])])
        [tensor([1.7500])]

    References:
        Zhao et al., Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning, arXiv
        2202.03599.
    """

    paper: ClassVar[Paper] = PGN_PAPER

    alpha: float = 0.8
    """alpha = lambda / r, the share of g_s; the authors train with 0.8 and r = 0.1."""

    def __post_init__(self) -> None:
        check_nonnegative("alpha", self.alpha, "lambda / r, the share of g_s")


def pgn(base_optimizer: Base, rho: Rho = 0.1, *, alpha: float = 0.8, **options: Unpack[Options]) -> SAM:
    """PGN: penalize the gradient norm. Two passes per step.

    w <- Base(w, (1 - alpha) g + alpha g_s), to first order the gradient of L(w) + alpha rho |g|.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the paper's r; usually 0.1.
        alpha: alpha, the paper's lambda / r; usually 0.8, and 1 is SAM.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: alpha is negative or not finite.

    Example:
        >>> import torch
        >>> pgn(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).combination
        PenalizedNorm(alpha=0.8)

    References:
        Zhao et al., Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning, arXiv
        2202.03599.
    """
    return SAM(base_optimizer, rho, **options, combination=PenalizedNorm(alpha))


CARD = MethodCard(
    name="pgn",
    function=pgn,
    label="PGN",
    paper=PGN_PAPER,
    summary="Penalize the gradient norm by updating with (1 - alpha) g + alpha g_s. To first order that is the "
    "gradient of L(w) + alpha rho |g|.",
    equation="e = rho g / |g|\nw <- Base(w, (1 - alpha) g + alpha g_s)",
    cost="2",
    passes=2,
    memory=COPY_AND_G,
    when="To move between the base (alpha 0) and SAM (alpha 1) by a weight.",
    when_not="When there is no memory for one more gradient.",
    usual={"rho": "0.1, the paper's r", "alpha": "0.8, the paper's lambda / r; 1 is SAM"},
    verified="official code, read",
    checked="https://github.com/zhaoyang-0204/gnp: a flag, on by default, uses g / |g| in place of g in the first "
    "term; here, as in the paper's formula, it is g. Theirs also clips the gradient at 5.0, and its L2 penalty is a "
    "part of the loss, so that it acts on the perturbation too; here the base applies it at w.",
    caveats=("rho and alpha act together: the penalty is lambda = alpha rho.",),
    comparison=Comparison(
        summary=f"penalizes the gradient norm, at 2 x rho ({USUAL_RATIO})", rho_factor=2.0, capturable=True
    ),
)
