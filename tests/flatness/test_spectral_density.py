"""The spectral density against dense matrices and known spectra."""

import math

import pytest
import torch
from known_hessians import (
    DOUBLE,
    SPECTRUM,
    assert_determined_by_seed,
    matrix,
    net_and_dense,
)

from steppe._tensors import random as random_tensors
from steppe.flatness import density, spectral_density


def test_density_of_a_known_spectrum():
    found = density(matrix(), probes=40, num_iterations=60)
    assert torch.allclose(found.weights.sum(1), torch.ones(40, dtype=DOUBLE), atol=1e-10)
    exact = torch.tensor(SPECTRUM, dtype=DOUBLE)
    for f in (lambda x: x, lambda x: x**2, lambda x: (x > 2).double()):
        estimate = found.mean(f)
        assert abs(estimate.value - float(f(exact).mean())) <= 4 * estimate.error
    assert found.mass(2.0).value == pytest.approx(6 / 96, abs=4 * found.mass(2.0).error)
    x, bandwidth = torch.linspace(-1.0, 52.0, 50, dtype=DOUBLE), 0.5
    values, errors = found.smoothed(x, bandwidth)
    gaussians = torch.exp(-0.5 * ((x[:, None] - exact) / bandwidth) ** 2) / (bandwidth * math.sqrt(2 * math.pi))
    assert ((values - gaussians.mean(1)).abs() <= 4 * errors + 1e-6).all()
    assert found.nodes.max() == pytest.approx(50.0, rel=1e-9)


def test_quadrature_is_exact_for_each_probe():
    hessian, dense = net_and_dense()
    found = density(hessian, probes=2, num_iterations=6)
    for probe in range(2):
        (v,) = random_tensors.normal("density", 0, probe, [torch.empty(hessian.n, dtype=DOUBLE)])
        v /= v.norm()
        power = v
        for degree in range(1, 12):  # Gauss: exact to degree 2 num_iterations - 1
            power = dense @ power
            moment = (found.weights[probe] * found.nodes[probe] ** degree).sum()
            torch.testing.assert_close(moment, v @ power, rtol=1e-8, atol=1e-12)


def test_nodes_beyond_an_exhausted_krylov_space_have_zero_weight():
    found = density(matrix([1.0, 1.0, 1.0, 4.0]), probes=3, num_iterations=4)
    real = found.weights > 1e-8
    assert (real.sum(1) == 2).all()
    torch.testing.assert_close(found.nodes[real].view(3, 2), torch.tensor([[1.0, 4.0]] * 3, dtype=DOUBLE))


def test_probes_in_several_passes_give_the_same_density(monkeypatch):
    together = density(matrix(), probes=5, num_iterations=6)
    monkeypatch.setattr(spectral_density, "_BASIS_BYTES", 2 * 96 * 8 * 6)
    apart = density(matrix(), probes=5, num_iterations=6)
    torch.testing.assert_close((apart.nodes, apart.weights), (together.nodes, together.weights), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: density(matrix([math.nan, 1.0])), "not finite"),
        (lambda: density(matrix(), probes=0), "probes must be 1 or more"),
        (lambda: density(matrix(), probes=1, num_iterations=2).smoothed(torch.zeros(1), 0.0), "above 0"),
    ],
)
def test_invalid_density_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_seed_alone_determines_the_density():
    assert_determined_by_seed(lambda seed: density(matrix(), probes=2, num_iterations=5, seed=seed).nodes)
