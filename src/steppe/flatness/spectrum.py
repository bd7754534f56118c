"""The whole spectrum of an operator: its density and its trace, each with a standard error."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe._tensors import random as random_tensors
from steppe._tensors.ops import dot
from steppe.flatness.bases import lengths, orthogonalised, unit
from steppe.flatness.eigen import Eigenpairs
from steppe.flatness.operators import Operator
from steppe.flatness.values import Estimate

_BASES = 2**31  # bytes of vectors, from which on fewer probes go through the data together
_TOGETHER = 8  # probes of the trace in one pass


@dataclass(frozen=True, eq=False)
class Density:
    """The spectral density phi(x) = 1/n sum_i delta(x - lambda_i), as a quadrature for each of p random probes.

    Every statistic of it is a mean over the probes, with a standard error. Nodes and weights are kept as they were
    found: smoothing is a matter of drawing, and says with which bandwidth.
    """

    nodes: Tensor
    """Where the mass is, float64 (p, steps), ascending."""
    weights: Tensor
    """How much of it, float64 (p, steps); 1 in total for each probe."""
    n: int
    """How many eigenvalues there are."""

    def mean(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimate 1/n sum_i f(lambda_i); exact up to the sampling of probes for polynomials of degree 2 steps - 1."""
        return Estimate.of((self.weights * f(self.nodes)).sum(1))

    def mass(self, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """Estimate the share of the eigenvalues between low and high."""
        return self.mean(lambda x: ((x >= low) & (x <= high)).double())

    def at(self, x: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        """Evaluate the density at x (m,), smoothed by Gaussians of that standard deviation, with its standard error.

        Raises:
            ValueError: a bandwidth that is not above 0.
        """
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth}: it is a standard deviation, and must be above 0")
        z = (x.to(self.nodes)[:, None, None] - self.nodes) / bandwidth
        each = (self.weights * torch.exp(-0.5 * z * z)).sum(2) / (bandwidth * math.sqrt(2 * math.pi))
        p = each.shape[1]
        return each.mean(1), each.std(1) / math.sqrt(p) if p > 1 else torch.full_like(each[:, 0], math.nan)


def density(operator: Operator, *, probes: int = 8, steps: int = 64, seed: int = 0) -> Density:
    """Estimate the spectral density by stochastic Lanczos quadrature.

    For a random unit vector v, E[v' f(A) v] = 1/n sum_i f(lambda_i). Lanczos' method from v gives a tridiagonal T whose
    eigenvalues are the nodes, and the squared first components of its eigenvectors the weights, of the Gauss quadrature
    of v' f(A) v. The probes go through the data together, so that a batch's graph is made once for all; the vectors are
    orthogonalised in full.

    Args:
        operator: the Hessian, or any symmetric operator.
        probes: random vectors; the standard errors fall with the root of their number.
        steps: products a probe. More of them tell more of the inner of the spectrum; its ends come first.
        seed: of the probes.

    Raises:
        ValueError: probes or steps below 1; a product that is not finite.

    Source: B. Ghorbani, S. Krishnan and Y. Xiao, *An Investigation into Neural Net Optimization via Hessian Eigenvalue
    Density*, ICML 2019, https://arxiv.org/abs/1901.10159.

    >>> class Diagonal:
    ...     n, dtype, device = 100, torch.float64, torch.device("cpu")
    ...
    ...     def __call__(self, vectors):
    ...         return vectors * torch.linspace(0.0, 1.0, 100, dtype=torch.float64)
    >>> found = density(Diagonal(), probes=4, steps=10)
    >>> bool(torch.isclose(found.weights.sum(1), torch.ones(4, dtype=torch.float64)).all())
    True
    >>> round(found.mass(0.0, 1.0).value, 6)
    1.0
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"probes={probes}, steps={steps}: a density needs at least one of each")
    steps = min(steps, operator.n)
    vectors = operator.n * operator.dtype.itemsize * steps
    together = max(1, min(probes, _BASES // vectors))
    parts = [
        _quadrature(operator, _starts(operator, seed, i, min(i + together, probes)), steps)
        for i in range(0, probes, together)
    ]
    nodes, weights = (torch.cat(side) for side in zip(*parts, strict=True))
    return Density(nodes, weights, operator.n)


def trace(operator: Operator, *, probes: int = 32, top: Eigenpairs | None = None, seed: int = 0) -> Estimate:
    """Estimate tr A = sum_i lambda_i from random signs v, E[v' A v] = tr A (Hutchinson).

    The error of a probe comes from what is not on the diagonal. With ``top``, the eigenvectors u_i of the largest
    eigenvalues, their part is exact and only the rest is sampled: tr A = sum_i u_i' A u_i + E[(P v)' A (P v)], with P v
    what of v is orthogonal to them. Where a few eigenvalues stand out, that saves most of the probes.

    Args:
        operator: the Hessian, or any symmetric operator.
        probes: random vectors.
        top: what :func:`eigenvalues` gave for the same operator.
        seed: of the probes.

    Raises:
        ValueError: probes below 1.

    >>> class Diagonal:
    ...     n, dtype, device = 100, torch.float64, torch.device("cpu")
    ...
    ...     def __call__(self, vectors):
    ...         return vectors * torch.linspace(0.0, 1.0, 100, dtype=torch.float64)
    >>> round(trace(Diagonal(), probes=1).value, 6)  # of a diagonal matrix every probe is exact
    50.0
    """
    if probes < 1:
        raise ValueError(f"probes={probes}: an estimate needs at least one")
    like = torch.empty(operator.n, dtype=operator.dtype, device=operator.device)
    found: list[float] = []
    for begin in range(0, probes, _TOGETHER):
        signs = [
            random_tensors.integers("trace", seed, i, [like], below=2)[0]
            for i in range(begin, min(begin + _TOGETHER, probes))
        ]
        vs = torch.stack(signs).to(operator.dtype) * 2 - 1
        if top is not None:
            vs = torch.stack([orthogonalised(v, top.vectors)[0] for v in vs])
        found += [float(dot([v], [product])) for v, product in zip(vs, operator(vs), strict=True)]
    known = 0.0 if top is None else float(top.values.sum())
    rest = Estimate.of(found)
    return Estimate(known + rest.value, rest.error, rest.n)


def _starts(operator: Operator, seed: int, first: int, end: int) -> Tensor:
    like = torch.empty(operator.n, dtype=operator.dtype, device=operator.device)
    vs = (random_tensors.normal("density", seed, i, [like])[0] for i in range(first, end))
    return torch.stack([unit(v, v.new_zeros(()))[0] for v in vs])


def _quadrature(operator: Operator, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lanczos' method from each start (p, n) at once: nodes and weights, (p, steps)."""
    p, n = starts.shape
    q = starts.new_zeros(p, steps, n)
    t = torch.zeros(p, steps, steps, dtype=torch.float64)
    newest = starts
    for j in range(steps):
        q[:, j] = newest
        products = operator(newest)
        rest, columns = orthogonalised(products, q[:, : j + 1])
        if not bool(columns.isfinite().all()):
            raise ValueError(
                "a product with the operator is not finite, so it has no spectrum: the loss or one of its derivatives "
                "overflows at these weights"
            )
        t[:, j, j] = columns[:, j].cpu().double()
        if j + 1 < steps:
            # where a space is exhausted the next vector is 0: it decouples, and its nodes have no weight
            found = [unit(r, length) for r, length in zip(rest, lengths(products), strict=True)]
            newest = torch.stack([v for v, _ in found])
            t[:, j, j + 1] = t[:, j + 1, j] = torch.stack([length for _, length in found]).cpu().double()
    nodes, vectors = torch.linalg.eigh(t)
    return nodes, vectors[:, 0, :] ** 2
