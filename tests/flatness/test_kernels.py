"""Second derivatives of attention, compiled models and custom functions."""

import pytest
import torch
import torch.nn.functional as F
from known_hessians import DOUBLE, objective, tanh_net
from small_networks import SquareOnce
from torch import nn

from steppe.flatness import Hessian, Objective
from steppe.flatness._kernels import twice_differentiable


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


def test_compiled_model_has_a_hessian():
    net = tanh_net()
    expected = Hessian(objective(net))(torch.ones(1, objective(net).n, dtype=DOUBLE))
    net.compile(backend="eager")
    torch.testing.assert_close(Hessian(objective(net))(torch.ones(1, objective(net).n, dtype=DOUBLE)), expected)
