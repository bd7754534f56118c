"""Eigenvalues against dense matrices, scipy and known spectra."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from known_hessians import (
    DOUBLE,
    SPECTRUM,
    assert_determined_by_seed,
    matrix,
    net_and_dense,
)

from steppe.flatness import eigenvalues, trace


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("k", [1, 4])
def test_eigenvalues_of_a_network_are_those_of_its_dense_hessian(which, k):
    hessian, dense = net_and_dense()
    exact = torch.linalg.eigvalsh(dense)
    key = {"largest": -exact, "smallest": exact, "magnitude": -exact.abs()}[which]
    found = eigenvalues(hessian, k, which=which, tol=1e-8)
    assert found.converged
    torch.testing.assert_close(found.values, exact[key.argsort()][:k], rtol=1e-6, atol=1e-10)
    for value, u, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        torch.testing.assert_close(residual, (dense @ u - value * u).norm(), rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(k, dtype=DOUBLE), rtol=0, atol=1e-9)


def test_eigenvalues_agree_with_scipy():
    hessian, _ = net_and_dense()
    as_linear = scipy.sparse.linalg.LinearOperator(
        (hessian.n, hessian.n), matvec=lambda v: hessian(torch.tensor(v).view(1, -1))[0].numpy(), dtype=np.float64
    )
    theirs, _ = scipy.sparse.linalg.eigsh(as_linear, 3, which="LA", tol=1e-10)
    ours = eigenvalues(hessian, 3, tol=1e-8)
    np.testing.assert_allclose(ours.values.numpy(), theirs[::-1], rtol=1e-6)


def test_restarted_small_basis_finds_the_same_eigenvalues():
    small = eigenvalues(matrix(), 3, tol=1e-9, basis_size=8, max_matvecs=2000)
    assert small.converged
    torch.testing.assert_close(small.values, torch.tensor([50.0, 20.0, 8.0], dtype=DOUBLE), rtol=1e-8, atol=0)


def test_only_multiple_eigenvalues_are_repeated():
    found = eigenvalues(matrix(), 4, tol=1e-9).values
    assert found[0] - found[1] > 1  # Lanczos without orthogonalization returns 50 several times
    everything = eigenvalues(matrix([5.0, 5.0, 1.0]), 3, tol=1e-9)
    torch.testing.assert_close(everything.values, torch.tensor([5.0, 5.0, 1.0], dtype=DOUBLE), rtol=1e-9, atol=0)


def test_unconverged_eigenvalues_are_marked():
    found = eigenvalues(matrix(), 4, tol=1e-9, max_matvecs=6)
    assert not found.converged
    assert found.num_matvecs <= 6 + 4
    exact = torch.tensor(SPECTRUM, dtype=DOUBLE)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert (exact - value).abs().min() <= residual * (1 + 1e-9)  # the residual is a bound even before convergence


def test_smallest_eigenvalue_is_not_one_of_those_near_zero():
    found = eigenvalues(
        matrix([*[0.0] * 200, *torch.linspace(0.0, 2.0, 30).tolist(), 50.0, -0.8]), which="smallest", tol=1e-2
    )
    assert float(found.values[0]) == pytest.approx(-0.8, rel=1e-3)  # any vector of the bulk has a residual below 0.5


def test_zero_operator_has_zero_eigenvalues_and_trace():
    found = eigenvalues(matrix([0.0] * 5), 2)
    assert found.converged
    assert torch.equal(found.values, torch.zeros(2, dtype=DOUBLE))
    assert trace(matrix([0.0] * 5)).value == 0


def test_eigenvalue_of_a_vector_of_millions_of_entries_is_accurate():
    class Diagonal:
        n, dtype, device = 5_000_000, torch.float32, torch.device("cpu")

        def __call__(self, vectors):
            return 2243.78 * vectors

    found = eigenvalues(Diagonal(), basis_size=3)
    assert float(found.values[0]) == pytest.approx(2243.78, rel=1e-6)  # a norm accumulated in float32 gives 2250.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eigenvalues(matrix(), 0), "k must be 1 or more"),
        (lambda: eigenvalues(matrix([1.0, 2.0]), 3), "between 1 and 2"),
        (lambda: eigenvalues(matrix(), 4, basis_size=4), "at least 6"),
        (lambda: eigenvalues(matrix([math.nan, 1.0])), "not finite"),
    ],
)
def test_invalid_eigenvalue_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_seed_alone_determines_eigenvectors():
    assert_determined_by_seed(lambda seed: eigenvalues(matrix(), tol=1e-2, seed=seed).vectors)
