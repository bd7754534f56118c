"""The objective: one mean over the samples, however they are cut, and a model that nothing happens to."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import DOUBLE, Quadratic, dense_hessian, objective, quadratic, samples, tanh_net
from torch import nn

from steppe.flatness import Hessian, Objective
from steppe.flatness.kernels import twice_differentiable


def normed(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    net[1].running_mean.uniform_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net


def test_loss_and_gradient_are_those_of_all_samples_at_once():
    net, (x, y) = tanh_net(), samples()
    whole = F.cross_entropy(net(x), y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(whole, list(net.parameters()))])
    ragged = [(x[:13], y[:13]), (x[13:14], y[13:14]), (x[14:], y[14:])]  # a mean of means would be 20 % off
    for data in (ragged, samples()):
        loss, found = objective(net, data, batch_size=7).gradient()
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(objective(net, data, batch_size=7).loss(), whole.detach(), rtol=1e-12, atol=0)


def test_products_are_those_of_the_dense_hessian():
    net, (x, y) = tanh_net(), samples()
    dense = dense_hessian(net, x, y)
    for batch_size in (256, 7):  # one batch, whose graph is kept, and three
        hessian = Hessian(objective(net, batch_size=batch_size))
        vectors = torch.randn(3, hessian.n, dtype=DOUBLE)
        for _ in range(2):
            torch.testing.assert_close(hessian(vectors), vectors @ dense, rtol=1e-10, atol=1e-13)


def test_a_kept_graph_is_made_anew_when_the_weights_have_changed():
    net, (x, y) = tanh_net(), samples()
    hessian = Hessian(objective(net))
    v = torch.randn(1, hessian.n, dtype=DOUBLE)
    hessian(v)
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    torch.testing.assert_close(hessian(v), v @ dense_hessian(net, x, y), rtol=1e-10, atol=1e-13)


def test_at_a_displacement():
    net = tanh_net()
    e = torch.randn(objective(net).n, dtype=DOUBLE)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(moved.parameters()) + e, moved.parameters())
    loss, gradient = objective(net).gradient(e)
    there, expected = objective(moved).gradient()
    torch.testing.assert_close((loss, gradient), (there, expected), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(objective(net).loss(e), there, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_nothing_of_the_model_changes(batch_norm):
    net = normed().train()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = copy.deepcopy(net.state_dict())
    places = [(t.data_ptr(), t._version) for t in net.state_dict().values()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    o = objective(net, batch_norm=batch_norm, batch_size=7)
    o.loss(torch.ones(o.n))
    o.gradient()
    Hessian(o)(torch.ones(1, o.n, dtype=DOUBLE))
    o.statistics()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    assert places == [(t.data_ptr(), t._version) for t in net.state_dict().values()]
    assert all(m.training for m in net.modules())
    assert net[1].momentum == 0.1
    assert [p.grad is None for p in net.parameters()] == [False, *[True] * 5]
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))


def test_a_loader_leaves_the_generators_alone_and_shuffles_alike():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), batch_size=8, shuffle=True)
    o = objective(tanh_net(), loader)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = o.loss(), o.loss()
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, second)


def test_modes_come_back_after_an_exception():
    net = normed().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        objective(net, (torch.zeros(2, 5, dtype=DOUBLE), torch.zeros(2, dtype=torch.int64))).loss()
    assert all(m.training for m in net.modules())


def test_batch_norm_in_both_modes():
    net, (x, y) = normed(), samples()
    net.eval()
    torch.testing.assert_close(objective(net).loss(), F.cross_entropy(net(x), y).detach(), rtol=1e-12, atol=0)
    net[1].train()  # and dropout still off
    trained = F.cross_entropy(net(x), y).detach()
    torch.testing.assert_close(objective(normed(), batch_norm="train").loss(), trained, rtol=1e-12, atol=0)
    hessian = Hessian(objective(normed(), batch_norm="train"))
    v, u = torch.randn(2, hessian.n, dtype=DOUBLE)
    torch.testing.assert_close(u @ hessian(v[None])[0], v @ hessian(u[None])[0], rtol=1e-10, atol=1e-13)


def test_statistics_are_the_mean_of_the_batches():
    net, (x, _) = normed(), samples()
    found = objective(net, batch_size=10).statistics()
    inputs = net[0](x).detach()
    means = torch.stack([part.mean(0) for part in inputs.split(10)]).mean(0)
    torch.testing.assert_close(found["1.running_mean"], means, rtol=1e-12, atol=1e-14)
    variances = torch.stack([part.var(0) for part in inputs.split(10)]).mean(0)
    torch.testing.assert_close(found["1.running_var"], variances, rtol=1e-12, atol=1e-14)
    o = objective(net)
    net[1].running_mean.copy_(found["1.running_mean"])
    net[1].running_var.copy_(found["1.running_var"])
    with_theirs = objective(normed()).loss(buffers=found)
    torch.testing.assert_close(with_theirs, o.loss(), rtol=1e-12, atol=0)


def test_given_buffers_are_left_as_they_are():
    net = normed()
    before = copy.deepcopy(net.state_dict())
    objective(net, batch_norm="train").loss(buffers=dict(net.named_buffers()))
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_inside_inference_mode():
    net = normed()
    expected = objective(net).gradient(), objective(net).statistics()
    with torch.inference_mode():
        o = objective(net)
        torch.testing.assert_close((o.gradient(), o.statistics()), expected)


def test_half_precision_is_measured_in_float32():
    net = normed().to(torch.bfloat16)
    o = objective(net, (samples()[0].bfloat16(), samples()[1]))
    assert o.dtype == torch.float32
    wide = copy.deepcopy(net).float()
    expected = objective(wide, (samples()[0].bfloat16().float(), samples()[1])).loss()
    torch.testing.assert_close(o.loss(), expected, rtol=1e-7, atol=0)
    assert net[0].weight.dtype == torch.bfloat16


def test_batches_of_any_form():
    net, (x, y) = tanh_net(), samples()
    batches = [{"x": x[:8], "y": y[:8]}, {"x": x[8:], "y": y[8:]}]
    o = Objective(net, batches, evaluate=lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]))
    torch.testing.assert_close(o.loss(), F.cross_entropy(net(x), y).detach(), rtol=1e-12, atol=0)
    assert o.samples == 20


def test_a_size_of_its_own():
    net, (x, y) = tanh_net(), samples()
    y = y.clone()
    y[[0, 1, 2, 3, 9]] = -100  # cross_entropy's mean leaves these out
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    o = objective(net, batches, size=lambda batch: int((batch[1] != -100).sum()))
    torch.testing.assert_close(o.loss(), F.cross_entropy(net(x), y).detach(), rtol=1e-12, atol=0)
    assert o.samples == 15


def test_parts_average_to_the_whole():
    o = objective(tanh_net(), batch_size=10)
    parts = list(o.apart(5))
    assert len(parts) == 4
    torch.testing.assert_close(sum(p.loss() for p in parts) / 4, o.loss(), rtol=1e-12, atol=0)
    assert [p.samples for p in o.apart(7)] == [7, 3, 7, 3]


def test_some_of_the_parameters():
    net, (x, y) = tanh_net(), samples()
    o = objective(net, parameters=["4.weight"])
    assert o.names == ["4.weight"]
    expected = torch.autograd.grad(F.cross_entropy(net(x), y), net[4].weight)[0].reshape(-1)
    torch.testing.assert_close(o.gradient()[1], expected, rtol=1e-10, atol=1e-14)
    net[0].requires_grad_(False)
    assert objective(net).names == ["2.weight", "2.bias", "4.weight", "4.bias"]


def test_tied_parameters_are_moved_once():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    net[2].weight = net[0].weight
    data = torch.randn(5, 3, dtype=DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    o = Objective(net, data, loss=F.mse_loss)
    assert o.n == 9
    e = torch.randn(9, dtype=DOUBLE)
    both = (net[0].weight + e.view(3, 3)).detach()
    expected = F.mse_loss(torch.tanh(data[0] @ both.T) @ both.T, data[1])
    torch.testing.assert_close(o.loss(e), expected, rtol=1e-12, atol=0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.inner(x).mean(1))


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    net = Attention()
    x, y = torch.randn(6, 5, 8), torch.randint(3, (6,))
    hessian = Hessian(Objective(net, (x, y), loss=F.cross_entropy))
    v = torch.randn(1, hessian.n)
    exact = Hessian(Objective(net.double(), (x.double(), y), loss=F.cross_entropy))(v.double())
    torch.testing.assert_close(hessian(v).double(), exact, rtol=1e-3, atol=1e-5)


def test_what_torch_is_set_to_comes_back():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), twice_differentiable(nn.Identity()):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled() == before


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_an_operation_without_a_second_derivative_is_named():
    class Net(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x)).square().mean()

    o = Objective(Net(2, 2), (torch.ones(3, 2), torch.ones(3)), loss=lambda loss, _: loss)
    o.gradient()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        Hessian(o)(torch.ones(1, o.n))


def test_a_compiled_model_is_measured():
    net = tanh_net()
    expected = Hessian(objective(net))(torch.ones(1, objective(net).n, dtype=DOUBLE))
    net.compile(backend="eager")
    torch.testing.assert_close(Hessian(objective(net))(torch.ones(1, objective(net).n, dtype=DOUBLE)), expected)


def test_a_linear_loss_has_no_curvature():
    o = Objective(nn.Linear(2, 1), (torch.ones(3, 2), torch.ones(3)), loss=lambda out, y: out.mean())
    assert torch.equal(Hessian(o)(torch.ones(2, 3)), torch.zeros(2, 3))


def test_other_data_in_the_next_pass_is_refused():
    class Augmented(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(x.flip(1) if self.passes == 2 else x, y) for x, y in list.__iter__(self)])

    o = objective(tanh_net(), Augmented([samples()]))
    o.loss()
    with pytest.raises(ValueError, match="or others"):
        o.loss()


def test_shuffled_batches_are_the_same_data():
    class Shuffled(list):
        def __iter__(self):
            x, y = self[0]
            order = torch.randperm(len(x))
            return iter([(x[order[:9]], y[order[:9]]), (x[order[9:]], y[order[9:]])])

    o = objective(tanh_net(), Shuffled([samples()]))
    first, second = o.loss(), o.loss()
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Objective(tanh_net(), samples()), ValueError, "one of two"),
        (lambda: objective(tanh_net(), iter([samples()])), TypeError, "once only"),
        (lambda: objective(tanh_net(), (samples()[0], samples(19)[1])), ValueError, "one length"),
        (lambda: objective(tanh_net(), batch_norm="off"), ValueError, "choose 'eval'"),
        (lambda: objective(tanh_net(), parameters=["5.weight"]), ValueError, "5.weight is none of Sequential's"),
        (lambda: objective(tanh_net().requires_grad_(False)), ValueError, "no parameter that requires"),
        (lambda: objective(nn.Linear(4, 3, dtype=torch.complex64)), TypeError, "complex64"),
        (lambda: objective(tanh_net(), batch_size=0), ValueError, "at least one sample"),
        (lambda: objective(tanh_net(), []).loss(), ValueError, "no samples"),
        (lambda: objective(tanh_net(), [samples()[0]]).loss(), TypeError, "say evaluate="),
        (lambda: objective(tanh_net(), [{"n": 1}]).loss(), TypeError, "say size="),
        (lambda: objective(tanh_net()).loss(torch.ones(3)), ValueError, "shape"),
        (lambda: list(objective(tanh_net()).apart(0)), ValueError, "at least one"),
        (
            lambda: Objective(
                tanh_net(), samples(), loss=lambda out, y: F.cross_entropy(out, y, reduction="none")
            ).loss(),
            ValueError,
            "its mean is needed",
        ),
    ],
)
def test_errors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_progress_is_told_of_every_pass():
    told = []
    o = objective(tanh_net(), batch_size=7, progress=lambda stage, passes: told.append((stage, passes)))
    o.stage = "gradient"
    o.gradient()
    o.gradient()
    assert told == [("gradient", 1), ("gradient", 2)]


def test_a_quadratic_is_what_it_says():
    a = torch.diag(torch.tensor([1.0, -2.0], dtype=DOUBLE))
    o = quadratic(a, w=torch.tensor([1.0, 1.0], dtype=DOUBLE))
    assert isinstance(o.model, Quadratic)
    assert o.loss() == -0.5
    assert torch.equal(Hessian(o)(torch.eye(2, dtype=DOUBLE)), a)
