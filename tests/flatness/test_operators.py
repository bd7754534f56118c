"""Products with the Hessian, its adaptive form and its blocks against dense matrices."""

import pytest
import torch
from known_hessians import (
    DOUBLE,
    Quadratic,
    dense_hessian,
    net_and_dense,
    objective,
    quadratic,
    relu_net,
    rescaled,
    samples,
    tanh_net,
)
from torch import nn

from steppe.flatness import Block, Hessian, Objective, Scaled, eigenvalues


def test_products_equal_those_of_the_dense_hessian():
    net, (x, y) = tanh_net(), samples()
    dense = dense_hessian(net, x, y)
    for batch_size in (256, 7):  # one batch, whose graph is kept, and three batches
        hessian = Hessian(objective(net, batch_size=batch_size))
        vectors = torch.randn(3, hessian.n, dtype=DOUBLE)
        for _ in range(2):
            torch.testing.assert_close(hessian(vectors), vectors @ dense, rtol=1e-10, atol=1e-13)


def test_hessian_of_a_quadratic_is_its_matrix():
    a = torch.diag(torch.tensor([1.0, -2.0], dtype=DOUBLE))
    o = quadratic(a, w=torch.tensor([1.0, 1.0], dtype=DOUBLE))
    assert isinstance(o.model, Quadratic)
    assert o.loss() == -0.5
    assert torch.equal(Hessian(o)(torch.eye(2, dtype=DOUBLE)), a)


def test_kept_graph_is_rebuilt_after_a_change_of_weights():
    net, (x, y) = tanh_net(), samples()
    hessian = Hessian(objective(net))
    v = torch.randn(1, hessian.n, dtype=DOUBLE)
    hessian(v)
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    torch.testing.assert_close(hessian(v), v @ dense_hessian(net, x, y), rtol=1e-10, atol=1e-13)


def test_hessian_of_a_linear_loss_is_zero():
    o = Objective(nn.Linear(2, 1), (torch.ones(3, 2), torch.ones(3)), loss=lambda out, y: out.mean())
    assert torch.equal(Hessian(o)(torch.ones(2, 3)), torch.zeros(2, 3))


def test_rescaling_changes_the_hessian_but_not_its_adaptive_form():
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


def test_block_of_the_hessian():
    hessian, dense = net_and_dense()
    which = torch.zeros(hessian.n, dtype=torch.bool)
    which[5:9] = True
    torch.testing.assert_close(
        Block(hessian, which)(torch.eye(4, dtype=DOUBLE)), dense[5:9, 5:9], rtol=1e-9, atol=1e-13
    )
