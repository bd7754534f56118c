"""The largest or smallest eigenvalues of an operator, by Lanczos' method."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from steppe._checks import check_count
from steppe._tensors import random as random_tensors
from steppe._tensors.reductions import dot, norm
from steppe.flatness._orthogonal import check_finite_product, matmul, orthogonalize, row_norms, unit_vector
from steppe.flatness.operators import Operator

Which: TypeAlias = Literal["largest", "smallest", "magnitude"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues of an operator A with unit eigenvectors, in the order of ``which``."""

    values: Tensor
    """lambda_i = u_i' A u_i, (k,), float64."""
    vectors: Tensor
    """u_i in rows, (k, n)."""
    residuals: Tensor
    """|A u_i - lambda_i u_i|, (k,), float64. A has an eigenvalue within this distance of lambda_i."""
    converged: bool
    """True if all residuals are within the tolerance."""
    num_matvecs: int
    """Number of products of A with a vector."""


def eigenvalues(
    operator: Operator,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    max_matvecs: int = 500,
    basis_size: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """Compute the k largest or smallest eigenvalues with their eigenvectors, A u_i = lambda_i u_i.

    Lanczos' method projects A on the space spanned by v, A v, A^2 v, ... for a random v. Each new vector is
    orthogonalized twice against all others, so no eigenvalue is found a second time. A full basis is restarted with the
    best Ritz vectors in it (thick restart), so memory is bounded by ``basis_size`` vectors. Further eigenvectors of a
    multiple eigenvalue are found only after the Krylov space is exhausted: a cluster may be incomplete.

    Args:
        operator: :class:`~steppe.flatness.Hessian`, or any other symmetric operator, (n, n).
        k: Number of eigenvalues.
        which: "largest" or "smallest" by value, or "magnitude" for the largest by absolute value.
        tol: Bound of each |A u - lambda u| relative to |lambda|, or, for lambda near 0, of tol / 100 relative to the
            largest. The error of a well-separated lambda is about the square of this.
        max_matvecs: Maximum number of products; what has not converged by then is returned with ``converged=False``.
        basis_size: Vectors of length n in memory; by default 2 k + 30.
        seed: Seed of the first vector.

    Returns:
        The :class:`Eigenpairs`, of at most ``k`` eigenvalues.

    Raises:
        ValueError: ``k`` is below 1 or above n, ``basis_size`` is too small, or a product is not finite.
        RuntimeError: The operator's model contains an operation without a second derivative.

    Example:
        >>> class Diagonal:
        ...     n, dtype, device = 100, torch.float64, torch.device("cpu")
        ...
        ...     def __call__(self, vectors):
        ...         return vectors * torch.linspace(-1.0, 7.0, 100, dtype=torch.float64)
        >>> found = eigenvalues(Diagonal(), which="smallest")
        >>> round(float(found.values[0]), 4), found.converged
        (-1.0, True)

    References:
        Wu and Simon 2000, Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems, SIAM J. Matrix Anal.
        Appl. 22.
    """
    check_count("k", k, "the number of eigenvalues")
    if k > operator.n:
        raise ValueError(f"k={k}: an operator of {operator.n} rows has between 1 and {operator.n} eigenvalues")
    capacity = min(operator.n, basis_size or 2 * k + 30)
    if capacity < min(operator.n, k + 2):
        raise ValueError(f"basis_size={basis_size}: {k} eigenvalues need at least {k + 2} vectors")
    space = _KrylovSpace(operator, capacity, seed)
    while True:
        space.extend()
        values, ritz, residuals = space.solve(which)
        done = space.size >= k and bool((residuals[:k] <= tol * _residual_scale(values[:k], space.scale)).all())
        if done or space.num_matvecs >= max_matvecs or space.size == operator.n:
            break
        if space.size == capacity:
            space.restart(values, ritz, keep=min(capacity - 2, k + (capacity - k) // 2))
    k = min(k, space.size)
    vectors = space.combine(ritz[:, :k])
    vectors = vectors / row_norms(vectors)[:, None].to(vectors)
    products = operator(vectors)
    values = torch.stack([dot([u], [p]) for u, p in zip(vectors, products, strict=True)])
    residuals = row_norms(products - values[:, None].to(products) * vectors)
    # in float32 a product has rounding errors that further iterations do not reduce
    rounding = 50 * torch.finfo(operator.dtype).eps
    allowed = torch.maximum(tol * _residual_scale(values, space.scale), torch.as_tensor(rounding * space.scale))
    converged = bool((residuals.cpu() <= 2 * allowed).all())
    return Eigenpairs(values, vectors, residuals, converged, space.num_matvecs + k)


def _residual_scale(values: Tensor, largest: float) -> Tensor:
    """Return the scale of the residual of each eigenvalue, |lambda| or 1 % of the largest.

    Relative to the largest alone, almost any vector would be accepted as an eigenvector of the smallest eigenvalue.
    """
    return values.cpu().abs().clamp_min(0.01 * largest)


class _KrylovSpace:
    """A growing orthonormal basis Q of a Krylov space, and the projection S = Q A Q'."""

    def __init__(self, operator: Operator, capacity: int, seed: int) -> None:
        self._operator, self._seed, self._draws = operator, seed, 0
        self._q = torch.zeros(capacity + 1, operator.n, dtype=operator.dtype, device=operator.device)
        self._s = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._last = 0.0
        self.size = self.num_matvecs = 0
        self.scale = 0.0
        """The largest absolute Ritz value so far."""
        self._q[0] = self._random_vector()

    def extend(self) -> None:
        """Multiply the newest basis vector, and append the orthogonalized product to the basis."""
        j = self.size
        product = self._operator(self._q[j : j + 1])[0]
        remainder, column = orthogonalize(product, self._q[: j + 1])
        check_finite_product(column, "eigenvalues")
        self._s[: j + 1, j] = self._s[j, : j + 1] = column.cpu().double()
        self._q[j + 1], length = unit_vector(remainder, norm([product]))
        self._last = float(length)
        self.size, self.num_matvecs = j + 1, self.num_matvecs + 1
        if self._last == 0.0 and self.size < self._operator.n:
            self._q[j + 1] = self._random_vector()  # the space is exhausted: continue in its orthogonal complement

    def solve(self, which: Which) -> tuple[Tensor, Tensor, Tensor]:
        """Return the eigenvalues of S in the order of ``which``, their vectors in columns, and residuals for A."""
        values, vectors = torch.linalg.eigh(self._s[: self.size, : self.size])
        key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
        order = key.argsort()
        values, vectors = values[order], vectors[:, order]
        self.scale = max(self.scale, float(values.abs().max()))
        return values, vectors, self._last * vectors[-1].abs()

    def restart(self, values: Tensor, vectors: Tensor, keep: int) -> None:
        """Replace the basis by the first ``keep`` Ritz vectors and the newest basis vector."""
        newest = self._q[self.size].clone()
        self._q[:keep] = self.combine(vectors[:, :keep])
        self._q[keep] = newest
        self._s.zero_()
        self._s[:keep, :keep] = values[:keep].diag()
        self.size = keep

    def combine(self, vectors: Tensor) -> Tensor:
        """Turn coefficients in the basis, (size, k) in columns, into vectors (k, n)."""
        return matmul(vectors.T.to(self._q), self._q[: self.size])

    def _random_vector(self) -> Tensor:
        """Draw a unit vector orthogonal to the basis."""
        (vector,) = random_tensors.normal("eigenvalues", self._seed, self._draws, [self._q[0]])
        self._draws += 1
        remainder, _ = orthogonalize(vector, self._q[: self.size + 1])
        return unit_vector(remainder, remainder.new_zeros(()))[0]
