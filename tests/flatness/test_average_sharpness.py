"""Average-case sharpness against the trace, its limit for a smooth loss, and against Gaussian integrals."""

import math

import pytest
import torch
from known_hessians import (
    DOUBLE,
    dense_hessian,
    matrix_with_spectrum,
    objective,
    quadratic,
    relu_net,
    rescaled,
    samples,
    tanh_net,
)

from steppe.flatness import average_sharpness

SPECTRUM = [-0.5, 0.0, 0.1, 1.0, 2.0, 7.0]


@pytest.mark.parametrize(
    ("options", "eta"), [({}, None), ({"adaptive": True}, 0.0), ({"adaptive": True, "eta": 0.1}, 0.1)]
)
def test_small_perturbations_estimate_half_sigma_squared_times_the_trace(options, eta):
    net = tanh_net()
    problem, dense = objective(net), dense_hessian(net, *samples())
    scale = torch.ones(problem.n, dtype=DOUBLE) if eta is None else problem.weights.abs() + eta
    expected = 1e-3**2 / 2 * float((scale.square() * dense.diagonal()).sum())
    found = average_sharpness(problem, 1e-3, pairs=200, **options)
    assert found.value == pytest.approx(expected, abs=3 * found.error)
    assert 0 < found.error < 0.1 * expected
    assert found.n == 200


@pytest.mark.slow
def test_standard_error_covers_the_exact_mean():
    a, b = matrix_with_spectrum(SPECTRUM), torch.full((6,), 3.0, dtype=DOUBLE)
    exact, hits = 0.7**2 / 2 * sum(SPECTRUM), 0
    for seed in range(25):
        found = average_sharpness(quadratic(a, b), 0.7, pairs=50, seed=seed)
        hits += abs(found.value - exact) < 2.01 * found.error
    assert 20 <= hits <= 25, "of 25 intervals of 95 %"


def test_pairs_cancel_the_gradient():
    found = average_sharpness(quadratic(torch.zeros(6, 6, dtype=DOUBLE), torch.full((6,), 3.0, dtype=DOUBLE)), 0.7)
    assert abs(found.value) < 1e-15


def test_rescaling_a_relu_network_changes_only_the_nonadaptive_value():
    plain, other = objective(relu_net()), objective(rescaled(relu_net(), 8.0))
    assert average_sharpness(other, 0.1).value > 3 * average_sharpness(plain, 0.1).value
    a, b = (average_sharpness(p, 0.3, adaptive=True) for p in (plain, other))
    assert (a.value, a.error) == pytest.approx((b.value, b.error), rel=1e-9)


def test_each_pair_costs_two_passes_and_the_seed_determines_the_result():
    net = tanh_net()
    before, generator = [p.clone() for p in net.parameters()], torch.get_rng_state()
    problem = objective(net)
    first = average_sharpness(problem, 0.1, pairs=5)
    assert problem.passes == 1 + 2 * 5
    assert first == average_sharpness(problem, 0.1, pairs=5)
    assert first != average_sharpness(problem, 0.1, pairs=5, seed=1)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(net.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_infinite_losses_give_infinity_and_nan_at_the_weights_raises():
    a = torch.full((2, 2), math.inf, dtype=DOUBLE)
    with pytest.raises(FloatingPointError, match="at the weights themselves is nan"):
        average_sharpness(quadratic(a), 0.1)
    huge = quadratic(torch.eye(2, dtype=DOUBLE) * 1e308)
    assert average_sharpness(huge, 100.0, pairs=4).value == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma must be finite and more than 0"),
        ({"sigma": math.inf}, "sigma must be finite and more than 0, got inf"),
        ({"pairs": 0}, "pairs must be 1 or more, got 0"),
        ({"eta": 0.1}, "eta=0.1 has no effect"),
    ],
)
def test_invalid_average_sharpness_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        average_sharpness(objective(tanh_net()), **{"sigma": 0.1, **options})
