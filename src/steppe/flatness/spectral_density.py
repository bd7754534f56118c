"""The density of an operator's eigenvalues, by stochastic Lanczos quadrature."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe._checks import check_count
from steppe._tensors import random as random_tensors
from steppe.flatness._orthogonal import check_finite_product, orthogonalize, row_norms, unit_vector
from steppe.flatness.estimate import Estimate
from steppe.flatness.operators import Operator

_BASIS_BYTES = 2**31  # memory of the bases of all probes that are multiplied in the same pass


@dataclass(frozen=True, eq=False)
class Density:
    """The spectral density phi(x) = 1/n sum_i delta(x - lambda_i), as a quadrature for each of p random probes.

    Every statistic is a mean over the probes with its standard error. Nodes and weights are stored unsmoothed; the
    bandwidth is chosen when the density is plotted.
    """

    nodes: Tensor
    """Nodes of the quadrature, (p, num_iterations), float64, ascending."""
    weights: Tensor
    """Weights of the nodes, (p, num_iterations), float64; they sum to 1 for each probe."""
    n: int
    """Number of eigenvalues."""

    def mean(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimate 1/n sum_i f(lambda_i); for polynomials of degree < 2 num_iterations the only error is sampling."""
        return Estimate.of((self.weights * f(self.nodes)).sum(1))

    def mass(self, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """Estimate the fraction of eigenvalues in [low, high]."""
        return self.mean(lambda x: ((x >= low) & (x <= high)).double())

    def smoothed(self, x: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        """Evaluate the density smoothed by Gaussians.

        Args:
            x: Where to evaluate, (m,).
            bandwidth: Standard deviation of the Gaussians.

        Returns:
            The density at x and its standard error over the probes, (m,) each, float64.

        Raises:
            ValueError: ``bandwidth`` is not positive.
        """
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth}: it is a standard deviation and must be above 0")
        z = (x.to(self.nodes)[:, None, None] - self.nodes) / bandwidth
        each = (self.weights * torch.exp(-0.5 * z * z)).sum(2) / (bandwidth * math.sqrt(2 * math.pi))
        p = each.shape[1]
        return each.mean(1), each.std(1) / math.sqrt(p) if p > 1 else torch.full_like(each[:, 0], math.nan)


def density(operator: Operator, *, probes: int = 8, num_iterations: int = 64, seed: int = 0) -> Density:
    """Estimate the spectral density phi(x) = 1/n sum_i delta(x - lambda_i) by stochastic Lanczos quadrature.

    For a random unit vector v, E[v' f(A) v] = 1/n sum_i f(lambda_i). Lanczos' method from v yields a tridiagonal matrix
    whose eigenvalues are the nodes, and the squared first components of its eigenvectors the weights, of the Gauss
    quadrature of v' f(A) v. All probes are multiplied in the same pass, so the graph of a batch is built once for all;
    the vectors are fully orthogonalized.

    Args:
        operator: The Hessian, or any symmetric operator, (n, n).
        probes: Number of random vectors; the standard errors fall with its square root.
        num_iterations: Lanczos iterations, one product per probe each. The ends of the spectrum are resolved first,
            its interior with more iterations.
        seed: Seed of the probes.

    Returns:
        A :class:`Density`, with min(num_iterations, n) nodes per probe.

    Raises:
        ValueError: ``probes`` or ``num_iterations`` is below 1, or a product is not finite.
        RuntimeError: The operator's model contains an operation without a second derivative.

    Example:
        >>> class Diagonal:
        ...     n, dtype, device = 100, torch.float64, torch.device("cpu")
        ...
        ...     def __call__(self, vectors):
        ...         return vectors * torch.linspace(0.0, 1.0, 100, dtype=torch.float64)
        >>> found = density(Diagonal(), probes=4, num_iterations=10)
        >>> bool(torch.isclose(found.weights.sum(1), torch.ones(4, dtype=torch.float64)).all())
        True
        >>> round(found.mass(0.0, 1.0).value, 6)
        1.0

    References:
        Ghorbani, Krishnan and Xiao 2019, An Investigation into Neural Net Optimization via Hessian Eigenvalue Density,
        https://arxiv.org/abs/1901.10159.
    """
    check_count("probes", probes, "the number of random vectors")
    check_count("num_iterations", num_iterations, "the number of Lanczos iterations for each of them")
    num_iterations = min(num_iterations, operator.n)
    probe_bytes = operator.n * operator.dtype.itemsize * num_iterations
    per_pass = max(1, min(probes, _BASIS_BYTES // probe_bytes))
    parts = [
        _quadrature(operator, _unit_vectors(operator, seed, i, min(i + per_pass, probes)), num_iterations)
        for i in range(0, probes, per_pass)
    ]
    nodes, weights = (torch.cat(side) for side in zip(*parts, strict=True))
    return Density(nodes, weights, operator.n)


def _unit_vectors(operator: Operator, seed: int, begin: int, end: int) -> Tensor:
    """Draw the starts of the probes from ``begin`` to ``end``, in rows."""
    like = torch.empty(operator.n, dtype=operator.dtype, device=operator.device)
    vs = (random_tensors.normal("density", seed, i, [like])[0] for i in range(begin, end))
    return torch.stack([unit_vector(v, v.new_zeros(()))[0] for v in vs])


def _quadrature(operator: Operator, starts: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    """Run Lanczos' method from all starts (p, n) at once; return nodes and weights, (p, num_iterations) each."""
    p, n = starts.shape
    q = starts.new_zeros(p, num_iterations, n)
    t = torch.zeros(p, num_iterations, num_iterations, dtype=torch.float64)
    newest = starts
    for j in range(num_iterations):
        q[:, j] = newest
        products = operator(newest)
        remainders, columns = orthogonalize(products, q[:, : j + 1])
        check_finite_product(columns, "spectrum")
        t[:, j, j] = columns[:, j].cpu().double()
        if j + 1 < num_iterations:
            # once a Krylov space is exhausted the next vector is 0: it decouples, and its nodes have weight 0
            pairs = [unit_vector(r, length) for r, length in zip(remainders, row_norms(products), strict=True)]
            newest = torch.stack([v for v, _ in pairs])
            t[:, j, j + 1] = t[:, j + 1, j] = torch.stack([length for _, length in pairs]).cpu().double()
    nodes, vectors = torch.linalg.eigh(t)
    return nodes, vectors[:, 0, :] ** 2
