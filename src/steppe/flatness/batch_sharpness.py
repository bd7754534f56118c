"""Batch sharpness: the curvature of the loss of a batch along the batch's own gradient."""

from itertools import islice

import torch

from steppe._checks import check_count
from steppe._tensors.reductions import dot
from steppe.flatness._ascent import finite_loss, naming_part
from steppe.flatness.estimate import Estimate, weighted_standard_error
from steppe.flatness.objective import Objective
from steppe.flatness.operators import Hessian


def batch_sharpness(objective: Objective, m: int, *, parts: int | None = None) -> Estimate:
    """Estimate the sharpness that SGD on batches of m samples sees, E_B g_B' H_B g_B / E_B |g_B|^2.

    g_B and H_B are gradient and Hessian of the loss of a batch B. SGD without momentum raises this quotient to 2 / lr,
    and keeps it there, as full-batch gradient descent does with lambda_max. Of SGD, lambda_max is smaller than 2 / lr,
    and the smaller, the smaller the batches. For m = N it is the curvature along the full-batch gradient.

    Args:
        objective: The loss over the data, in random order: a part of m samples stands for a random batch. A part lies
            within one batch, whose last part may be smaller; parts are weighted by their samples.
        m: Samples per part, the batch size of the training.
        parts: Number of parts to measure, the first ones of each rank; by default all.

    Returns:
        The quotient with its standard error over the parts (of a quotient of means, to first order).

    Raises:
        ValueError: ``m`` or ``parts`` is below 1, or all gradients are zero.
        FloatingPointError: The loss of a part is not finite.
        RuntimeError: The model contains an operation without a second derivative.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
        >>> found = batch_sharpness(objective, m=1)  # gradients (2, 0) and (0, 8), along curvatures 2 and 8
        >>> round(found.value, 4), round(2 * 2**2 / (2**2 + 8**2) + 8 * 8**2 / (2**2 + 8**2), 4)
        (7.6471, 7.6471)

    References:
        Andreyev and Beneventano 2025, Edge of Stochastic Stability: Revisiting the Edge of Stability for SGD,
        https://arxiv.org/abs/2412.20553.
    """
    if parts is not None:
        check_count("parts", parts, "the number of parts of the data in the mean")
    objective.stage = "batch sharpness"
    measured: list[tuple[float, float, float]] = []
    for part in islice(objective.split(m), parts):
        loss, g = part.gradient()
        with naming_part(part):
            finite_loss(loss)
        hessian = Hessian(part)
        (product,) = hessian(g[None])
        measured.append((part.samples, float(dot([g], [product])), float(dot([g], [g]))))
    measured = objective.gather(measured)
    if not any(squared > 0 for _, _, squared in measured):
        raise ValueError("the gradients of all batches are zero (or there are none): there is no direction to measure")
    sizes, curvatures, squares = (torch.tensor(column, dtype=torch.float64) for column in zip(*measured, strict=True))
    weights = sizes / sizes.sum()
    mean_square = (weights * squares).sum()
    quotient = (weights * curvatures).sum() / mean_square
    residuals = weights * (curvatures - quotient * squares) / mean_square
    return Estimate(float(quotient), weighted_standard_error(residuals), len(sizes))
