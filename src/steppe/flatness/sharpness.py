"""Worst-case sharpness: the largest loss increase in a ball around the weights."""

from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from steppe._checks import check_count
from steppe._tensors import random as random_tensors
from steppe._tensors import reductions
from steppe.flatness._ascent import Ball, Candidate, Norm, PerturbedLoss, ascend, best, finite_loss, perturbation_scale
from steppe.flatness.objective import Objective


@dataclass(frozen=True)
class Sharpness:
    """The largest loss increase found in a ball around the weights, with the values that it is compared with."""

    value: float
    """L(w + e) - L(w) at the best e found: a lower bound of S(w). Not negative; inf if the loss is infinite there."""
    first_order: float
    """The first-order approximation, rho times the dual norm of g (adaptive: of T g)."""
    one_step: float
    """The loss increase at the perturbed weights of SAM (adaptive: ASAM), e = rho g / |g|."""
    restarts: tuple[float, ...]
    """The best loss increase of each restart; the first starts along the gradient. If they differ much, use more."""
    loss: float
    """L(w)."""
    gradient_norm: float
    """The L2 norm |g| of the gradient at w."""
    rho: float
    """The radius."""
    e: Tensor = field(repr=False, compare=False)
    """The best perturbation found, (n,)."""
    passes: int = 0
    """Passes over the data."""


def sharpness(
    objective: Objective,
    rho: float,
    *,
    ascent_steps: int = 20,
    restarts: int = 5,
    seed: int = 0,
    adaptive: bool = False,
    norm: Norm = "l2",
    eta: float = 0.0,
) -> Sharpness:
    """Maximize the loss over a ball around the weights: S(w) = max over |T^-1 e| <= rho of L(w + e) - L(w).

    T = 1, or, adaptive, T = |w| + eta. The maximization is over z = T^-1 e, so nothing is divided by a weight. With
    eta = 0 a weight that is exactly zero is not perturbed, and S(w) is invariant to all rescalings of a ReLU network
    that preserve its function. With eta > 0 (0.01 in ASAM) every weight is perturbed, and rescaling changes S(w)
    somewhat.

    The result is a lower bound of the maximum: the best candidate of ``restarts`` projected gradient ascents of
    ``ascent_steps`` passes each. The first ascent starts at w along the gradient, so it passes through the perturbed
    weights of SAM; the others start at random points on the boundary of the ball. Steps have the length of Barzilai and
    Borwein, and go to the boundary where the loss is convex along the step. At a zero gradient only the random starts
    can increase the loss.

    Args:
        objective: The loss over the data at the current weights.
        rho: Radius of the ball: of e, or, adaptive, of e relative to the weights.
        ascent_steps: Passes over the data in each ascent.
        restarts: Number of ascents.
        seed: Seed of the random starts.
        adaptive: Measure e relative to the weights, as ASAM does.
        norm: "l2", or "linf" for the largest entry, whose usual radii are far smaller.
        eta: Added to |w| in T.

    Returns:
        A :class:`Sharpness`, after at most 1 + ascent_steps * restarts passes. An ascent ends early at a stationary
        point.

    Raises:
        ValueError: ``rho``, ``ascent_steps`` or ``restarts`` is not positive, or ``eta`` without ``adaptive``.
        FloatingPointError: The loss is infinite at w, or the loss or its gradient is NaN at an evaluated point, so that
            no maximum exists. At an infinite loss elsewhere the sharpness is infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
        >>> round(sharpness(objective, rho=0.5).value, 4)  # 1/2 lambda_max rho^2, with H = diag(1, 4)
        0.5

    References:
        Foret et al. 2021, Sharpness-Aware Minimization for Efficiently Improving Generalization,
        https://arxiv.org/abs/2010.01412.

        Adaptive: Kwon et al. 2021, ASAM, https://arxiv.org/abs/2102.11600.

        Step length: Birgin, Martinez and Raydan 2000, Nonmonotone Spectral Projected Gradient Methods on Convex Sets,
        SIAM J. Optim. 10.
    """
    check_count("ascent_steps", ascent_steps, "the number of steps from each start")
    check_count("restarts", restarts, "the number of starts, the weights among them")
    ball, T = Ball(rho, norm), perturbation_scale(objective, adaptive, eta)
    objective.stage, passes_before = "sharpness", objective.passes
    loss, gradient = objective.gradient()
    perturbed = PerturbedLoss(objective, T, finite_loss(loss))
    g = perturbed.checked_gradient(T * gradient, 0.0)

    unperturbed = Candidate(0.0, torch.zeros_like(gradient))
    ascent = ascend(perturbed, ball, unperturbed, g, ascent_steps)
    one_step = next(ascent, unperturbed)
    found = [best(chain((unperturbed, one_step), ascent))]
    for restart in range(1, restarts):
        (x,) = random_tensors.normal("steppe.sharpness", seed, restart, [gradient])
        start, g_start = perturbed.evaluate_with_gradient(x * (rho / ball.length(x)))
        found.append(best(chain((start,), ascend(perturbed, ball, start, g_start, ascent_steps - 1))))
    maximum = best(found)
    return Sharpness(
        value=maximum.increase,
        first_order=rho * ball.dual_norm(g),
        one_step=one_step.increase,
        restarts=tuple(candidate.increase for candidate in found),
        loss=perturbed.loss,
        gradient_norm=float(reductions.norm([gradient])),
        rho=rho,
        e=T * maximum.z,
        passes=objective.passes - passes_before,
    )
