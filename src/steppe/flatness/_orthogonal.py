"""Inner products, norms and orthogonalization of long vectors, accumulated in float64 for Lanczos' method."""

import torch
from torch import Tensor

from steppe._tensors.reductions import accumulator, norm

# Entries summed in the vectors' own dtype; the partial sums are added in float64.
_PIECE = 1 << 16
# A remainder shorter than this, relative to the vector before the projection was subtracted, is rounding error.
_ROUNDING = 1e-6


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in the dtype of the factors, also in an autocast region of the caller."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def dots(basis: Tensor, vector: Tensor) -> Tensor:
    """Return the inner products of rows (..., k, n) with a vector (..., n): (..., k), float64.

    A sum in float32 alone is off by 1e-3 at millions of entries, and the eigenvalues by as much.
    """
    total = basis.new_zeros(basis.shape[:-1], dtype=accumulator(basis.device))
    for begin in range(0, basis.shape[-1], _PIECE):
        piece = slice(begin, begin + _PIECE)
        total += matmul(basis[..., piece], vector[..., piece, None])[..., 0]
    return total


def row_norms(vectors: Tensor) -> Tensor:
    """Return the L2 norm of each row of (k, n): (k,), float64."""
    return torch.stack([norm([v]) for v in vectors])


def orthogonalize(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract from a vector (..., n) its projection on orthonormal rows (..., k, n).

    It is done twice: a single pass leaves rounding errors of the projection, which may exceed the remainder.

    Returns:
        The remainder (..., n), and the coefficients of the projection (..., k), float64.
    """
    coefficients = torch.zeros_like(basis[..., 0], dtype=accumulator(basis.device))
    for _ in range(2):
        projection = dots(basis, vector)
        vector = vector - matmul(projection.to(basis.dtype)[..., None, :], basis)[..., 0, :]
        coefficients += projection
    return vector, coefficients


def check_finite_product(coefficients: Tensor, result: str) -> None:
    """Raise ValueError unless the projection of a product with an operator, from :func:`orthogonalize`, is finite."""
    if not bool(coefficients.isfinite().all()):
        raise ValueError(
            f"a product with the operator is not finite, so it has no {result}: the loss or one of its derivatives "
            "overflows at these weights"
        )


def unit_vector(vector: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return a vector (n,) divided by its norm, and the norm; both are 0 if the norm is rounding error of ``scale``."""
    length = norm([vector])
    length = torch.where(length <= _ROUNDING * scale, 0.0, length)
    return vector * torch.where(length > 0, 1 / length, 0.0).to(vector), length
