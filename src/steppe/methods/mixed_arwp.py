"""m-ARWP: mix the gradient at w with that at adaptive random noise."""

from typing import Unpack

from steppe.methods._card import COPY_AND_G, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.methods.arwp import AdaptiveNoise, RunningSquares
from steppe.methods.mixed_rwp import MIXED_RWP_PAPER
from steppe.rules.mixed_gradient import MixedGradient
from steppe.sam import SAM


def mixed_arwp(
    base_optimizer: Base,
    rho: Rho = 0.015,
    *,
    alpha: float = 0.5,
    eta: float = 0.1,
    beta: float = 0.99,
    seed: int = 0,
    **options: Unpack[Options],
) -> SAM:
    """m-ARWP: mix the gradient at w with that at noise that is smaller where gradients are large. Two passes per step.

    w <- Base(w, (1 - alpha) g + alpha g_s), with e = rho |w_f| r / sqrt(1 + eta v_f) in each filter f, Gaussian r, and
    v <- beta v + g_s^2.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the standard deviation of e relative to the filter's norm; 0.015 in the authors' script.
        alpha: alpha, the share of g_s; 0.5 in the authors' script.
        eta: eta, the weight of the squared gradients; 0.1 in the authors' script, and 0 is m-RWP.
        beta: beta, the share of the old sum in v; 0.99 in the authors' script.
        seed: The seed of the noise.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> import torch
        >>> mixed_arwp(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        AdaptiveNoise(eta=0.1, seed=0)

    References:
        Li et al., Revisiting Random Weight Perturbation for Efficiently Improving Generalization, arXiv 2404.00357.
    """
    noise, combination = AdaptiveNoise(eta, seed), RunningSquares(MixedGradient(alpha), beta)
    return SAM(base_optimizer, rho, **options, perturbation=noise, combination=combination)


CARD = MethodCard(
    name="mixed_arwp",
    function=mixed_arwp,
    label="m-ARWP",
    paper=MIXED_RWP_PAPER,
    summary="Update with a mixture of the gradient at w and that at random noise, which is smaller where gradients "
    "have been large. It is `mixed_rwp` with the noise of `arwp`.",
    equation="e = rho |w_f| r / sqrt(1 + eta v_f)      in each filter f; r Gaussian; v_f = the sum of v over f\n"
    "w <- Base(w, (1 - alpha) g + alpha g_s),   v <- beta v + g_s^2,   from v = 0",
    cost="2",
    passes=2,
    memory=f"{COPY_AND_G}; from step to step, v",
    when="To keep the gradient at w beside that at random noise, if two passes are affordable.",
    when_not="If only one pass is affordable: `arwp`.",
    usual={
        "rho": "0.015 (official code)",
        "alpha": "0.5 (official code)",
        "eta": "0.1 in the script, 1 by default (official code)",
        "beta": "0.99 in the script, 0.9 by default (official code)",
    },
    verified="official code, read",
    checked="https://github.com/nblt/mARWP: `train_marwp.py` has this formula, with g and g_s of two different "
    "batches. Here both are of the same batch. The body of the paper was not read.",
    caveats=(
        "v depends on the size of the loss: a mean over the batch. With a loss scaler, give `scaler=`.",
        "A perturbation for each micro-batch (`closures.micro_batches`) is an error: v describes batches.",
    ),
    comparison=Comparison(
        summary=f"mixes g with the gradient at adaptive noise, at 0.3 x rho ({USUAL_RATIO})", rho_factor=0.3
    ),
)
