"""Average-case sharpness: the mean loss increase over random perturbations of the weights."""

import torch
from torch import Tensor

from steppe._checks import check_count, check_positive
from steppe._tensors import random as random_tensors
from steppe.flatness._ascent import finite_loss, loss_increase, perturbation_scale
from steppe.flatness.estimate import Estimate
from steppe.flatness.objective import Objective


def average_sharpness(
    objective: Objective, sigma: float, *, pairs: int = 32, adaptive: bool = False, eta: float = 0.0, seed: int = 0
) -> Estimate:
    """Average the loss increase over Gaussian perturbations: E L(w + e) - L(w), e ~ N(0, sigma^2 T^2).

    T = 1, or, adaptive, T = |w| + eta. sigma is the standard deviation of each coordinate, so |e| is about
    sigma sqrt(n): sigma = rho / sqrt(n) matches the radius rho of :func:`sharpness`. Perturbations come in pairs e, -e,
    whose mean is one sample, so that the gradient cancels: for a smooth loss and a small sigma the mean is
    sigma^2 / 2 Tr(T H T). In a ReLU network it is not, because the kinks do not contribute to the Hessian.

    Args:
        objective: The loss over the data. If the increase is below 1e-6 of the loss, compute in
            ``dtype=torch.float64``: in float32 it would be mostly rounding.
        sigma: Standard deviation of a coordinate of e (adaptive: relative to the weight).
        pairs: Number of pairs e, -e; two passes over the data each.
        adaptive: Scale the perturbation of each weight by T.
        eta: Added to |w| in T. With 0, weights at zero are not perturbed, and the mean is invariant to all rescalings
            of a ReLU network that preserve its function.
        seed: Seed of the perturbations.

    Returns:
        The mean over the pairs with its standard error; infinite if a loss is.

    Raises:
        ValueError: ``sigma`` or ``pairs`` is not positive, or ``eta`` without ``adaptive``.
        FloatingPointError: The loss is not finite at w, or NaN at a perturbed point.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
        >>> found = average_sharpness(objective, sigma=0.1, pairs=200)
        >>> abs(found.value - 0.1**2 / 2 * 5) < 3 * found.error  # H = diag(1, 4)
        True

    References:
        Andriushchenko et al. 2023, A Modern Look at the Relationship between Sharpness and Generalization,
        https://arxiv.org/abs/2302.07011.
    """
    check_positive("sigma", sigma, "the standard deviation of the noise")
    check_count("pairs", pairs, "the number of pairs of opposite perturbations in the mean")
    T = perturbation_scale(objective, adaptive, eta)
    objective.stage = "average sharpness"
    loss = finite_loss(objective.loss())
    like = torch.empty(objective.n, dtype=objective.dtype, device=objective.device)

    def pair_mean(pair: int) -> float:
        (x,) = random_tensors.normal("steppe.average_sharpness", seed, pair, [like])
        e: Tensor = x * T * sigma
        return (loss_increase(objective.loss(e), loss) + loss_increase(objective.loss(-e), loss)) / 2

    return Estimate.of([pair_mean(pair) for pair in range(pairs)])
