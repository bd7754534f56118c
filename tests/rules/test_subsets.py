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
