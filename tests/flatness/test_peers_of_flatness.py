"""The Hessian against another package's: products, eigenvalues, the trace and moments of the density."""

import numpy as np
import pytest
import torch
from oracles import DOUBLE, objective, samples, tanh_net
from scipy.sparse.linalg import eigsh
from torch import nn

from steppe.flatness import Hessian, density, eigenvalues, trace

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")

# from inside torch, at its first forward-mode derivative
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`.*:DeprecationWarning")


def ours_and_theirs():
    """Of one network, over batches of 7, 7 and 6 samples."""
    net, batches = tanh_net(), list(zip(*(t.split(7) for t in samples()), strict=True))
    theirs = curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), batches)
    return Hessian(objective(net, batches)), theirs


def test_products_agree():
    ours, theirs = ours_and_theirs()
    vectors = torch.randn(3, ours.n, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(vectors), (theirs @ vectors.T).T, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("which", "arpack"), [("largest", "LA"), ("smallest", "SA"), ("magnitude", "LM")])
def test_eigenvalues_agree_with_those_that_arpack_finds_of_theirs(which, arpack):
    ours, theirs = ours_and_theirs()
    matrix = theirs.to_scipy(dtype=np.float64)
    expected = eigsh(matrix, 3, which=arpack, tol=1e-11, v0=np.ones(ours.n), return_eigenvectors=False)
    found = eigenvalues(ours, 3, which=which, tol=1e-8)
    np.testing.assert_allclose(np.sort(found.values.numpy()), np.sort(expected), rtol=1e-7)


def test_the_trace_agrees():
    ours, theirs = ours_and_theirs()
    dense = theirs @ torch.eye(ours.n, dtype=DOUBLE)
    everything = eigenvalues(ours, ours.n, tol=1e-10)
    # with all eigenvectors known nothing is left to sample
    assert trace(ours, probes=1, top=everything).value == pytest.approx(float(dense.trace()), rel=1e-9)


def test_the_moments_of_the_density_agree():
    ours, theirs = ours_and_theirs()
    dense = theirs @ torch.eye(ours.n, dtype=DOUBLE)
    found = density(ours, probes=100, steps=4)
    for power in (1, 2, 3):
        moment = float(torch.linalg.matrix_power(dense, power).trace()) / ours.n
        estimate = found.mean(lambda x, power=power: x**power)
        assert abs(estimate.value - moment) <= 4 * estimate.error
        assert estimate.error < 0.25 * abs(moment)  # so that the line above can fail
