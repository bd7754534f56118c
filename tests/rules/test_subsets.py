"""Subsets of the parameters: what is perturbed, and the functions that choose layers."""

import copy
import math

import pytest
import torch
from named_methods import passes_per_step
from torch import nn

import steppe
from checks import bumpy, split
from reference import loss_and_gradient, sam_e
from steppe import SAM
from steppe.methods.msam import Momentum
from steppe.rules.subsets import ParameterSubset, last_layers, layers, norm_layers
from support import DRIVES, by_closure, by_passes, net


@pytest.mark.parametrize("drive", DRIVES)
def test_only_the_subset_is_perturbed_with_its_own_radius(drive):
    """e is zero elsewhere, and |e| = rho within the subset, as in the paper of SAM-ON."""
    torch.manual_seed(3)
    start = torch.randn(10, dtype=torch.float64)
    mask = torch.cat([torch.zeros(6), torch.ones(4)]).double()  # the first tensor is not perturbed
    w = start.clone().requires_grad_()
    reference = torch.optim.SGD([w], lr=1e-2, momentum=0.9)
    for _ in range(20):
        _, g = loss_and_gradient(bumpy, w)
        _, w.grad = loss_and_gradient(bumpy, w.detach() + sam_e(w, g * mask, 0.3))
        reference.step()
    params = [nn.Parameter(p) for p in split(start)]
    optimizer = SAM(
        torch.optim.SGD(params, lr=1e-2, momentum=0.9), rho=0.3, perturbation=ParameterSubset(steppe.L2(), params[1:])
    )
    for _ in range(20):
        DRIVES[drive](optimizer, lambda: bumpy(torch.cat([p.reshape(-1) for p in params])))
    got = torch.cat([p.detach().reshape(-1) for p in params])
    torch.testing.assert_close(got, w.detach(), rtol=1e-12, atol=1e-12)
    whole = SAM(torch.optim.SGD(params, lr=1e-2), rho=0.3)
    assert repr(whole.perturbation) != repr(optimizer.perturbation)


def test_other_parameters_are_neither_copied_nor_moved():
    model = net()
    chosen = norm_layers(model)
    assert len(chosen) == 4
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.0),
        rho=1.0,
        model=model,
        perturbation=ParameterSubset(steppe.L2(), chosen),
    )
    before = {id(p): p.detach().clone() for p in model.parameters()}
    moved = []

    def loss():
        moved.append([id(p) for p in model.parameters() if not torch.equal(p, before[id(p)])])
        return model(torch.randn(4, 1, 8, 8)).square().mean()

    by_closure(optimizer, loss)
    assert moved == [[], [id(p) for p in model.parameters() if any(p is c for c in chosen)]]
    copied = sum(c.numel() for c in optimizer._engine._displacement._copies.values())
    assert copied == sum(p.numel() for p in chosen)


def test_subset_works_with_a_single_pass_rule_and_a_copy_and_must_not_be_empty():
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([1.0]))
    base = torch.optim.SGD([a, b], lr=0.0, momentum=0.9)
    optimizer = SAM(base, rho=0.5, perturbation=ParameterSubset(Momentum(), [a]))
    points = []
    for _ in range(2):
        by_passes(optimizer, lambda: (points.append((a.tolist(), b.tolist())), a.square().sum() + b.sum())[1])
    assert points[0] == ([3.0, 4.0], [1.0])
    assert math.dist(points[1][0], (3.0, 4.0)) == pytest.approx(0.5, rel=1e-6)
    assert points[1][1] == [1.0]
    a2, copied = copy.deepcopy((a, optimizer))
    assert any(p is a2 for p in copied.perturbation.parameters)
    with pytest.raises(ValueError, match="subset of parameters to perturb is empty"):
        ParameterSubset(steppe.L2(), [])


def subset_of_two():
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer = SAM(torch.optim.SGD([a, b], lr=0.1), rho=0.5, perturbation=ParameterSubset(steppe.L2(), [a]))
    return a, b, optimizer


@pytest.mark.parametrize("modify", [lambda rule: rule, lambda rule: steppe.AscentSteps(rule, 2)])
def test_subset_assigned_later_must_be_in_the_optimizer(modify):
    a, b, optimizer = subset_of_two()
    foreign = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="1 of the 2 parameters to perturb .* are not in the optimizer"):
        optimizer.perturbation = modify(ParameterSubset(steppe.L2(), [b, foreign]))
    assert list(optimizer.perturbation.parameters) == [a]
    optimizer.perturbation = modify(ParameterSubset(steppe.L2(), [b]))
    by_closure(optimizer, lambda: (a.sum() + b.sum()).square())


def test_rule_of_another_kind_assigned_later_is_an_error():
    *_, optimizer = subset_of_two()
    with pytest.raises(TypeError, match="cadence=L2.* is a rule of another kind: write perturbation="):
        optimizer.cadence = steppe.L2()
    with pytest.raises(TypeError, match="combination= needs a rule, got the class SurrogateGap"):
        optimizer.combination = steppe.SurrogateGap
    wsam = steppe.variants.wsam(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), decoupled=True)
    with pytest.raises(TypeError, match="DecoupledWSAM has a combination of its own"):
        wsam.combination = steppe.SurrogateGap()


@pytest.mark.parametrize("drive", DRIVES)
def test_step_without_any_parameter_of_the_subset_is_an_error(drive):
    a, b, optimizer = subset_of_two()
    optimizer.param_groups[0]["params"] = [b]
    with pytest.raises(ValueError, match="1 of the 1 parameters to perturb .* are not in the optimizer"):
        DRIVES[drive](optimizer, lambda: b.square().sum())
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [b]})  # no error yet: the other group follows
    optimizer.add_param_group({"params": [a]})
    DRIVES[drive](optimizer, lambda: a.square().sum() + b.square().sum())


def test_groups_with_parts_of_the_subset_may_be_added_one_by_one():
    a, b, c = (nn.Parameter(torch.ones(2), requires_grad=i == 0) for i in range(3))
    optimizer = SAM(torch.optim.SGD([a], lr=0.1), rho=0.5, perturbation=ParameterSubset(steppe.L2(), [a, b, c]))
    for p in (b, c):
        p.requires_grad_()
    for p in (b, c):
        by_closure(optimizer, lambda: sum(w.square().sum() for w in (a, b, c)))
        copy.deepcopy(optimizer)
        optimizer.add_param_group({"params": [p]})
    by_closure(optimizer, lambda: sum(w.square().sum() for w in (a, b, c)))
    assert optimizer.report().perturbed_steps == 3


def test_subset_of_frozen_parameters_warns_once():
    a, b, optimizer = subset_of_two()
    a.requires_grad_(False)
    with pytest.warns(UserWarning, match="all parameters to perturb .* are frozen.*Unfreeze them"):
        by_closure(optimizer, lambda: b.square().sum())
    by_closure(optimizer, lambda: b.square().sum())


def test_layers_are_chosen_by_the_names_of_modules():
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)), "head": nn.Linear(2, 1)}
    )
    names = {p: name for name, p in model.named_parameters()}

    def chosen(*patterns):
        return [names[p] for p in layers(model, *patterns)]

    assert chosen("head") == ["head.weight", "head.bias"]
    assert chosen("head", "body.[01]") == [f"{m}.{k}" for m in ("body.0", "body.1", "head") for k in ("weight", "bias")]
    assert chosen("body") == chosen("body.*") == [n for n in names.values() if n.startswith("body")]
    assert chosen("*") == list(names.values())
    assert [names[p] for p in last_layers(model, 2)] == ["body.2.weight", "body.2.bias", "head.weight", "head.bias"]
    assert len(last_layers(model, 4)) == 8


def test_last_layers_count_a_parameter_of_two_modules_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert len(last_layers(model, 2)) == len(layers(model, "*")) == 1


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda: layers(nn.Linear(1, 1)), "no pattern, so no layer"),
        (lambda: layers(nn.Sequential(nn.Linear(1, 1)), "0", "head"), "called 'head': this model has 0"),
        (lambda: layers(nn.Sequential(nn.ReLU()), "0"), "this model has none at all"),
        (lambda: last_layers(nn.Sequential(nn.Linear(1, 1)), 2), "num_layers must be between 1 and 1.*got 2"),
        (lambda: last_layers(nn.Sequential(nn.Linear(1, 1)), 0), "got 0"),
    ],
)
def test_choice_that_matches_no_layer_is_an_error(choose, message):
    with pytest.raises(ValueError, match=message):
        choose()


def test_step_of_sam_on_costs_two_passes():
    assert passes_per_step("sam_on") == 2.0
