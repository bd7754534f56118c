"""The largest and smallest eigenvalues of an operator, by Lanczos' method."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from steppe._tensors import random as random_tensors
from steppe._tensors.ops import dot, norm
from steppe.flatness.bases import lengths, orthogonalised, unit
from steppe.flatness.operators import Operator

Which: TypeAlias = Literal["largest", "smallest", "magnitude"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues of an operator A with unit vectors, the most wanted first."""

    values: Tensor
    """lambda_i = u_i' A u_i, float64 (k,)."""
    vectors: Tensor
    """u_i, (k, n)."""
    residuals: Tensor
    """|A u_i - lambda_i u_i|, float64 (k,): A has an eigenvalue that is no further than this from lambda_i."""
    converged: bool
    """Whether all residuals are within the tolerance that was asked for."""
    products: int
    """How many times A was multiplied with a vector."""


def eigenvalues(
    operator: Operator,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    most: int = 500,
    basis: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """Compute the k largest or smallest eigenvalues, A u_i = lambda_i u_i, with their vectors.

    Lanczos' method: A is projected on the space of v, A v, A^2 v, ... for a random v. Every new vector is
    orthogonalised twice against all others, so no eigenvalue is found a second time; when the basis is full it is begun
    again with the best of what it holds (thick restart), so memory is that of ``basis`` vectors. An eigenvalue with
    several vectors is found as often only when the space of one is exhausted: a cluster may lack members.

    Args:
        operator: :class:`~steppe.flatness.Hessian`, or any other symmetric one.
        k: how many.
        which: "largest" and "smallest" by value, with their signs; "magnitude" by absolute value.
        tol: stop when each |A u - lambda u| is at most tol |lambda|, or for a lambda near 0, tol / 100 of the largest.
            The error of lambda goes with the square of that where the eigenvalue stands apart.
        most: products at most; what is not as exact by then is returned with ``converged=False``.
        basis: vectors of length n in memory; by default 2 k + 30.
        seed: of the first vector.

    Raises:
        ValueError: k below 1 or above n, a basis that is too small; a product that is not finite.

    Source: K. Wu and H. Simon, *Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems*, SIAM J. Matrix
    Anal. Appl. 22 (2000).

    >>> class Diagonal:
    ...     n, dtype, device = 100, torch.float64, torch.device("cpu")
    ...
    ...     def __call__(self, vectors):
    ...         return vectors * torch.linspace(-1.0, 7.0, 100, dtype=torch.float64)
    >>> found = eigenvalues(Diagonal(), which="smallest")
    >>> round(float(found.values[0]), 4), found.converged
    (-1.0, True)
    """
    if not 1 <= k <= operator.n:
        raise ValueError(f"k={k}: an operator of {operator.n} rows has between 1 and {operator.n} eigenvalues")
    room = min(operator.n, basis or 2 * k + 30)
    if room < min(operator.n, k + 2):
        raise ValueError(f"basis={basis}: for {k} eigenvalues it needs at least {k + 2} vectors")
    space = _Space(operator, room, seed)
    while True:
        space.extend()
        values, ritz, residuals = space.solve(which)
        done = space.size >= k and bool((residuals[:k] <= tol * _sizes(values[:k], space.scale)).all())
        if done or space.products >= most or space.size == operator.n:
            break
        if space.size == room:
            space.restart(values, ritz, keep=min(room - 2, k + (room - k) // 2))
    k = min(k, space.size)
    vectors = space.combine(ritz[:, :k])
    vectors = vectors / lengths(vectors)[:, None].to(vectors)
    products = operator(vectors)
    values = torch.stack([dot([u], [p]) for u, p in zip(vectors, products, strict=True)])
    residuals = lengths(products - values[:, None].to(products) * vectors)
    # in float32 a product has rounding errors of its own, which no further step removes
    floor = 50 * torch.finfo(operator.dtype).eps
    allowed = torch.maximum(tol * _sizes(values, space.scale), torch.as_tensor(floor * space.scale))
    converged = bool((residuals.cpu() <= 2 * allowed).all())
    return Eigenpairs(values, vectors, residuals, converged, space.products + k)


def _sizes(values: Tensor, scale: float) -> Tensor:
    """What a residual is compared with.

    Beside the largest eigenvalue alone, any vector of the bulk around 0 would pass for that of the smallest one.
    """
    return values.cpu().abs().clamp_min(0.01 * scale)


class _Space:
    """A growing orthonormal basis Q of a Krylov space, and S = Q A Q' in it."""

    def __init__(self, operator: Operator, room: int, seed: int) -> None:
        self._operator, self._seed, self._drawn = operator, seed, 0
        self._q = torch.zeros(room + 1, operator.n, dtype=operator.dtype, device=operator.device)
        self._s = torch.zeros(room, room, dtype=torch.float64)
        self._last = 0.0
        self.size = self.products = 0
        self.scale = 0.0
        """The largest absolute value of an eigenvalue that was seen."""
        self._q[0] = self._fresh()

    def extend(self) -> None:
        """Multiply the newest vector, and find the next one."""
        j = self.size
        product = self._operator(self._q[j : j + 1])[0]
        rest, column = orthogonalised(product, self._q[: j + 1])
        if not bool(column.isfinite().all()):
            raise ValueError(
                "a product with the operator is not finite, so it has no eigenvalues: the loss or one of its "
                "derivatives overflows at these weights"
            )
        self._s[: j + 1, j] = self._s[j, : j + 1] = column.cpu().double()
        self._q[j + 1], length = unit(rest, norm([product]))
        self._last = float(length)
        self.size, self.products = j + 1, self.products + 1
        if self._last == 0.0 and self.size < self._operator.n:
            self._q[j + 1] = self._fresh()  # the space is exhausted: go on in what is orthogonal to it

    def solve(self, which: Which) -> tuple[Tensor, Tensor, Tensor]:
        """Return the eigenvalues of S, the most wanted first, their vectors in columns, and their residuals for A."""
        values, vectors = torch.linalg.eigh(self._s[: self.size, : self.size])
        key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
        order = key.argsort()
        values, vectors = values[order], vectors[:, order]
        self.scale = max(self.scale, float(values.abs().max()))
        return values, vectors, self._last * vectors[-1].abs()

    def restart(self, values: Tensor, vectors: Tensor, keep: int) -> None:
        """Go on from the most wanted vectors and the newest one."""
        newest = self._q[self.size].clone()
        self._q[:keep] = self.combine(vectors[:, :keep])
        self._q[keep] = newest
        self._s.zero_()
        self._s[:keep, :keep] = values[:keep].diag()
        self.size = keep

    def combine(self, vectors: Tensor) -> Tensor:
        """Turn vectors in the basis, in columns, into vectors (k, n)."""
        return vectors.T.to(self._q) @ self._q[: self.size]

    def _fresh(self) -> Tensor:
        (vector,) = random_tensors.normal("eigenvalues", self._seed, self._drawn, [self._q[0]])
        self._drawn += 1
        rest, _ = orthogonalised(vector, self._q[: self.size + 1])
        return unit(rest, rest.new_zeros(()))[0]
