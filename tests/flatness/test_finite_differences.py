"""The Hessian by finite differences: its error against exact products, and models without second derivatives."""

import pytest
import torch
from known_hessians import DOUBLE, dense_hessian, net_and_dense, objective, quadratic, samples, tanh_net
from small_networks import SquareOnce, Squares
from torch import nn

from steppe.flatness import FiniteDifferenceHessian, Hessian, Objective, eigenvalues


def error(found, expected):
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


def test_products_are_within_the_error_that_is_stated():
    exact, dense = net_and_dense()
    hessian = FiniteDifferenceHessian(exact.objective)
    vectors = torch.randn(4, hessian.n, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    true = error(hessian(vectors), vectors @ dense)
    assert true.max() < 1e-8
    assert (true <= hessian.relative_error(vectors)).all()
    assert hessian.relative_error(vectors).max() < 1e-7


@pytest.mark.parametrize("step", [1e-2, 1e-1])
def test_error_grows_with_the_square_of_the_step_and_a_third_of_the_estimate_is_the_error(step):
    exact, dense = net_and_dense()
    vectors = torch.randn(3, exact.n, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    hessian = FiniteDifferenceHessian(exact.objective, step=step)
    true = error(hessian(vectors), vectors @ dense)
    torch.testing.assert_close(hessian.relative_error(vectors) / 3, true, rtol=0.05, atol=0)
    coarser = FiniteDifferenceHessian(exact.objective, step=2 * step)
    torch.testing.assert_close(
        error(coarser(vectors), vectors @ dense) / true, torch.full_like(true, 4), rtol=0.1, atol=0
    )


def test_float32_has_three_digits_and_states_its_error():
    net, (x, y) = tanh_net(), samples()
    dense = dense_hessian(net, x, y)
    o = objective(net.float(), (x.float(), y))
    hessian = FiniteDifferenceHessian(o)
    vectors = torch.randn(4, hessian.n, generator=torch.Generator().manual_seed(0))
    true = error(hessian(vectors).double(), vectors.double() @ dense)
    assert true.max() < 1e-3
    assert (hessian.relative_error(vectors) > true / 3).all()


def test_length_of_the_vector_does_not_matter_and_zero_stays_zero():
    exact, dense = net_and_dense()
    v = torch.randn(1, exact.n, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat([1e-12 * v, 1e12 * v, 0 * v])
    found = FiniteDifferenceHessian(exact.objective)(vectors)
    assert error(found[:2], vectors[:2] @ dense).max() < 1e-8
    assert torch.equal(found[2], torch.zeros(exact.n, dtype=DOUBLE))


def test_quadratic_at_zero_weights():
    a = torch.diag(torch.tensor([1.0, -2.0], dtype=DOUBLE))
    torch.testing.assert_close(FiniteDifferenceHessian(quadratic(a))(torch.eye(2, dtype=DOUBLE)), a)


def test_model_without_second_derivatives():
    fused, plain = (objective(Squares(f)) for f in (SquareOnce.apply, torch.square))
    with pytest.raises(RuntimeError, match="FiniteDifferenceHessian"):
        Hessian(fused)(torch.ones(1, fused.n, dtype=DOUBLE))
    found, expected = (eigenvalues(op, 2) for op in (FiniteDifferenceHessian(fused), Hessian(plain)))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan")])
def test_step_that_is_not_positive_raises(step):
    with pytest.raises(ValueError, match="must be positive"):
        FiniteDifferenceHessian(Objective(tanh_net(), samples(), loss=nn.functional.cross_entropy), step=step)
