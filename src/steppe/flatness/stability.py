"""The edge of stability: up to which curvature gradient descent, and SAM, can stay in a minimum."""

import math


def edge_of_stability(lr: float) -> float:
    """Return the largest eigenvalue of the Hessian at which gradient descent is still stable: 2 / lr.

    Full-batch gradient descent raises lambda_max until it hovers there.

    >>> edge_of_stability(0.1)
    20.0

    Source: Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability,
    arXiv 2103.00065.
    """
    _positive("lr", lr)
    return 2 / lr


def sam_edge_of_stability(lr: float, rho: float, gradient_norm: float) -> float:
    """Return SAM's own edge: |g| / (2 rho) (sqrt(1 + 8 rho / (lr |g|)) - 1), for the gradient descent it climbs for.

    It is below 2 / lr, and the smaller the gradient, the lower: SAM holds lambda_max down as it converges. With
    rho = 0 it is 2 / lr, and 0 where the gradient is zero.

    Args:
        lr: of plain gradient descent.
        rho: SAM's radius.
        gradient_norm: |g|, the L2 norm of the gradient of the whole loss.

    Raises:
        ValueError: lr is not positive, or rho or the norm is negative, or one is not finite.

    >>> round(sam_edge_of_stability(0.1, rho=0.1, gradient_norm=1.0), 6)
    10.0

    Source: Long and Bartlett, Sharpness-Aware Minimization and the Edge of Stability, arXiv 2309.12488.
    """
    _positive("lr", lr)
    _not_negative("rho", rho)
    _not_negative("gradient_norm", gradient_norm)
    if rho == 0:
        return 2 / lr
    if gradient_norm == 0:
        return 0.0
    # The root multiplied out: the formula as printed is 0 / 0 at rho = 0, and loses all digits near it.
    return 4 / lr / (1 + math.sqrt(1 + 8 * (rho / lr) / gradient_norm))


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}: there is no edge without steps")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}: it is a length")
