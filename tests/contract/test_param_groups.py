"""Contract C1 and C5: parameter groups and state are those of the base, and names do not collide."""

import inspect
import math

import pytest
import torch

from steppe import SAM
from support import BASES, bits, by_closure, by_passes, every_base, net, parameter, train


@every_base
def test_c1_groups_and_state_are_those_of_the_base_also_after_loading(base):
    model = net()
    optimizer = SAM(BASES[base](model.parameters()), model=model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, by_closure, 2)
    for loader in (optimizer, optimizer.base):
        loader.load_state_dict(loader.state_dict())
        assert optimizer.param_groups is optimizer.base.param_groups
        assert optimizer.state is optimizer.base.state
        assert optimizer.defaults is optimizer.base.defaults
        optimizer.param_groups[0]["lr"] = 0.0
        before = bits(model.parameters())
        train(model, optimizer, by_closure, 1)
        assert bits(model.parameters()) == before, (
            "a learning rate set through the wrapper must take effect in the base"
        )


def test_c1_groups_can_be_added_and_replaced_through_the_wrapper():
    a, b = parameter(1.0), parameter(2.0)
    optimizer = SAM(torch.optim.SGD([a], lr=0.1), rho=0.3)
    optimizer.add_param_group({"params": [b], "sam_rho": 0.7, "lr": 0.5})
    assert [g["sam_rho"] for g in optimizer.base.param_groups] == [0.3, 0.7]
    by_passes(optimizer, lambda: a.square().sum() + b.square().sum())
    assert b.item() == pytest.approx(2.0 - 0.5 * 2 * (2 + 0.7 * 4 / math.sqrt(20)), rel=1e-6)
    groups, state = optimizer.param_groups, optimizer.state
    optimizer.param_groups, optimizer.state = groups, state
    assert optimizer.base.param_groups is groups
    assert optimizer.base.state is state


def test_c5_adadelta_keeps_its_own_rho():
    model = net()
    base = torch.optim.Adadelta(model.parameters(), rho=0.77)
    optimizer = SAM(base, rho=0.05, model=model)
    train(model, optimizer, by_closure, 1)
    assert base.param_groups[0]["rho"] == 0.77
    assert base.param_groups[0]["sam_rho"] == 0.05
    with pytest.raises(TypeError, match="'rho' of its own"):
        SAM(model.parameters(), torch.optim.Adadelta, rho=0.05)


def test_c5_argument_names_differ_from_those_of_all_torch_optimizers():
    ours = {"sam_rho", "sam_step", "model", "perturbation", "combination", "cadence", "replay_rng"}
    for name in torch.optim.__all__:
        cls = getattr(torch.optim, name)
        if inspect.isclass(cls):
            assert ours.isdisjoint(inspect.signature(cls).parameters), name


def test_c5_group_key_rho_without_effect_raises():
    with pytest.raises(ValueError, match="has no effect: the radius of a group is 'sam_rho'"):
        SAM(torch.optim.SGD([{"params": [parameter(1.0)], "rho": 0.1}], lr=0.1))
    w = parameter(1.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1))
    optimizer.param_groups[0]["rho"] = 0.2
    with pytest.raises(ValueError, match="has no effect"):
        by_passes(optimizer, lambda: w.square().sum())


def test_c5_wrapping_a_base_again_sets_the_new_radius():
    base = torch.optim.SGD([parameter(1.0)], lr=0.1)
    SAM(base, rho=0.05)
    assert SAM(base, rho=0.2).param_groups[0]["sam_rho"] == 0.2
