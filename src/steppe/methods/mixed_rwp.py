"""m-RWP: mix the gradient at w with that at a random perturbation."""

from typing import Unpack

from torch.optim import Optimizer

from steppe.methods._card import COPY_AND_G, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.methods.pgn import PenalizedNorm
from steppe.methods.rwp import GaussianNoise
from steppe.papers import Paper
from steppe.sam import SAM

MIXED_RWP_PAPER = Paper(
    "li2024mrwp",
    (
        "Tao Li",
        "Qinghua Tao",
        "Weihao Yan",
        "Yingwen Wu",
        "Zehao Lei",
        "Kun Fang",
        "Mingzhen He",
        "Xiaolin Huang",
    ),
    "Revisiting Random Weight Perturbation for Efficiently Improving Generalization",
    "2404.00357",
    2024,
    "Transactions on Machine Learning Research (TMLR)",
)


def mixed_rwp(
    base_optimizer: Optimizer, rho: Rho = 0.01, *, alpha: float = 0.5, seed: int = 0, **options: Unpack[Options]
) -> SAM:
    """m-RWP: go down with (1 - alpha) g + alpha times the gradient at a random w + e. Two passes a step.

    Source: Li et al., Revisiting Random Weight Perturbation for Efficiently Improving Generalization, arXiv 2404.00357.
    """
    noise = GaussianNoise(filterwise=True, seed=seed, paper=MIXED_RWP_PAPER)
    return SAM(base_optimizer, rho, **options, perturbation=noise, combination=PenalizedNorm(alpha))


CARD = MethodCard(
    name="mixed_rwp",
    function=mixed_rwp,
    label="m-RWP",
    about="The two gradients do not depend on each other.",
    equation="e = rho |w_f| r              in each filter f; r Gaussian\nw <- Base(w, (1 - alpha) g + alpha g_s)",
    cost="2",
    passes=2,
    memory=COPY_AND_G,
    when="To keep the gradient at w beside that of a random climb, where two passes are affordable.",
    when_not="Where one pass must do: `rwp`.",
    usual={"rho": "0.015 (official code)", "alpha": "0.5 (official code)"},
    checked="The official code, https://github.com/nblt/mARWP, was read: half of its devices take g at w, and for "
    "another batch than g_s; here both are on the same batch, in two passes. The bodies of the papers were not "
    "read.",
    caveats=("Here the two passes follow each other; running them on two devices at once is not built.",),
    comparison=Comparison(summary=f"mixes g with that of a random climb, at rho / 5 ({USUAL_RATIO})", rho_factor=0.2),
)
