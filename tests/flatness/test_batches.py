"""Data in batches of any form, split into parts, and checked to be the same in every pass."""

import pytest
import torch
import torch.nn.functional as F
from known_hessians import objective, samples, tanh_net
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from steppe.flatness import Objective, m_sharpness


def test_evaluate_accepts_batches_of_any_form():
    net, (x, y) = tanh_net(), samples()
    batches = [{"x": x[:8], "y": y[:8]}, {"x": x[8:], "y": y[8:]}]
    o = Objective(net, batches, evaluate=lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]))
    torch.testing.assert_close(o.loss(), F.cross_entropy(net(x), y).detach(), rtol=1e-12, atol=0)
    assert o.samples == 20


def test_size_defines_the_weight_of_a_batch():
    net, (x, y) = tanh_net(), samples()
    y = y.clone()
    y[[0, 1, 2, 3, 9]] = -100  # cross_entropy's mean leaves these out
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    o = objective(net, batches, size=lambda batch: int((batch[1] != -100).sum()))
    torch.testing.assert_close(o.loss(), F.cross_entropy(net(x), y).detach(), rtol=1e-12, atol=0)
    assert o.samples == 15


@pytest.mark.parametrize("number", [float, torch.as_tensor])
def test_size_may_be_a_sum_of_class_weights(number):
    net, (x, y), weight = tanh_net(), samples(), torch.tensor([0.3, 2.0, 0.55], dtype=torch.float64)

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets, weight=weight)

    total = float(weight[y].sum())
    assert not total.is_integer()
    o = Objective(net, (x, y), loss=loss, batch_size=7, size=lambda batch: number(weight[batch[1]].sum()))
    torch.testing.assert_close(o.loss(), loss(net(x), y).detach(), rtol=1e-12, atol=0)
    assert o.samples == pytest.approx(total, rel=1e-12)
    parts = list(o.split(3))
    mean = sum(p.samples * p.loss() for p in parts) / total
    torch.testing.assert_close(mean, o.loss(), rtol=1e-12, atol=0)
    assert m_sharpness(o, 0.1, 3, ascent_steps=1, restarts=1).samples == pytest.approx(total, rel=1e-12)


def test_sums_of_weights_may_differ_by_rounding_between_passes():
    net, weight = tanh_net(), torch.tensor([0.1, 0.7, 0.3])
    o = objective(net, shuffled_loader(), size=lambda batch: weight[batch[1]].sum())
    o.loss(), o.loss(), o.loss()


@pytest.mark.parametrize("size", [-1.0, float("nan"), float("inf")])
def test_size_that_is_no_number_of_terms_raises(size):
    with pytest.raises(ValueError, match=f"size= returned {size} for a batch"):
        objective(tanh_net(), size=lambda batch: size).loss()


def test_parts_average_to_the_loss_of_all_samples():
    o = objective(tanh_net(), batch_size=10)
    parts = list(o.split(5))
    assert len(parts) == 4
    torch.testing.assert_close(sum(p.loss() for p in parts) / 4, o.loss(), rtol=1e-12, atol=0)
    assert [p.samples for p in o.split(7)] == [7, 3, 7, 3]


def test_other_data_in_the_next_pass_raises():
    class Augmented(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(x.flip(1) if self.passes == 2 else x, y) for x, y in list.__iter__(self)])

    o = objective(tanh_net(), Augmented([samples()]))
    o.loss()
    with pytest.raises(ValueError, match="two passes had different samples"):
        o.loss()


def test_shuffled_batches_count_as_the_same_data():
    class Shuffled(list):
        def __iter__(self):
            x, y = self[0]
            order = torch.randperm(len(x))
            return iter([(x[order[:9]], y[order[:9]]), (x[order[9:]], y[order[9:]])])

    o = objective(tanh_net(), Shuffled([samples()]))
    first, second = o.loss(), o.loss()
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def shuffled_loader():
    data, generator = TensorDataset(*samples()), torch.Generator().manual_seed(0)
    return DataLoader(data, batch_size=8, shuffle=True, generator=generator)


def test_other_batches_of_the_same_samples_raise_where_the_loss_depends_on_them():
    objective(tanh_net(), shuffled_loader()).loss()
    o = objective(tanh_net(), shuffled_loader(), batch_norm="train")
    o.loss()
    with pytest.raises(ValueError, match="the same samples in other batches, but with batch_norm='train'"):
        o.loss()


def test_order_of_the_batches_does_not_matter():
    class Turned(list):
        def __iter__(self):
            self.reverse()
            return list.__iter__(self)

    x, y = samples()
    o = objective(tanh_net(), Turned([(x[:9], y[:9]), (x[9:], y[9:])]), batch_norm="train")
    torch.testing.assert_close(o.loss(), o.loss(), rtol=1e-12, atol=0)


class OfSequences(nn.Module):
    """A recurrent network over (time, samples, features), or over packed sequences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.RNN(4, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.head(self.rnn(x)[1][0])


def time_major_batches():
    x, y = torch.randn(6, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), samples()[1]
    return (x, y), [(x[:, i : i + 8], y[i : i + 8]) for i in range(0, 20, 8)]


def packed_batches():
    (x, y), _ = time_major_batches()
    sequences = [x[: 1 + i % 6, i] for i in range(20)]
    together = pack_sequence(sequences, enforce_sorted=False)
    parts = [(pack_sequence(sequences[i : i + 8], enforce_sorted=False), y[i : i + 8]) for i in range(0, 20, 8)]
    return (together, y), parts


@pytest.mark.parametrize("data", [time_major_batches, packed_batches])
def test_batches_are_weighted_by_their_targets_whatever_the_first_dimension_of_the_inputs(data):
    net, ((x, y), batches) = OfSequences(), data()
    o = objective(net, batches)
    torch.testing.assert_close(o.loss(), F.cross_entropy(net(x), y).detach(), rtol=1e-12, atol=0)
    assert o.samples == 20


@pytest.mark.parametrize("data", [time_major_batches, packed_batches])
def test_inputs_without_a_row_for_each_target_cannot_be_split(data):
    _, batches = data()
    with pytest.raises(ValueError, match="rows and 8 targets, so a part of its samples cannot be cut out"):
        m_sharpness(objective(OfSequences(), batches), 0.1, 2)


def graphs(**options):
    """Batches of graphs: nodes in the first tensor, a label for each graph."""
    x, y = samples()
    graph = torch.tensor([0] * 1 + [1] * 6 + [2] * 2 + [3] * 11)  # of each node

    def mean_loss(model, batch):
        sums = x.new_zeros(len(batch["y"]), 4).index_add(0, batch["graph"], batch["x"])
        return F.cross_entropy(model(sums), batch["y"])

    batches = [
        {"x": x[:7], "graph": graph[:7], "y": y[:2]},
        {"x": x[7:], "graph": graph[7:] - 2, "y": y[2:4]},
    ]
    whole = {"x": x, "graph": graph, "y": y[:4]}
    net = tanh_net()
    return Objective(net, batches, evaluate=mean_loss, **options), mean_loss(net, whole).detach()


def test_batches_whose_number_of_samples_is_a_guess_warn():
    o, expected = graphs(size=lambda batch: len(batch["y"]))
    torch.testing.assert_close(o.loss(), expected, rtol=1e-12, atol=0)
    o, expected = graphs()
    with pytest.warns(UserWarning, match=r"a batch have 7, 2 rows. Its samples are taken to be the 7 rows"):
        assert not torch.isclose(o.loss(), expected, rtol=1e-6)
