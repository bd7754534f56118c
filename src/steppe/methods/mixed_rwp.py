"""m-RWP: mix the gradient at w with that at randomly perturbed weights."""

from typing import Unpack

from steppe.methods._card import COPY_AND_G, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.methods.rwp import GaussianNoise
from steppe.papers import Paper
from steppe.rules.mixed_gradient import MixedGradient
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
    base_optimizer: Base, rho: Rho = 0.01, *, alpha: float = 0.5, seed: int = 0, **options: Unpack[Options]
) -> SAM:
    """m-RWP: mix the gradient at w with that at randomly perturbed weights. Two passes per step.

    w <- Base(w, (1 - alpha) g + alpha g_s), with e = rho |w_f| r in each filter f and Gaussian r.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the standard deviation of e relative to the filter's norm; 0.015 in the official code.
        alpha: alpha, the share of g_s; 0.5 in the official code.
        seed: The seed of the noise.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: alpha is negative or not finite.

    Example:
        >>> import torch
        >>> mixed_rwp(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).combination
        MixedGradient(alpha=0.5)

    References:
        Li et al., Revisiting Random Weight Perturbation for Efficiently Improving Generalization, arXiv 2404.00357.
    """
    noise = GaussianNoise(filterwise=True, seed=seed, paper=MIXED_RWP_PAPER)
    return SAM(base_optimizer, rho, **options, perturbation=noise, combination=MixedGradient(alpha))


CARD = MethodCard(
    name="mixed_rwp",
    function=mixed_rwp,
    label="m-RWP",
    paper=MIXED_RWP_PAPER,
    summary="Update with a mixture of the gradient at w and that at randomly perturbed weights. The two gradients do "
    "not depend on each other.",
    equation="e = rho |w_f| r              in each filter f; r Gaussian\nw <- Base(w, (1 - alpha) g + alpha g_s)",
    cost="2",
    passes=2,
    memory=COPY_AND_G,
    when="To keep the gradient at w beside that at random noise, if two passes are affordable.",
    when_not="If only one pass is affordable: `rwp`.",
    usual={"rho": "0.015 (official code)", "alpha": "0.5 (official code)"},
    verified="official code, read",
    checked="https://github.com/nblt/mARWP: half of its devices compute g at w, and on another batch than g_s; here "
    "both are on the same batch, in two passes. The bodies of the papers were not read.",
    caveats=("Here the two passes run one after the other; two devices at once are not supported.",),
    comparison=Comparison(
        summary=f"mixes g with the gradient at random noise, at rho / 5 ({USUAL_RATIO})", rho_factor=0.2
    ),
)
