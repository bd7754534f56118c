"""The edges of stability against steps of gradient descent and SAM on a parabola."""

import math

import pytest
import torch

import steppe
from steppe.flatness import edge_of_stability, sam_edge_of_stability


def grows(curvature, lr, rho):
    """Return True if a step of SAM on a parabola, from a gradient of 1, increases the gradient."""
    w = torch.nn.Parameter(torch.tensor([1 / curvature], dtype=torch.float64))
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=lr), rho=rho)
    for sam_pass in optimizer.passes():
        with sam_pass:
            (curvature / 2 * w.square().sum()).backward()
    optimizer.step()
    return abs(float(w.detach())) * curvature > 1


@pytest.mark.parametrize("rho", [0.0, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_gradient_shrinks_below_the_edge_and_grows_above(lr, rho):
    edge = sam_edge_of_stability(lr, rho, gradient_norm=1.0)
    assert not grows(edge * 0.999, lr, rho)
    assert grows(edge * 1.001, lr, rho)


@pytest.mark.parametrize(("lr", "rho", "norm"), [(0.1, 0.05, 1.0), (0.01, 0.5, 3.0), (1.0, 2.0, 0.01)])
def test_sam_edge_equals_the_formula_of_the_paper(lr, rho, norm):
    printed = norm / (2 * rho) * (math.sqrt(1 + 8 * rho / (lr * norm)) - 1)
    assert sam_edge_of_stability(lr, rho, norm) == pytest.approx(printed, rel=1e-12)


def test_limits_of_the_edges():
    assert edge_of_stability(0.1) == sam_edge_of_stability(0.1, 0.0, 0.0) == 20.0
    assert sam_edge_of_stability(0.1, 1e-17, 1.0) == pytest.approx(20.0, rel=1e-11)  # the printed formula: 22.2
    assert sam_edge_of_stability(0.1, 0.05, 0.0) == 0.0
    assert sam_edge_of_stability(0.1, 0.05, 1e-320) == pytest.approx(0.0, abs=1e-100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.1, 1.0), "lr must be finite and more than 0"),
        ((math.nan, 0.1, 1.0), "lr must be finite and more than 0, got nan"),
        ((0.1, -0.1, 1.0), "rho must be finite and not negative"),
        ((0.1, 0.1, math.nan), "gradient_norm must be finite"),
    ],
)
def test_invalid_stability_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        sam_edge_of_stability(*arguments)
    if "lr" in message:
        with pytest.raises(ValueError, match=message):
            edge_of_stability(arguments[0])
