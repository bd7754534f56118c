"""Parameters that a framework puts in the place of others, as Accelerate does under FSDP2."""

import gc
import weakref

import pytest
import torch
from torch import nn

import steppe
from steppe.rules.subsets import layers
from support import DRIVES, every_drive, model_bits, net, train


def plain_rule(model):
    return steppe.L2()


def subset_of_masked(model):
    masks = {p: torch.arange(p.numel()).reshape(p.shape) % 2 == 0 for p in layers(model, "layers.0")}
    chosen = list(model.parameters())[:3]
    return steppe.ParameterSubset(steppe.Masked(steppe.L2(), masks), chosen)


class Halved:
    """A modifier of a user's own, which is no dataclass."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, point: steppe.Point) -> steppe.ScaledDirection:
        direction, scale = self.rule(point)
        return steppe.ScaledDirection(direction, scale / 2)


def own_modifier(model):
    return Halved(subset_of_masked(model))


def with_new_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    new = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            new[p] = nn.Parameter(p.detach().clone())
            setattr(module, name, new[p])
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]


@every_drive
@pytest.mark.parametrize("rule", [plain_rule, subset_of_masked, own_modifier])
def test_parameters_in_the_place_of_others_are_trained_like_them(drive, rule):
    found = []
    for replace in (False, True):
        model = net()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = steppe.SAM(base, rho=0.3, model=model, perturbation=rule(model))
        if replace:
            with_new_parameters(model, optimizer)
        torch.manual_seed(0)
        train(model, optimizer, DRIVES[drive], 3)
        found.append(model_bits(model))
    assert found[0] == found[1] != model_bits(net())


@pytest.mark.parametrize("method", ["sam", "vasso", "friendly_sam"])
def test_parameters_that_others_have_replaced_are_freed(method):
    base = torch.optim.SGD([nn.Parameter(torch.randn(3))], lr=0.1)
    optimizer = getattr(steppe.variants, method)(base, rho=0.05)
    params = base.param_groups[0]["params"]
    earlier = []
    for _ in range(6):
        optimizer.step(lambda: params[0].square().sum())
        earlier.append(weakref.ref(params[0]))
        params[0] = nn.Parameter(torch.randn(len(params[0]) + 1))
    optimizer.step(lambda: params[0].square().sum())
    gc.collect()
    assert not [one for one in earlier if one() is not None]
    assert len(optimizer._engine._displacement._copies) == 1
