"""Products with the Hessian, its adaptive form and its blocks against dense matrices."""

import pytest
import torch
import torch.nn.functional as F
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

from steppe.flatness import (
    Block,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Objective,
    Scaled,
    eigenvalues,
    round_weights,
    trace,
)


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


def fused_step(net):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    F.cross_entropy(net(samples()[0]), samples()[1]).backward()
    optimizer.step()


def multiply_in_place(net):
    with torch.no_grad():
        net[3].weight.mul_(1.5)


def write_data(net):
    net[3].weight.data.mul_(1.5)


def write_vector(net):
    nn.utils.vector_to_parameters(1.5 * nn.utils.parameters_to_vector(net.parameters()), net.parameters())


def round_within_a_block(net):
    block = round_weights(net, 2)
    block.__enter__()
    return block


def update_statistics(net):
    net.train()(3.0 + samples()[0])


def change_another_parameter(net):
    net[0].weight.data.add_(0.5)


def exchange_parameters(net):
    other = {name: tensor + 0.5 for name, tensor in net.state_dict().items()}
    net.load_state_dict(other, assign=True)


CHANGES = [
    *(fused_step, multiply_in_place, write_data, write_vector, round_within_a_block, update_statistics),
    *(change_another_parameter, exchange_parameters),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("matrix", [Hessian, GaussNewton, EmpiricalFisher])
def test_kept_matrix_is_that_of_the_model_now_whatever_has_changed_it(change, matrix):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    o = objective(net, parameters=["1.weight", "3.weight", "3.bias"])
    kept, identity = matrix(o), torch.eye(o.n, dtype=DOUBLE)
    before = kept(identity)
    block = change(net)
    found = kept(identity)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, matrix(objective(net, parameters=o.names))(identity), rtol=1e-12, atol=1e-15)
    if block is not None:
        block.__exit__(None, None, None)
        torch.testing.assert_close(kept(identity), before, rtol=1e-12, atol=1e-15)


def test_graph_of_a_single_batch_is_built_once_for_all_products_at_the_same_weights(monkeypatch):
    built = []
    build = Hessian._build_product
    monkeypatch.setattr(Hessian, "_build_product", lambda self, batch: built.append(batch) or build(self, batch))
    hessian = Hessian(objective(tanh_net()))
    eigenvalues(hessian)
    trace(hessian, probes=2)
    assert len(built) == 1
    hessian.free_graph()
    hessian(torch.zeros(1, hessian.n, dtype=DOUBLE))
    assert len(built) == 2


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


class Scaled3(nn.Module):
    """A network whose outputs are multiplied by what is in attributes."""

    def __init__(self):
        super().__init__()
        self.net, self.factor, self.factors, self.tensor = tanh_net(), 1.0, [1.0, 2.0], torch.ones(3, dtype=DOUBLE)

    def forward(self, x):
        return self.net(x) * self.factor * self.factors[0] * self.tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "factor", 5.0),
        lambda model: model.factors.__setitem__(0, 5.0),
        lambda model: model.tensor.mul_(5.0),
        lambda model: model.net.__setitem__(1, nn.ReLU()),
        lambda model: model.net.register_forward_hook(lambda module, args, outputs: outputs * 5.0),
    ],
    ids=["number", "list", "tensor", "module", "hook"],
)
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_kept_matrix_is_that_of_the_model_after_a_change_of_anything_in_it(kind, change):
    model = Scaled3()
    o = objective(model)
    kept, v = kind(o), torch.ones(1, o.n, dtype=DOUBLE)
    before = kept(v)
    assert torch.equal(kept(v), before)
    change(model)
    after = kept(v)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, kind(o)(v), rtol=1e-12, atol=1e-12)
