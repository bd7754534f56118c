"""PlainAttributes restores what modules keep outside their buffers, as the same objects."""

from collections import deque

import torch
from torch import nn

from steppe.integrations._module_attributes import PlainAttributes


class KeepsState(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Linear(1, 1)
        self.number, self.names, self.losses = 1, {"a"}, {"all": [deque([1.0])]}
        self.total = torch.zeros(2)
        self.child.calls = []


def test_numbers_tensors_and_nested_containers_are_restored_in_place():
    module = KeepsState()
    losses, total, calls = module.losses, module.total, module.child.calls
    attributes = PlainAttributes(module)
    for _ in range(2):
        attributes.save()
        module.number += 1
        module.names.add("b")
        module.losses["all"][0].append(2.0)
        module.losses["more"] = 3
        module.total += 1
        module.child.calls.append("forward")
        module.added = 5
        attributes.restore()
        assert (module.number, module.names) == (1, {"a"})
        assert module.losses is losses
        assert losses == {"all": [deque([1.0])]}
        assert module.total is total
        assert total.tolist() == [0.0, 0.0]
        assert module.child.calls is calls
        assert calls == []
        assert not hasattr(module, "added")


def test_replaced_and_deleted_attributes_are_restored():
    module = KeepsState()
    losses = module.losses
    attributes = PlainAttributes(module)
    attributes.save()
    module.losses = {}
    del module.number
    attributes.restore()
    assert module.losses is losses
    assert module.number == 1


def test_parameters_and_buffers_are_unchanged():
    module = KeepsState()
    module.register_buffer("count", torch.zeros(()))
    attributes = PlainAttributes(module)
    attributes.save()
    with torch.no_grad():
        module.child.weight.fill_(7.0)
        module.count += 1
    attributes.restore()
    assert module.child.weight.item() == 7.0
    assert module.count == 1
