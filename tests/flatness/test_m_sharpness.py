"""m-sharpness against the exact maxima of its parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from known_hessians import DOUBLE, exact_maximum, objective, tanh_net
from torch import nn

from steppe.flatness import Estimate, Objective, m_sharpness, sharpness


class LinearRegression(nn.Module):
    """A linear regression, in which each sample has its own quadratic loss."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=DOUBLE))

    def forward(self, x):
        return x @ self.w


def regression(n=7, batch_size=100):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(n, 3, dtype=DOUBLE, generator=generator), torch.randn(n, dtype=DOUBLE, generator=generator)
    return x, y, Objective(LinearRegression(), (x, y), loss=F.mse_loss, batch_size=batch_size)


def exact_sharpness(x, y, rho):
    return exact_maximum(2 * x.T @ x / len(x), 2 * x.T @ (x @ LinearRegression().w.detach() - y) / len(x), rho)


def test_m_sharpness_is_the_mean_of_exact_maxima_of_the_parts():
    x, y, problem = regression()
    found = m_sharpness(problem, 0.4, 3, ascent_steps=100)
    own = torch.tensor([exact_sharpness(a, b, 0.4) for a, b in zip(x.split(3), y.split(3), strict=True)], dtype=DOUBLE)
    sizes = torch.tensor([3.0, 3.0, 1.0], dtype=DOUBLE) / 7
    mean = (own * sizes).sum()
    assert found.value == pytest.approx(float(mean), rel=1e-6)
    assert found.error == pytest.approx(float(((sizes * (own - mean)).square().sum() * 3 / 2).sqrt()), rel=1e-4)
    assert (found.n, found.samples) == (3, 7)
    assert found.value > exact_sharpness(x, y, 0.4)


def test_parts_of_equal_size_have_the_usual_standard_error():
    x, y, problem = regression(6)
    found = m_sharpness(problem, 0.4, 2, ascent_steps=1, restarts=1)
    parts = [Objective(LinearRegression(), part, loss=F.mse_loss) for part in zip(x.split(2), y.split(2), strict=True)]
    usual = Estimate.of([sharpness(part, 0.4, ascent_steps=1).one_step for part in parts])
    assert (found.one_step.value, found.one_step.error) == pytest.approx((usual.value, usual.error), rel=1e-12)
    assert (found.value, found.error) == (found.one_step.value, found.one_step.error)


def test_m_sharpness_of_all_samples_in_one_part_is_sharpness():
    problem = objective(tanh_net())
    for options in ({}, {"adaptive": True, "eta": 0.1}, {"norm": "linf", "seed": 3}):
        found, whole = m_sharpness(problem, 0.2, 20, **options), sharpness(problem, 0.2, **options)
        assert (found.value, found.one_step.value) == (whole.value, whole.one_step)
        assert math.isnan(found.error)


def test_number_of_parts_selects_the_first_ones():
    x, y, problem = regression()
    found = m_sharpness(problem, 0.4, 2, parts=2)
    first = Objective(LinearRegression(), (x[:4], y[:4]), loss=F.mse_loss)
    assert found == m_sharpness(first, 0.4, 2)


@pytest.mark.parametrize(
    ("m", "options", "message"),
    [
        (0, {}, "m must be 1 or more"),
        (9, {}, r"m=9, but a batch has 8 samples .*batch_size="),
        (2, {"parts": 0}, "parts must be 1 or more"),
    ],
)
def test_invalid_m_sharpness_arguments_raise(m, options, message):
    with pytest.raises(ValueError, match=message):
        m_sharpness(objective(tanh_net(), batch_size=8), 0.1, m, **options)
