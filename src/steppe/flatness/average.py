"""Average sharpness: how much higher the loss is near the weights, at a random place."""

import math

import torch
from torch import Tensor

from steppe._tensors import random as random_tensors
from steppe.flatness.ascent import finite, metric, rise
from steppe.flatness.objective import Objective
from steppe.flatness.values import Estimate


def average_sharpness(
    objective: Objective, sigma: float, *, pairs: int = 32, adaptive: bool = False, eta: float = 0.0, seed: int = 0
) -> Estimate:
    """Average the rise of the loss over Gaussian displacements: E L(w + e) - L(w), e ~ N(0, sigma^2 T^2).

    T = 1, or, adaptive, T = |w| + eta. sigma is the standard deviation of each coordinate, and |e| is about
    sigma sqrt(n): take sigma = rho / sqrt(n) to look as far as :func:`sharpness` does at rho. Displacements come in
    pairs e, -e, one draw each, so that the gradient cancels: for a smooth loss and a small sigma the mean is
    sigma^2 / 2 Tr(T H T). With kinks (ReLU) it is not, since a Hessian does not see them.

    Args:
        objective: the loss over the data. Where the rise is below 1e-6 of the loss, compute in ``dtype=torch.float64``:
            in float32 it would be mostly rounding.
        sigma: the standard deviation of a coordinate of e (adaptive: relative to the weight).
        pairs: draws; two passes over the data each.
        adaptive: whether to displace in proportion to the weights.
        eta: what is added to |w| in T; with 0, weights at zero stay, and the mean is the same for all rescalings of a
            ReLU network that leave its function as it is.
        seed: of the draws.

    Returns:
        The mean over the pairs, with its standard error; infinite where a loss is.

    Raises:
        ValueError: sigma or pairs that are not positive, eta without ``adaptive``.
        FloatingPointError: the loss is not finite at w, or NaN elsewhere.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
    >>> found = average_sharpness(objective, sigma=0.1, pairs=200)
    >>> abs(found.value - 0.1**2 / 2 * 5) < 3 * found.error  # H = diag(1, 4)
    True

    Source: Andriushchenko et al., A Modern Look at the Relationship between Sharpness and Generalization,
    arXiv 2302.07011.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}: it is a standard deviation")
    if pairs < 1:
        raise ValueError(f"pairs={pairs}: a mean needs at least one draw")
    T = metric(objective, adaptive, eta)
    objective.stage = "average sharpness"
    loss, like = finite(objective.loss()), torch.empty(objective.n, dtype=objective.dtype, device=objective.device)

    def draw(pair: int) -> float:
        (x,) = random_tensors.normal("steppe.average_sharpness", seed, pair, [like])
        e: Tensor = x * T * sigma
        return (rise(objective.loss(e), loss) + rise(objective.loss(-e), loss)) / 2

    return Estimate.of([draw(pair) for pair in range(pairs)])
