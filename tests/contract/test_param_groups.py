"""Contract C1 and C5: parameter groups and state are those of the base, and names do not collide."""

import copy
import inspect
import math

import pytest
import torch

from steppe import SAM
from support import BASES, batch, bits, by_closure, by_passes, every_base, net, parameter, train


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


@pytest.mark.parametrize("how", ["added to the base", "appended to a group", "moved from the first group to a new one"])
def test_c1_parameters_that_are_added_past_the_wrapper_are_trained_like_the_others(how):
    found = []
    for past in (False, True):
        model = net(dropout=0.0)
        first, *others = model.parameters()
        base = torch.optim.SGD([first] if "moved" not in how else [first, *others], lr=0.1)
        optimizer = SAM(base, rho=0.5, model=model)
        if not past:
            if "moved" not in how:
                optimizer.add_param_group({"params": others})
        elif how == "appended to a group":
            optimizer.param_groups[0]["params"] += others
        else:
            del base.param_groups[0]["params"][1:]
            train(model, optimizer, by_closure, 0)
            base.add_param_group({"params": others, "sam_rho": 0.5})
        train(model, optimizer, by_closure, 3)
        found.append(bits(model.parameters()))
    assert found[0] == found[1]


def test_c1_group_that_is_removed_is_no_longer_moved_or_changed():
    model = net(dropout=0.0)
    first, *others = model.parameters()
    optimizer = SAM(torch.optim.SGD([{"params": [first]}, {"params": others}], lr=0.1), rho=0.5, model=model)
    train(model, optimizer, by_closure, 1)
    del optimizer.param_groups[1]
    before = bits(others)
    train(model, optimizer, by_closure, 1, start=1)
    optimizer.zero_grad()
    for p in others:
        p.grad = None
    x, y = batch(2)
    torch.nn.functional.cross_entropy(copy.deepcopy(model)(x), y).backward()
    gradients = [torch.zeros_like(p) for p in others]
    for sam_pass in optimizer.passes():
        with sam_pass:
            torch.nn.functional.cross_entropy(model(x), y).backward()
            if sam_pass.is_first:
                gradients = [p.grad.clone() for p in others]
    assert bits(p.grad for p in others) == bits(gradients), "those of the pass at w, as without SAM"
    assert bits(others) == before
