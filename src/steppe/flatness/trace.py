"""The trace of an operator, by Hutchinson's estimator."""

import torch

from steppe._checks import check_count
from steppe._tensors import random as random_tensors
from steppe._tensors.reductions import dot
from steppe.flatness._orthogonal import orthogonalize
from steppe.flatness.eigenvalues import Eigenpairs
from steppe.flatness.estimate import Estimate
from steppe.flatness.operators import Operator

_PROBES_PER_PASS = 8


def trace(operator: Operator, *, probes: int = 32, top: Eigenpairs | None = None, seed: int = 0) -> Estimate:
    """Estimate Tr A = sum_i lambda_i from random signs v, E[v' A v] = Tr A (Hutchinson's estimator).

    The sampling error comes from the off-diagonal entries. With ``top``, eigenvectors u_i of the largest eigenvalues,
    their part is exact and only the rest is sampled: Tr A = sum_i u_i' A u_i + E[(P v)' A (P v)], with P the projection
    on their orthogonal complement. If a few eigenvalues dominate, this needs far fewer probes.

    Args:
        operator: The Hessian, or any symmetric operator, (n, n).
        probes: Number of random vectors, one product each.
        top: The result of :func:`eigenvalues` for the same operator.
        seed: Seed of the probes.

    Returns:
        The mean over the probes with its standard error.

    Raises:
        ValueError: ``probes`` is below 1.
        RuntimeError: The operator's model contains an operation without a second derivative.

    Example:
        >>> class Diagonal:
        ...     n, dtype, device = 100, torch.float64, torch.device("cpu")
        ...
        ...     def __call__(self, vectors):
        ...         return vectors * torch.linspace(0.0, 1.0, 100, dtype=torch.float64)
        >>> round(trace(Diagonal(), probes=1).value, 6)  # for a diagonal matrix every probe is exact
        50.0

    References:
        Hutchinson 1990, A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines,
        Communications in Statistics 19.

        Deflation: Meyer et al. 2021, Hutch++: Optimal Stochastic Trace Estimation, https://arxiv.org/abs/2010.09649.
    """
    check_count("probes", probes, "the number of random vectors")
    like = torch.empty(operator.n, dtype=operator.dtype, device=operator.device)
    samples: list[float] = []
    for begin in range(0, probes, _PROBES_PER_PASS):
        signs = [
            random_tensors.integers("trace", seed, i, [like], below=2)[0]
            for i in range(begin, min(begin + _PROBES_PER_PASS, probes))
        ]
        vs = torch.stack(signs).to(operator.dtype) * 2 - 1
        if top is not None:
            vs = torch.stack([orthogonalize(v, top.vectors)[0] for v in vs])
        samples += [float(dot([v], [product])) for v, product in zip(vs, operator(vs), strict=True)]
    exact = 0.0 if top is None else float(top.values.sum())
    rest = Estimate.of(samples)
    return Estimate(exact + rest.value, rest.error, rest.n)
