"""Second derivatives of attention, compiled models and custom functions."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from known_hessians import DOUBLE, objective, tanh_net
from small_networks import SquareOnce
from torch import nn

from steppe.flatness import Hessian, Objective
from steppe.flatness._kernels import twice_differentiable


def old_weight_norm(module, dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module, dim=dim)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.inner(x).mean(1))


def test_attention_has_a_hessian():
    torch.manual_seed(0)
    net = Attention()
    x, y = torch.randn(6, 5, 8), torch.randint(3, (6,))
    hessian = Hessian(Objective(net, (x, y), loss=F.cross_entropy))
    v = torch.randn(1, hessian.n)
    exact = Hessian(Objective(net.double(), (x.double(), y), loss=F.cross_entropy))(v.double())
    torch.testing.assert_close(hessian(v).double(), exact, rtol=1e-3, atol=1e-5)


def test_backend_flags_are_restored_after_an_error():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), twice_differentiable(nn.Identity()):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_once_differentiable_function_raises():
    class Net(nn.Linear):
        def forward(self, x):
            return SquareOnce.apply(super().forward(x)).square().mean()

    o = Objective(Net(2, 2), (torch.ones(3, 2), torch.ones(3)), loss=lambda loss, _: loss)
    o.gradient()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        Hessian(o)(torch.ones(1, o.n))


@pytest.mark.parametrize("norm", [torch.nn.utils.parametrizations.weight_norm, old_weight_norm])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_hessian_of_weight_norm_is_the_derivative_of_its_gradient(norm, dim):
    torch.manual_seed(0)
    net = nn.Sequential(norm(nn.Linear(3, 4), dim=dim), nn.Tanh(), norm(nn.Linear(4, 2), dim=dim)).double()
    o = Objective(net, (torch.randn(16, 3).double(), torch.randint(2, (16,))), loss=F.cross_entropy)
    steps = 1e-5 * torch.eye(o.n, dtype=DOUBLE)
    differences = torch.stack([(o.gradient(e)[1] - o.gradient(-e)[1]) / 2e-5 for e in steps])
    torch.testing.assert_close(Hessian(o)(torch.eye(o.n, dtype=DOUBLE)), differences, rtol=1e-6, atol=1e-7)


def test_compiled_model_has_a_hessian():
    net = tanh_net()
    expected = Hessian(objective(net))(torch.ones(1, objective(net).n, dtype=DOUBLE))
    net.compile(backend="eager")
    torch.testing.assert_close(Hessian(objective(net))(torch.ones(1, objective(net).n, dtype=DOUBLE)), expected)
