"""Batch sharpness against its definition with dense Hessians, and its error."""

import math

import pytest
import torch
import torch.nn.functional as F
from known_hessians import dense_hessian, matrix_with_spectrum, objective, quadratic, samples, tanh_net
from torch import nn

from steppe.flatness import Objective, batch_sharpness, eigenvalues
from steppe.flatness.operators import Hessian


def terms(net, x, y):
    """Return g'Hg and |g|^2 of a batch."""
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))])
    return float(g @ dense_hessian(net, x, y) @ g), float(g @ g)


@pytest.mark.parametrize("m", [1, 4, 6, 20])
def test_quotient_is_that_of_the_definition(m):
    net, (x, y) = tanh_net(), samples()
    parts = [(terms(net, a, b), len(a)) for a, b in zip(x.split(m), y.split(m), strict=True)]
    expected = sum(n * c for (c, _), n in parts) / sum(n * s for (_, s), n in parts)
    found = batch_sharpness(objective(net), m)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.n == len(parts)
    first = batch_sharpness(objective(net), m, parts=1)
    assert first.value == pytest.approx(parts[0][0][0] / parts[0][0][1], rel=1e-9)


def test_full_batch_is_the_curvature_along_the_gradient():
    a = matrix_with_spectrum([1.0, 2.0, 7.0])
    b = torch.linalg.eigh(a)[1][:, 2]
    found = batch_sharpness(quadratic(a, b), m=1)
    assert found.value == pytest.approx(7.0, rel=1e-9)
    assert math.isnan(found.error)


def test_small_batches_are_sharper_than_the_full_batch_can_be():
    net = tanh_net()
    top = float(eigenvalues(Hessian(objective(net))).values[0])
    assert batch_sharpness(objective(net), 1).value > 1.2 * top


@pytest.mark.slow
def test_error_covers_the_differences_between_samples_of_the_data():
    torch.manual_seed(0)
    net = tanh_net()
    x, y = samples(1600, seed=3)
    true = batch_sharpness(objective(net, (x, y)), 5).value
    few = [batch_sharpness(objective(net, (x[i : i + 80], y[i : i + 80])), 5) for i in range(0, 1600, 80)]
    spread = torch.tensor([f.value for f in few]).std()
    mean_error = torch.tensor([f.error for f in few]).mean()
    assert 0.6 < spread / mean_error < 1.7
    assert sum(abs(f.value - true) < 2 * f.error for f in few) >= 16


@pytest.mark.parametrize(
    ("options", "message"), [({"m": 0}, "m must be 1 or more"), ({"m": 1, "parts": 0}, "parts must be 1 or more")]
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        batch_sharpness(objective(tanh_net()), **options)


def test_gradients_of_zero_raise():
    o = Objective(nn.Linear(1, 1), (torch.ones(2, 1), torch.ones(2, 1)), loss=lambda out, y: 0 * out.sum())
    with pytest.raises(ValueError, match="gradients of all batches are zero"):
        batch_sharpness(o, 1)
