"""The objective: a mean over samples that does not depend on the batches, and leaves the model unchanged."""

import copy
import random
from collections import Counter, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from known_hessians import DOUBLE, objective, samples, tanh_net
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from steppe.flatness import (
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Objective,
    after_rounding,
    batch_sharpness,
    by_layer,
    density,
    eigenvalues,
    m_sharpness,
    relative_flatness,
    sharpness,
    trace,
)


def normed(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    net[1].running_mean.uniform_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net


def test_loss_and_gradient_do_not_depend_on_the_batches():
    net, (x, y) = tanh_net(), samples()
    whole = F.cross_entropy(net(x), y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(whole, list(net.parameters()))])
    ragged = [(x[:13], y[:13]), (x[13:14], y[13:14]), (x[14:], y[14:])]  # a mean of means would be 20 % off
    for data in (ragged, samples()):
        loss, found = objective(net, data, batch_size=7).gradient()
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(objective(net, data, batch_size=7).loss(), whole.detach(), rtol=1e-12, atol=0)


def test_loss_and_gradient_at_perturbed_weights():
    net = tanh_net()
    e = torch.randn(objective(net).n, dtype=DOUBLE)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(moved.parameters()) + e, moved.parameters())
    loss, gradient = objective(net).gradient(e)
    there, expected = objective(moved).gradient()
    torch.testing.assert_close((loss, gradient), (there, expected), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(objective(net).loss(e), there, rtol=1e-12, atol=0)


def test_weights_cached_by_parametrize_are_not_used_at_other_weights():
    net, (x, _) = tanh_net(), samples()
    nn.utils.parametrizations.weight_norm(net[0])
    o = objective(net)
    e = torch.ones(o.n, dtype=DOUBLE)
    expected = o.gradient(), o.gradient(e), o.loss(e), after_rounding(o, 4).after
    with parametrize.cached():
        outputs = net(x)
        found = o.gradient(), o.gradient(e), o.loss(e), after_rounding(o, 4).after
        assert torch.equal(net(x), outputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_objective_leaves_the_model_unchanged(batch_norm):
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


def test_loader_shuffles_alike_and_leaves_generators_unchanged():
    loader = DataLoader(TensorDataset(*samples()), batch_size=8, shuffle=True)
    o = objective(tanh_net(), loader)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = o.loss(), o.loss()
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, second)


def test_modes_are_restored_after_an_exception():
    net = normed().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        objective(net, (torch.zeros(2, 5, dtype=DOUBLE), torch.zeros(2, dtype=torch.int64))).loss()
    assert all(m.training for m in net.modules())


def test_batch_norm_in_both_modes():
    net, (x, y) = normed(), samples()
    net.eval()
    torch.testing.assert_close(objective(net).loss(), F.cross_entropy(net(x), y).detach(), rtol=1e-12, atol=0)
    net[1].train()  # dropout stays off
    trained = F.cross_entropy(net(x), y).detach()
    torch.testing.assert_close(objective(normed(), batch_norm="train").loss(), trained, rtol=1e-12, atol=0)
    hessian = Hessian(objective(normed(), batch_norm="train"))
    v, u = torch.randn(2, hessian.n, dtype=DOUBLE)
    torch.testing.assert_close(u @ hessian(v[None])[0], v @ hessian(u[None])[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("sizes", [(10, 10), (18, 2), (3, 15, 2)], ids=str)
def test_statistics_are_the_mean_over_batches_weighted_by_their_samples(sizes):
    net, (x, y) = normed(), samples()
    found = objective(net, list(zip(x.split(sizes), y.split(sizes), strict=True))).statistics()
    parts, weights = net[0](x).detach().split(sizes), torch.tensor(sizes, dtype=DOUBLE)[:, None] / 20
    means = (torch.stack([part.mean(0) for part in parts]) * weights).sum(0)
    torch.testing.assert_close(found["1.running_mean"], means, rtol=1e-12, atol=1e-14)
    variances = (torch.stack([part.var(0) for part in parts]) * weights).sum(0)
    torch.testing.assert_close(found["1.running_var"], variances, rtol=1e-12, atol=1e-14)
    o = objective(net)
    net[1].running_mean.copy_(found["1.running_mean"])
    net[1].running_var.copy_(found["1.running_var"])
    with_theirs = objective(normed()).loss(buffers=found)
    torch.testing.assert_close(with_theirs, o.loss(), rtol=1e-12, atol=0)


def test_statistics_of_a_layer_that_runs_twice_are_those_of_both_inputs():
    net, (x, y) = normed(), samples()

    def evaluate(model, batch):
        return F.cross_entropy(model(torch.cat([batch[0][:1]] * 2)) + model(3.0 + batch[0]).sum(0), batch[1][:2])

    found = Objective(net, (x, y), evaluate=evaluate, size=len).statistics()["1.running_mean"]
    expected = (2 * net[0](x[:1]).mean(0) + 20 * net[0](3.0 + x).mean(0)) / 22
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_single_last_sample_joins_the_batch_before_it(batch_norm):
    net, data = normed(), samples(21)
    found = objective(net, data, batch_size=10, batch_norm=batch_norm)
    batches = [tuple(t[:10] for t in data), tuple(t[10:] for t in data)]
    expected = objective(net, batches, batch_norm=batch_norm)
    assert torch.equal(found.loss(), expected.loss())
    assert torch.equal(found.statistics()["1.running_var"], expected.statistics()["1.running_var"])
    assert objective(net, samples(1), batch_size=10).samples == 1


@pytest.mark.parametrize("of", [lambda o: o.statistics(), lambda o: o.loss()], ids=["statistics", "loss"])
def test_batch_of_one_sample_is_named_where_its_statistics_are_needed(of):
    x, y = samples(11)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    with pytest.raises(ValueError, match="batch 1, counted from 0, has a single value per channel"):
        of(objective(normed(), batches, batch_norm="train"))
    objective(normed(), batches).loss()  # running statistics are those of any batch


def test_passed_buffers_are_unchanged():
    net = normed()
    before = copy.deepcopy(net.state_dict())
    objective(net, batch_norm="train").loss(buffers=dict(net.named_buffers()))
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_objective_works_inside_inference_mode():
    net = normed()
    expected = objective(net).gradient(), objective(net).statistics()
    with torch.inference_mode():
        o = objective(net)
        torch.testing.assert_close((o.gradient(), o.statistics()), expected)


def test_parameters_that_were_exchanged_are_measured():
    net, other = normed(), normed(seed=1)
    o = objective(net)
    net.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(o.loss(), objective(other).loss())
    assert torch.equal(o.gradient()[1], objective(other).gradient()[1])
    assert torch.equal(o.weights, objective(other).weights)


def test_autocast_around_a_measurement_has_no_effect():
    def measured():
        net, (x, y) = normed().float(), samples()
        o = objective(net, (x.float(), y))
        hessian = Hessian(o)
        flat = relative_flatness(hessian, "4.weight", probes=2).value
        values = eigenvalues(hessian).values, trace(hessian, probes=2).value, density(hessian, probes=1).nodes
        return o.loss(), o.gradient(), values, flat, sharpness(o, 0.1, restarts=2).value

    expected = measured()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(measured(), expected, rtol=0, atol=0)


def test_autocast_of_the_loss_itself_has_its_effect():
    def evaluate(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch[0])
        assert outputs.dtype == torch.bfloat16
        return F.cross_entropy(outputs, batch[1])

    net, (x, y) = normed().float(), samples()
    exact = objective(net, (x.float(), y)).loss()
    assert 0 < abs(Objective(net, (x.float(), y), evaluate=evaluate).loss() - exact) < 0.1


class Caching(nn.Module):
    """Keeps what it has computed in its attributes, as rotary embeddings and torch's old weight_norm do."""

    def __init__(self):
        super().__init__()
        self.scale, self.length, self.table = nn.Parameter(torch.ones(3, dtype=DOUBLE)), 0, None

    def forward(self, x):
        if self.length < len(x):
            self.length, self.table = len(x), torch.ones(len(x), 3, dtype=DOUBLE)
        self.last = x * self.scale * self.table[: len(x)]
        return self.last


def test_attributes_that_a_forward_assigns_are_those_of_the_model_itself():
    net, (x, _) = tanh_net(), samples()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net[0])
    net.append(Caching())
    net[0](x)
    weight = net[0].weight
    o = objective(net)
    o.loss(torch.ones(o.n))
    Hessian(o)(torch.ones(1, o.n, dtype=DOUBLE))
    assert net[0].weight is weight
    assert (net[5].length, net[5].table, hasattr(net[5], "last")) == (0, None, False)
    net(x)


def test_half_precision_weights_are_measured_in_float32():
    net = normed().to(torch.bfloat16)
    o = objective(net, (samples()[0].bfloat16(), samples()[1]))
    assert o.dtype == torch.float32
    wide = copy.deepcopy(net).float()
    expected = objective(wide, (samples()[0].bfloat16().float(), samples()[1])).loss()
    torch.testing.assert_close(o.loss(), expected, rtol=1e-7, atol=0)
    assert net[0].weight.dtype == torch.bfloat16


def test_objective_of_selected_parameters():
    net, (x, y) = tanh_net(), samples()
    o = objective(net, parameters=["4.weight"])
    assert o.names == ["4.weight"]
    expected = torch.autograd.grad(F.cross_entropy(net(x), y), net[4].weight)[0].reshape(-1)
    torch.testing.assert_close(o.gradient()[1], expected, rtol=1e-10, atol=1e-14)
    net[0].requires_grad_(False)
    assert objective(net).names == ["2.weight", "2.bias", "4.weight", "4.bias"]


def test_tied_parameters_are_perturbed_once():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    net[2].weight = net[0].weight
    data = torch.randn(5, 3, dtype=DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    o = Objective(net, data, loss=F.mse_loss)
    assert o.n == 9
    e = torch.randn(9, dtype=DOUBLE)
    both = (net[0].weight + e.view(3, 3)).detach()
    expected = F.mse_loss(torch.tanh(data[0] @ both.T) @ both.T, data[1])
    torch.testing.assert_close(o.loss(e), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Objective(tanh_net(), samples()), ValueError, "exactly one of two"),
        (lambda: objective(tanh_net(), iter([samples()])), TypeError, "only once"),
        (lambda: objective(tanh_net(), TensorDataset(*samples())), TypeError, "wrap it in a DataLoader"),
        (lambda: objective(tanh_net(), (samples()[0], samples(19)[1])), ValueError, "the same length"),
        (lambda: objective(tanh_net(), batch_norm="off"), ValueError, "choose 'eval'"),
        (
            lambda: objective(tanh_net(), parameters=["5.weight"]),
            ValueError,
            "Sequential has no parameter named 5.weight",
        ),
        (lambda: objective(tanh_net().requires_grad_(False)), ValueError, "no parameter that requires"),
        (lambda: objective(nn.Linear(4, 3, dtype=torch.complex64)), TypeError, "complex64"),
        (lambda: objective(tanh_net(), batch_size=0), ValueError, "batch_size must be 1 or more"),
        (lambda: objective(tanh_net(), []).loss(), ValueError, "no samples"),
        (lambda: objective(tanh_net(), [samples()[0]]).loss(), TypeError, "pass evaluate="),
        (lambda: objective(tanh_net(), [{"n": 1}]).loss(), TypeError, "pass size="),
        (lambda: objective(tanh_net()).loss(torch.ones(3)), ValueError, "shape"),
        (lambda: list(objective(tanh_net()).split(0)), ValueError, "m must be 1 or more"),
        (
            lambda: Objective(
                tanh_net(), samples(), loss=lambda out, y: F.cross_entropy(out, y, reduction="none")
            ).loss(),
            ValueError,
            "must be the mean loss",
        ),
    ],
)
def test_invalid_objectives_raise(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_progress_is_called_after_every_pass():
    calls = []
    o = objective(tanh_net(), batch_size=7, progress=lambda stage, passes: calls.append((stage, passes)))
    o.stage = "gradient"
    o.gradient()
    o.gradient()
    assert calls == [("gradient", 1), ("gradient", 2)]


def of_sum(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum")


def of_classes(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=torch.tensor([0.1, 1.0, 5.0], dtype=DOUBLE))


def of_noise(outputs, targets):
    return F.cross_entropy(outputs + torch.randn_like(outputs), targets)


@pytest.mark.parametrize("loss", [of_sum, of_classes])
@pytest.mark.parametrize("batches", ["tensors", "list"])
def test_loss_of_several_batches_that_is_no_mean_over_the_samples_warns_once(loss, batches):
    torch.manual_seed(0)
    x, y = torch.randn(24, 4, dtype=DOUBLE), torch.arange(24) // 8  # sorted, as data sets on disks are
    net = torch.nn.Linear(4, 3).double()
    data = (x, y) if batches == "tensors" else [[x[:8], y[:8]], [x[8:], y[8:]]]
    objective = Objective(net, data, loss=loss, batch_size=8)
    with pytest.warns(UserWarning, match="it is no mean over the samples"):
        objective.loss()
    objective.loss()  # warnings are errors
    Objective(net, (x, y), loss=loss).loss()  # the loss of one batch is what it is
    Objective(net, data, loss=loss, batch_size=8, size=lambda batch: 1).loss()


@pytest.mark.parametrize("loss", [F.cross_entropy, of_noise])
def test_loss_that_is_a_mean_or_random_does_not_warn(loss):
    torch.manual_seed(0)
    x, y = torch.randn(21, 4), torch.arange(21) % 3
    assert Objective(torch.nn.Linear(4, 3), (x, y), loss=loss, batch_size=8).loss() > 0


def of_labels_that_count(outputs, targets):
    return F.cross_entropy(outputs, targets, ignore_index=1)


TAKERS = {
    "m-sharpness": lambda o, m=8: m_sharpness(o, 0.1, m, ascent_steps=1, restarts=1),
    "batch sharpness": lambda o, m=8: batch_sharpness(o, m),
    "empirical Fisher": lambda o, m=8: EmpiricalFisher(o)(torch.ones(1, o.n, dtype=DOUBLE)),
}


@pytest.mark.parametrize("loss", [of_sum, of_classes, of_labels_that_count])
@pytest.mark.parametrize("taker", TAKERS)
def test_loss_of_one_batch_that_is_no_mean_warns_once_where_parts_or_samples_of_it_are_taken(loss, taker):
    torch.manual_seed(0)
    x, y = torch.randn(24, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 0, 2] * 2 + [0, 1, 1, 1, 2, 1] * 2)
    o = Objective(torch.nn.Linear(4, 3).double(), (x, y), loss=loss)
    with pytest.warns(UserWarning, match="it is no mean over the samples") as warned:
        TAKERS[taker](o)
    assert len(warned) == 1
    TAKERS[taker](o)  # warnings are errors
    TAKERS[taker](Objective(o.model, (x, y), loss=F.cross_entropy))


def test_loss_that_is_no_mean_does_not_warn_if_all_samples_are_one_part():
    x, y = samples()
    TAKERS["m-sharpness"](objective(tanh_net(), (x, y), size=len), 20)
    TAKERS["m-sharpness"](Objective(tanh_net(), (x, y), loss=of_sum), 20)


@pytest.mark.parametrize("taker", ["m-sharpness", "batch sharpness"])
def test_part_without_a_label_that_counts_is_named_and_left_out_by_its_size(taker):
    x, y = samples(24)
    y[:8] = -100
    message = "In a part of 8 samples.*the loss ignores all labels.*pass size="
    with pytest.warns(UserWarning, match="ignored labels"), pytest.raises(FloatingPointError, match=message):
        TAKERS[taker](objective(tanh_net(), (x, y)))
    counted = objective(tanh_net(), (x, y), size=lambda batch: int((batch[1] != -100).sum()))
    assert TAKERS[taker](counted).n == 2


class Albert(nn.Module):
    """Runs one block three times, each under a name of its own; its BatchNorm has buffers."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.blocks, self.head = nn.ModuleList([block] * 3), nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_model_that_registers_a_module_under_several_names_is_measured_and_keeps_its_parameters(batch_norm):
    torch.manual_seed(0)
    net, (x, y) = Albert().double(), samples()
    own = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    places = [(t, t.data_ptr(), t._version) for _, t in own]
    o = objective(net, batch_norm=batch_norm)
    assert o.n == sum(p.numel() for p in net.parameters()) == 20 + 8 + 15
    e = torch.randn(o.n, dtype=DOUBLE)
    moved = copy.deepcopy(net).train(batch_norm == "train")
    with torch.no_grad():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(moved.parameters()) + e, moved.parameters())
    expected = F.cross_entropy(moved(x), y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(expected, list(moved.parameters()))])
    torch.testing.assert_close(o.loss(e), expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(o.gradient(e), (expected.detach(), gradient), rtol=1e-10, atol=1e-12)
    o.statistics(e)
    eigenvalues(Hessian(o), k=1)
    now = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    assert [name for name, _ in now] == [name for name, _ in own]
    assert all(t is before for (_, t), (before, _, _) in zip(now, places, strict=True))
    assert [(t.data_ptr(), t._version) for _, t in now] == [(place, version) for _, place, version in places]


def test_weights_tied_after_the_objective_was_made_raise():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    o = objective(net)
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match="0.weight shares its tensor with another name"):
        o.loss()


class Embedded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4, **options, dtype=DOUBLE)
        self.head = nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, i):
        return self.head(torch.tanh(self.embedding(i)))


def tokens():
    return torch.arange(20) % 10, torch.arange(20) % 3


@pytest.mark.parametrize("trained", [True, False])
def test_forward_that_writes_to_weights_leaves_those_of_the_model_unchanged(trained):
    net, (i, y) = Embedded(max_norm=0.5), tokens()
    before, version = net.embedding.weight.detach().clone(), net.embedding.weight._version
    net.embedding.weight.requires_grad_(trained)
    o = objective(net, (i, y), batch_size=7)
    found = o.loss(), o.gradient()[0], o.loss(torch.zeros(o.n))
    Hessian(o)(torch.ones(1, o.n, dtype=DOUBLE))
    sharpness(o, rho=0.05)
    assert torch.equal(net.embedding.weight, before)
    assert net.embedding.weight._version == version
    expected = F.cross_entropy(net(i), y).detach()
    for loss in found:
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_each_batch_starts_from_the_weights_of_the_model():
    class Doubling(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(2)
            return super().forward(x)

    torch.manual_seed(0)
    net = Doubling(4, 3, dtype=DOUBLE)
    expected = objective(net).loss()
    o = objective(net, batch_size=7)
    torch.testing.assert_close((o.loss(), o.loss(torch.zeros(o.n))), (expected, expected), rtol=1e-12, atol=0)


def test_sparse_gradients_of_an_embedding_are_measured_as_dense_ones():
    found = []
    for sparse in (False, True):
        o = objective(Embedded(sparse=sparse), tokens())
        v = torch.linspace(-1, 1, o.n, dtype=DOUBLE).view(1, -1)
        found.append((*o.gradient(), Hessian(o)(v), sharpness(o, rho=0.05).value))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-15)


class Recording(nn.Module):
    """Changes in place what is in its attributes, draws from generators of its own, and keeps weights in a list."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=DOUBLE)
        self.weights, self.calls, self.pair = [self.layer.weight], torch.ones(3, dtype=DOUBLE), (torch.ones(3),)
        self.log, self.array, self.last = [], np.zeros(2), deque(maxlen=2)
        self.counts, self.nested, self.seen = Counter(), {"calls": 0, "tensors": [torch.ones(3, dtype=DOUBLE)]}, {"x"}
        self.generator, self.random = torch.Generator().manual_seed(0), random.Random(0)

    def forward(self, x):
        self.calls += 1
        self.pair[0].add_(1)
        self.log.append(len(x))
        self.array += 1
        self.last.append(1)
        self.counts["calls"] += 1
        self.nested["calls"] += 1
        self.nested["tensors"][0].add_(1)
        self.nested["new"] = self
        self.register_buffer("late", torch.ones(1))
        draws = torch.randn(3, generator=self.generator, dtype=DOUBLE)
        draws = draws + self.random.random() + random.random() + np.random.rand()
        scale = self.calls * self.nested["tensors"][0] * self.pair[0]
        return torch.tanh(F.linear(x, self.weights[0], self.layer.bias) * scale) + 0.1 * draws


def test_what_a_forward_changes_in_place_and_draws_is_that_of_the_model_itself():
    torch.manual_seed(0)
    net = Recording()
    log, calls, tensors = net.log, net.calls, net.nested["tensors"]
    generators = net.generator.get_state(), net.random.getstate(), random.getstate(), np.random.get_state()
    o = objective(net, batch_size=7)
    first, e = o.loss(), torch.ones(o.n, dtype=DOUBLE) * 0.1
    assert o.loss() == first == o.loss(torch.zeros(o.n))
    torch.testing.assert_close(o.gradient()[0], first, rtol=1e-12, atol=0)
    assert o.loss(e) != first
    assert torch.equal(generators[0], net.generator.get_state())
    assert generators[1] == net.random.getstate()
    assert generators[2] == random.getstate()
    assert np.array_equal(generators[3][1], np.random.get_state()[1])
    assert net.log is log == []
    assert net.calls is calls
    assert net.nested["tensors"] is tensors
    assert (net.calls.tolist(), net.calls._version, net.array.tolist(), len(net.last)) == ([1, 1, 1], 0, [0, 0], 0)
    assert net.nested == {"calls": 0, "tensors": tensors}
    assert tensors[0].tolist() == net.pair[0].tolist() == [1, 1, 1]
    assert (net.counts, list(net.buffers())) == (Counter(), [])
    assert net.weights[0] is net.layer.weight


def test_graph_that_is_kept_has_the_attributes_that_the_forward_has_changed():
    torch.manual_seed(0)
    net = Recording()
    o = objective(net)
    hessian, v = Hessian(o), torch.randn(2, o.n, dtype=DOUBLE)
    step = 1e-5
    found = [(o.gradient(step * row)[1] - o.gradient(-step * row)[1]) / (2 * step) for row in v]
    torch.testing.assert_close(hessian(v), torch.stack(found), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(hessian(v), torch.stack(found), rtol=1e-6, atol=1e-8)


@torch.no_grad()
def without_gradients(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def of_a_number(model, batch):
    return torch.tensor(F.cross_entropy(model(batch[0]), batch[1]).item())


def of_another_model(model, batch):
    return F.cross_entropy(tanh_net(1)(batch[0]), batch[1])


@pytest.mark.parametrize("evaluate", [without_gradients, of_a_number, of_another_model])
@pytest.mark.parametrize(
    "measure",
    [
        lambda o: sharpness(o, 0.1),
        lambda o: eigenvalues(Hessian(o)),
        lambda o: by_layer(o),
        lambda o: batch_sharpness(o, 5),
    ],
)
def test_loss_that_does_not_depend_on_the_model_raises(evaluate, measure):
    o = Objective(tanh_net(), samples(), evaluate=evaluate)
    assert o.loss() > 0
    with pytest.raises(ValueError, match="depends on no parameter of the model, so that its derivatives would all be"):
        measure(o)


@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher])
def test_matrix_of_outputs_of_a_loss_that_does_not_depend_on_the_model_raises(kind):
    def detached(model, batch):
        outputs = model(batch[0])
        return F.cross_entropy(outputs, batch[1]).detach(), outputs

    with pytest.raises(ValueError, match="depends on no parameter of the model"):
        trace(kind(Objective(tanh_net(), samples(), evaluate=detached)))


@pytest.mark.parametrize("measure", [lambda o: sharpness(o, 0.1), lambda o: trace(Hessian(o)), lambda o: by_layer(o)])
def test_penalty_of_parameters_that_were_taken_from_the_model_before_raises(measure):
    net = tanh_net()
    taken = list(net.parameters())

    def loss(parameters):
        return lambda outputs, y: F.cross_entropy(outputs, y) + sum(p.square().sum() for p in parameters())

    with pytest.raises(ValueError, match="the loss uses 0.weight of the model, taken from it before the measurement"):
        measure(Objective(net, samples(), loss=loss(lambda: taken)))
    measure(Objective(net, samples(), loss=loss(net.parameters)))  # the copies that are measured


class WithUnusedHead(nn.Module):
    """A network with a head that its forward uses in training only, as auxiliary classifiers are."""

    def __init__(self):
        super().__init__()
        self.net, self.head = tanh_net(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("matrix", [Hessian, GaussNewton, EmpiricalFisher])
def test_layer_that_the_loss_does_not_use_has_no_curvature(matrix):
    table = by_layer(objective(WithUnusedHead(), batch_size=7), matrix=matrix, probes=4)
    assert table["head"].lambda_max.value == table["head"].trace.value == 0.0
    expected = by_layer(objective(tanh_net(), batch_size=7), matrix=matrix, probes=4)
    assert table["net.0"].trace.value == pytest.approx(expected["0"].trace.value, rel=1e-12)
    loss, gradient = objective(WithUnusedHead(), parameters=["head.weight"]).gradient()
    assert loss > 0
    assert not gradient.any()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda net: torch.jit.trace(net, samples()[0])])
def test_scripts_of_torch_are_measured(script):
    o, plain = objective(script(tanh_net())), objective(tanh_net())
    v = torch.ones(1, o.n, dtype=DOUBLE)
    torch.testing.assert_close(o.gradient(), plain.gradient(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Hessian(o)(v), Hessian(plain)(v), rtol=1e-12, atol=1e-12)


def test_a_tied_parameter_may_be_named_by_each_of_its_names():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    net[2].weight = net[0].weight
    data = torch.randn(5, 3, dtype=DOUBLE), torch.randint(3, (5,))
    first, second = (objective(net, data, parameters=[name]) for name in ("0.weight", "2.weight"))
    assert first.names == second.names == ["0.weight"]
    torch.testing.assert_close(first.gradient(), second.gradient(), rtol=0, atol=0)


def test_tensors_of_the_loss_in_another_dtype_than_the_objective_are_named():
    net, weight = tanh_net().float(), torch.ones(3)
    loss = nn.CrossEntropyLoss(weight=weight)
    with pytest.raises(RuntimeError, match=r"converted to torch.float64.*the weight of a CrossEntropyLoss"):
        Objective(net, samples(), loss=loss, dtype=DOUBLE).loss()
    assert Objective(net, samples(), loss=loss.double(), dtype=DOUBLE).loss() > 0
