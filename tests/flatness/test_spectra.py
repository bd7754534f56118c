"""Eigenvalues, density and trace against dense matrices, scipy and known spectra."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from oracles import DOUBLE, dense_hessian, objective, quadratic, relu_net, rescaled, samples, tanh_net, with_spectrum

from steppe.flatness import Block, Hessian, Scaled, density, eigenvalues, trace

# A bulk at 0, a few outliers, and negative ones: what a network's looks like.
SPECTRUM = [*torch.linspace(-0.5, 1.0, 90).tolist(), 3.0, 3.1, 8.0, 20.0, 20.0, 50.0]


def matrix(values=SPECTRUM):
    return Hessian(quadratic(with_spectrum(values)))


def net_and_dense():
    net = tanh_net()
    return Hessian(objective(net, batch_size=7)), dense_hessian(net, *samples())


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


def test_restarts_with_a_small_basis_find_the_same():
    small = eigenvalues(matrix(), 3, tol=1e-9, basis=8, most=2000)
    assert small.converged
    torch.testing.assert_close(small.values, torch.tensor([50.0, 20.0, 8.0], dtype=DOUBLE), rtol=1e-8, atol=0)


def test_an_eigenvalue_is_not_returned_twice_and_a_double_one_is_when_the_space_is_exhausted():
    found = eigenvalues(matrix(), 4, tol=1e-9).values
    assert found[0] - found[1] > 1  # Lanczos without orthogonalisation returns 50 several times
    everything = eigenvalues(matrix([5.0, 5.0, 1.0]), 3, tol=1e-9)
    torch.testing.assert_close(everything.values, torch.tensor([5.0, 5.0, 1.0], dtype=DOUBLE), rtol=1e-9, atol=0)


def test_what_has_not_converged_says_so():
    found = eigenvalues(matrix(), 4, tol=1e-9, most=6)
    assert not found.converged
    assert found.products <= 6 + 4
    exact = torch.tensor(SPECTRUM, dtype=DOUBLE)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert (exact - value).abs().min() <= residual * (1 + 1e-9)  # and the residual is a bound all the same


def test_the_smallest_eigenvalue_is_not_a_vector_of_the_bulk():
    found = eigenvalues(
        matrix([*[0.0] * 200, *torch.linspace(0.0, 2.0, 30).tolist(), 50.0, -0.8]), which="smallest", tol=1e-2
    )
    assert float(found.values[0]) == pytest.approx(-0.8, rel=1e-3)  # any vector of the bulk has a residual below 0.5


def test_a_zero_operator():
    found = eigenvalues(matrix([0.0] * 5), 2)
    assert found.converged
    assert torch.equal(found.values, torch.zeros(2, dtype=DOUBLE))
    assert trace(matrix([0.0] * 5)).value == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eigenvalues(matrix(), 0), "k=0"),
        (lambda: eigenvalues(matrix([1.0, 2.0]), 3), "between 1 and 2"),
        (lambda: eigenvalues(matrix(), 4, basis=4), "at least 6"),
        (lambda: eigenvalues(matrix([math.nan, 1.0])), "not finite"),
        (lambda: density(matrix([math.nan, 1.0])), "not finite"),
        (lambda: density(matrix(), probes=0), "at least one"),
        (lambda: trace(matrix(), probes=0), "at least one"),
        (lambda: density(matrix(), probes=1, steps=2).at(torch.zeros(1), 0.0), "above 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_everything_is_decided_by_the_seed():
    for of in (
        lambda seed: eigenvalues(matrix(), tol=1e-2, seed=seed).vectors,
        lambda seed: density(matrix(), probes=2, steps=5, seed=seed).nodes,
        lambda seed: torch.tensor(trace(matrix(), probes=3, seed=seed).value),
    ):
        torch.manual_seed(1)
        first = of(0)
        torch.manual_seed(2)
        assert torch.equal(of(0), first)
        assert not torch.equal(of(1), first)


def test_the_trace_is_exact_on_average_and_its_error_is_honest():
    exact = sum(SPECTRUM)
    found = [trace(matrix(), probes=8, seed=seed) for seed in range(60)]
    inside = sum(abs(f.value - exact) <= 2 * f.error for f in found)
    assert 48 <= inside <= 60  # of 95 % for a normal distribution, and 92 % for Student's with 7 degrees
    mean = sum(f.value for f in found) / 60
    spread = math.sqrt(sum(f.error**2 for f in found)) / 60
    assert abs(mean - exact) <= 4 * spread


def test_deflation_makes_the_trace_sharper_and_leaves_its_mean():
    hessian = matrix()
    top = eigenvalues(hessian, 4, tol=1e-9)
    exact, plain, deflated = sum(SPECTRUM), trace(hessian, probes=40), trace(hessian, probes=40, top=top)
    assert deflated.error < plain.error / 2
    assert abs(deflated.value - exact) <= 4 * deflated.error
    (everything,) = [trace(hessian, probes=1, top=eigenvalues(hessian, 96, tol=1e-9))]
    assert everything.value == pytest.approx(exact, rel=1e-9)


def test_the_density_of_a_known_spectrum():
    found = density(matrix(), probes=40, steps=60)
    assert torch.allclose(found.weights.sum(1), torch.ones(40, dtype=DOUBLE), atol=1e-10)
    exact = torch.tensor(SPECTRUM, dtype=DOUBLE)
    for f in (lambda x: x, lambda x: x**2, lambda x: (x > 2).double()):
        estimate = found.mean(f)
        assert abs(estimate.value - float(f(exact).mean())) <= 4 * estimate.error
    assert found.mass(2.0).value == pytest.approx(6 / 96, abs=4 * found.mass(2.0).error)
    x, bandwidth = torch.linspace(-1.0, 52.0, 50, dtype=DOUBLE), 0.5
    values, errors = found.at(x, bandwidth)
    gaussians = torch.exp(-0.5 * ((x[:, None] - exact) / bandwidth) ** 2) / (bandwidth * math.sqrt(2 * math.pi))
    assert ((values - gaussians.mean(1)).abs() <= 4 * errors + 1e-6).all()
    assert found.nodes.max() == pytest.approx(50.0, rel=1e-9)


def test_the_quadrature_is_exact_for_its_own_probe():
    hessian, dense = net_and_dense()
    found = density(hessian, probes=2, steps=6)
    from steppe._tensors import random as random_tensors

    for probe in range(2):
        (v,) = random_tensors.normal("density", 0, probe, [torch.empty(hessian.n, dtype=DOUBLE)])
        v /= v.norm()
        power = v
        for degree in range(1, 12):  # Gauss: exact to degree 2 steps - 1
            power = dense @ power
            moment = (found.weights[probe] * found.nodes[probe] ** degree).sum()
            torch.testing.assert_close(moment, v @ power, rtol=1e-8, atol=1e-12)


def test_an_exhausted_probe_has_no_weight_left_over():
    found = density(matrix([1.0, 1.0, 1.0, 4.0]), probes=3, steps=4)
    real = found.weights > 1e-8
    assert (real.sum(1) == 2).all()
    torch.testing.assert_close(found.nodes[real].view(3, 2), torch.tensor([[1.0, 4.0]] * 3, dtype=DOUBLE))


def test_probes_that_do_not_fit_together_give_the_same(monkeypatch):
    from steppe.flatness import spectrum

    together = density(matrix(), probes=5, steps=6)
    monkeypatch.setattr(spectrum, "_BASES", 2 * 96 * 8 * 6)
    apart = density(matrix(), probes=5, steps=6)
    torch.testing.assert_close((apart.nodes, apart.weights), (together.nodes, together.weights), rtol=1e-9, atol=1e-12)


def test_rescaling_changes_the_hessian_and_not_its_adaptive_form():
    before, after = objective(relu_net()), objective(rescaled(relu_net(), 8.0))
    torch.testing.assert_close(before.loss(), after.loss(), rtol=1e-12, atol=0)

    def measured(o):
        hessian = Hessian(o)
        adaptive = Scaled(hessian, o.weights.abs())
        exact = [float(op(torch.eye(o.n, dtype=DOUBLE)).trace()) for op in (hessian, adaptive)]
        tops = [float(eigenvalues(op, tol=1e-8).values[0]) for op in (hessian, adaptive)]
        return exact[0], tops[0], exact[1], tops[1]

    raw_trace, raw_top, adaptive_trace, adaptive_top = measured(before)
    other = measured(after)
    assert other[0] > 2 * raw_trace
    assert other[1] > 2 * raw_top
    assert other[2] == pytest.approx(adaptive_trace, rel=1e-9)
    assert other[3] == pytest.approx(adaptive_top, rel=1e-6)


def test_a_block_of_the_hessian():
    hessian, dense = net_and_dense()
    which = torch.zeros(hessian.n, dtype=torch.bool)
    which[5:9] = True
    torch.testing.assert_close(
        Block(hessian, which)(torch.eye(4, dtype=DOUBLE)), dense[5:9, 5:9], rtol=1e-9, atol=1e-13
    )


def test_sums_over_millions_of_entries_are_accurate():
    class Diagonal:
        n, dtype, device = 5_000_000, torch.float32, torch.device("cpu")

        def __call__(self, vectors):
            return 2243.78 * vectors

    found = eigenvalues(Diagonal(), basis=3)
    assert float(found.values[0]) == pytest.approx(2243.78, rel=1e-6)  # 2250.9 with float32's own norm
