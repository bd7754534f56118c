"""The Hessian, the Gauss-Newton and the empirical Fisher matrix against those of curvlinops."""

import pytest
import torch
from known_hessians import DOUBLE, objective, samples, tanh_net
from torch import nn

from steppe._tensors import random as random_tensors
from steppe.flatness import EmpiricalFisher, GaussNewton, Hessian, density, eigenvalues, trace

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")


# raised inside torch by its first forward-mode derivative; a FutureWarning since torch 2.14
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script`.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script`.*:FutureWarning"),
]


def ours_and_theirs():
    """Return both Hessians of one network, over batches of 7, 7 and 6 samples."""
    net, batches = tanh_net(), list(zip(*(t.split(7) for t in samples()), strict=True))
    theirs = curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), batches)
    return Hessian(objective(net, batches)), theirs


def test_products_agree_with_curvlinops():
    ours, theirs = ours_and_theirs()
    vectors = torch.randn(3, ours.n, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(vectors), (theirs @ vectors.T).T, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "name"), [(GaussNewton, "GGNLinearOperator"), (EmpiricalFisher, "EFLinearOperator")], ids=["GGN", "EF"]
)
def test_gauss_newton_and_fisher_matrices_agree_with_curvlinops(kind, name):
    net, batches = tanh_net(), list(zip(*(t.split(7) for t in samples()), strict=True))
    theirs = getattr(curvlinops, name)(net, nn.CrossEntropyLoss(), list(net.parameters()), batches)
    ours, identity = kind(objective(net, batches)), torch.eye(theirs.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(ours(identity), theirs @ identity, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_eigenvalues_agree_with_curvlinops(which):
    ours, theirs = ours_and_theirs()
    exact = torch.linalg.eigvalsh(theirs @ torch.eye(ours.n, dtype=DOUBLE))
    key = {"largest": -exact, "smallest": exact, "magnitude": -exact.abs()}[which]
    found = eigenvalues(ours, 3, which=which, tol=1e-8)
    torch.testing.assert_close(found.values, exact[key.argsort()][:3], rtol=1e-7, atol=0)


def test_trace_agrees_with_curvlinops():
    ours, theirs = ours_and_theirs()
    dense = theirs @ torch.eye(ours.n, dtype=DOUBLE)
    everything = eigenvalues(ours, ours.n, tol=1e-10)
    # with all eigenvectors known nothing is left to sample
    assert trace(ours, probes=1, top=everything).value == pytest.approx(float(dense.trace()), rel=1e-9)


def test_moments_of_the_density_agree_with_curvlinops():
    ours, theirs = ours_and_theirs()
    dense = theirs @ torch.eye(ours.n, dtype=DOUBLE)
    found = density(ours, probes=2, num_iterations=6)
    for probe in range(2):
        (v,) = random_tensors.normal("density", 0, probe, [torch.empty(ours.n, dtype=DOUBLE)])
        v /= v.norm()
        power = v
        for degree in range(1, 12):  # Gauss: exact to degree 2 num_iterations - 1
            power = dense @ power
            moment = found.weights[probe] @ found.nodes[probe] ** degree
            torch.testing.assert_close(moment, v @ power, rtol=1e-8, atol=1e-12)
