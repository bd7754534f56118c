"""The edge of stability: the largest curvature at which gradient descent, or SAM, is stable."""

import math


def edge_of_stability(lr: float) -> float:
    """Return the largest eigenvalue of the Hessian at which gradient descent is stable, 2 / lr.

    Full-batch gradient descent raises lambda_max to this value, and keeps it there.

    Args:
        lr: Learning rate of gradient descent, without momentum.

    Returns:
        2 / lr.

    Raises:
        ValueError: ``lr`` is not positive and finite.

    Example:
        >>> edge_of_stability(0.1)
        20.0

    References:
        Cohen et al. 2021, Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability,
        https://arxiv.org/abs/2103.00065.
    """
    _check_positive("lr", lr)
    return 2 / lr


def sam_edge_of_stability(lr: float, rho: float, gradient_norm: float) -> float:
    """Return the largest eigenvalue at which SAM is stable, |g| / (2 rho) (sqrt(1 + 8 rho / (lr |g|)) - 1).

    It is below 2 / lr and falls with the gradient, so SAM lowers lambda_max as it converges. It is 2 / lr for rho = 0,
    and else 0 at a zero gradient.

    Args:
        lr: Learning rate of gradient descent, the base optimizer, without momentum.
        rho: Radius of SAM.
        gradient_norm: |g|, the L2 norm of the full-batch gradient.

    Returns:
        The edge of stability of SAM.

    Raises:
        ValueError: ``lr`` is not positive, ``rho`` or ``gradient_norm`` is negative, or one is not finite.

    Example:
        >>> round(sam_edge_of_stability(0.1, rho=0.1, gradient_norm=1.0), 6)
        10.0

    References:
        Long and Bartlett 2024, Sharpness-Aware Minimization and the Edge of Stability,
        https://arxiv.org/abs/2309.12488.
    """
    _check_positive("lr", lr)
    _check_nonnegative("rho", rho)
    _check_nonnegative("gradient_norm", gradient_norm)
    if rho == 0:
        return 2 / lr
    if gradient_norm == 0:
        return 0.0
    # The formula with a rationalized numerator: as printed it is 0 / 0 at rho = 0, and loses all digits near it.
    return 4 / lr / (1 + math.sqrt(1 + 8 * (rho / lr) / gradient_norm))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}: the edge of stability is undefined")


def _check_nonnegative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}: it is a length")
