"""Orthonormal vectors in a row each, and what Lanczos' method does with them: the arithmetic that has to be exact."""

import torch
from torch import Tensor

from steppe._tensors.ops import accumulator, norm

# Sums over so many entries are made in the vectors' own dtype, and those of the pieces in float64.
_PIECE = 1 << 16
# A vector of which less than this is left, after what is known was taken out of it, is rounding error.
_NOTHING = 1e-6


def dots(basis: Tensor, vector: Tensor) -> Tensor:
    """Return the inner products of rows (..., k, n) with a vector (..., n): (..., k), in float64.

    In float32 alone they would be off by 1e-3 at millions of entries, and eigenvalues with them.
    """
    total = basis.new_zeros(basis.shape[:-1], dtype=accumulator(basis.device))
    for begin in range(0, basis.shape[-1], _PIECE):
        piece = slice(begin, begin + _PIECE)
        total += (basis[..., piece] @ vector[..., piece, None])[..., 0]
    return total


def lengths(vectors: Tensor) -> Tensor:
    """Return the norm of each row of (k, n), in float64."""
    return torch.stack([norm([v]) for v in vectors])


def orthogonalised(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Take out of a vector (..., n) what lies along rows (..., k, n); return the rest and the coefficients (..., k).

    Done twice: once leaves rounding errors of what was taken out, which may be longer than the rest.
    """
    coefficients = torch.zeros_like(basis[..., 0], dtype=accumulator(basis.device))
    for _ in range(2):
        along = dots(basis, vector)
        vector = vector - (along.to(basis.dtype)[..., None, :] @ basis)[..., 0, :]
        coefficients += along
    return vector, coefficients


def unit(vector: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return a vector (n,) at length 1, and its length; both are 0 where beside ``scale`` it is rounding error."""
    length = norm([vector])
    length = torch.where(length <= _NOTHING * scale, 0.0, length)
    return vector * torch.where(length > 0, 1 / length, 0.0).to(vector), length
