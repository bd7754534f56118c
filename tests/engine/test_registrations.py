import pytest
import torch
from torch import nn

from steppe._engine.attributes import may_assign_attributes
from steppe._engine.registrations import Registrations


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Identity()))


def rename(net):
    net[1][0]._buffers["count"] = net[1][0]._buffers.pop("num_batches_tracked")


CHANGES = {
    "buffer added": lambda net: net[1][1].register_buffer("b", torch.zeros(1)),
    "buffer of None added": lambda net: net[0].register_buffer("b", None),
    "buffer exchanged": lambda net: setattr(net[1][0], "running_mean", torch.zeros(2)),
    "buffer renamed": rename,
    "buffer deleted": lambda net: delattr(net[1][0], "num_batches_tracked"),
    "parameter exchanged": lambda net: setattr(net[0], "weight", nn.Parameter(torch.zeros(2, 2))),
    "parameter exchanged in its dict": lambda net: net[0]._parameters.update(weight=torch.zeros(2, 2)),
    "dict exchanged": lambda net: setattr(net[0], "_parameters", dict(net[0]._parameters)),
    "module added": lambda net: net[1].append(nn.ReLU()),
    "module exchanged": lambda net: net[1].__setitem__(1, nn.Identity()),
    "parametrized": lambda net: nn.utils.parametrizations.weight_norm(net[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_of_a_model_is_noticed(change):
    net = model()
    listed = Registrations(net)
    assert Registrations.of(net, listed) is listed
    CHANGES[change](net)
    now = Registrations.of(net, listed)
    assert now is not listed
    assert list(map(id, now.buffers)) == list(map(id, net.buffers()))
    assert list(map(id, now.parameters)) == list(map(id, net.parameters()))


def test_buffer_that_moves_to_another_module_is_noticed():
    net = nn.Sequential(nn.Identity(), nn.Identity())
    net[0].register_buffer("b", torch.zeros(1))
    listed = Registrations(net)
    net[1].register_buffer("b", net[0]._buffers.pop("b"))
    assert not listed.is_current()


class Hidden(nn.Module):
    """Lists a module that it does not register."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.Linear(1, 1)]

    def modules(self):
        yield self
        yield from self.hidden


def test_lists_of_a_module_with_a_method_of_its_own_are_made_each_time():
    net = Hidden()
    listed = Registrations(net)
    assert len(listed.parameters) == 2
    net.hidden.append(nn.Linear(1, 1))
    assert len(Registrations.of(net, listed).parameters) == 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_lists_of_torchscript_modules_are_made_each_time():
    net = torch.jit.script(model())
    assert not Registrations(net).is_current()
    assert len(Registrations(net).buffers) == 3


LAYERS = {
    "linear": lambda: nn.Linear(2, 2),
    "recurrent": lambda: nn.LSTM(2, 2, 2, bidirectional=True),
    "norm": lambda: nn.BatchNorm1d(2),
    "transformer": lambda: nn.TransformerDecoderLayer(4, 2, 4),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "pooling": lambda: nn.FractionalMaxPool2d(2, output_size=2),
    "lazy": lambda: nn.LazyLinear(2),
    "softmax": lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3]),
    "container": lambda: nn.ParameterList([nn.Parameter(torch.ones(2))]),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_torch_cost_no_work_unless_they_have_attributes_of_others(kind):
    layer = LAYERS[kind]()
    assert not any(map(may_assign_attributes, layer.modules()))
    layer.last = [torch.zeros(2)]
    assert may_assign_attributes(layer) == (kind != "lazy")
