"""The edge of stability: the largest curvature at which gradient descent, momentum, Adam, or SAM, is stable."""

import math

from steppe._checks import check_below_one, check_nonnegative, check_positive


def edge_of_stability(lr: float, *, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> float:
    """Return the largest eigenvalue of the Hessian at which gradient descent is stable, 2 / lr without momentum.

    Full-batch gradient descent raises lambda_max to this value, and keeps it there. With the momentum beta of
    ``torch.optim.SGD`` it is (2 + 2 beta) / lr, divided by 1 - dampening (heavy ball), or
    (2 + 2 beta) / (lr (1 + 2 beta)) for Nesterov's momentum. Mini-batches lower it: see :func:`batch_sharpness`.

    Args:
        lr: Learning rate of gradient descent.
        momentum: beta, as of ``torch.optim.SGD``.
        dampening: As of ``torch.optim.SGD``; equal to ``momentum`` for an average of the gradients.
        nesterov: As of ``torch.optim.SGD``.

    Returns:
        The edge of stability.

    Raises:
        ValueError: ``lr`` is not positive and finite, ``momentum`` or ``dampening`` not in [0, 1), or ``nesterov``
            with dampening.

    Example:
        >>> edge_of_stability(0.1)
        20.0
        >>> round(edge_of_stability(0.1, momentum=0.9), 6)
        38.0

    References:
        Cohen et al. 2021, Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability,
        https://arxiv.org/abs/2103.00065.
    """
    check_positive("lr", lr, "the learning rate")
    check_below_one("momentum", momentum, "the share of the old momentum")
    check_below_one("dampening", dampening, "the share of the gradient that is left out")
    if nesterov and dampening:
        raise ValueError("nesterov=True with dampening: torch.optim.SGD has Nesterov's momentum without dampening only")
    if nesterov:
        return (2 + 2 * momentum) / (lr * (1 + 2 * momentum))
    return (2 + 2 * momentum) / (lr * (1 - dampening if momentum else 1.0))


def adam_edge_of_stability(lr: float, *, beta1: float = 0.9) -> float:
    """Return the largest eigenvalue of P^-1 H at which Adam is stable, (2 + 2 beta1) / ((1 - beta1) lr).

    P is :func:`adam_preconditioner`. Full-batch Adam raises the preconditioned sharpness, the largest eigenvalue of
    P^-1 H, to this value, and keeps it there, while the sharpness lambda_max(H) may go on rising. It is exact for a P
    that changes slowly.

    Args:
        lr: Learning rate of Adam or AdamW.
        beta1: The first of its ``betas``.

    Returns:
        The edge of stability of Adam: 38 / lr for the usual beta1 = 0.9.

    Raises:
        ValueError: ``lr`` is not positive and finite, or ``beta1`` is not in [0, 1).

    Example:
        >>> round(adam_edge_of_stability(0.001))
        38000

    References:
        Cohen et al. 2022, Adaptive Gradient Methods at the Edge of Stability, https://arxiv.org/abs/2207.14484.
    """
    check_below_one("beta1", beta1, "the share of the old first moment")
    return edge_of_stability(lr, momentum=beta1, dampening=beta1)


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
    check_positive("lr", lr, "the learning rate")
    check_nonnegative("rho", rho, "the radius of the neighborhood")
    check_nonnegative("gradient_norm", gradient_norm, "the length of the gradient")
    if rho == 0:
        return 2 / lr
    if gradient_norm == 0:
        return 0.0
    # The formula with a rationalized numerator: as printed it is 0 / 0 at rho = 0, and loses all digits near it.
    return 4 / lr / (1 + math.sqrt(1 + 8 * (rho / lr) / gradient_norm))
