"""Contract C35: hyperparameters are numbers of the right kind, rules in their slots, subsets of this model."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import steppe
from steppe import SAM, variants
from support import by_closure

COUNTS = {
    "sam": lambda base, n: variants.sam(base, ascent_steps=n),
    "looksam": lambda base, n: variants.looksam(base, interval=n),
    "late_sam": lambda base, n: variants.late_sam(base, total_steps=n),
    "aesam": lambda base, n: variants.aesam(base, total_steps=n),
    "sparse_sam": lambda base, n: variants.sparse_sam(base, interval=n),
    "dynamic_sparse_sam": lambda base, n: variants.dynamic_sparse_sam(base, total_steps=n),
    "lookbehind_sam": lambda base, n: variants.lookbehind_sam(base, ascent_steps=n),
    "Periodic": lambda base, n: steppe.Periodic(n),
    "AscentSteps": lambda base, n: steppe.AscentSteps(steppe.L2(), n),
    "LinearRho": lambda base, n: steppe.rho_schedule.LinearRho(SAM(base), n),
    "SAF": lambda base, n: steppe.SAF(4, 3, epochs_ago=n),
    "last_layers": lambda base, n: steppe.last_layers(nn.Linear(2, 2), n),
}


def base_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("value", [math.nan, 2.5, 2.0, math.inf, True, "2"])
@pytest.mark.parametrize("what", COUNTS)
def test_c35_count_that_is_no_whole_number_raises(what, value):
    with pytest.raises(ValueError, match="must be a whole number"):
        COUNTS[what](base_of(nn.Linear(2, 2)), value)


def test_c35_whole_numbers_of_numpy_are_counts():
    assert steppe.Periodic(np.int64(2)).interval == 2


NUMBERS = {
    "p": lambda x: steppe.Bernoulli(x),
    "alpha": lambda x: steppe.SurrogateGap(x),
    "eta": lambda x: steppe.Adaptive(x),
    "theta": lambda x: steppe.VarianceSuppressed(x),
    "percentile": lambda x: steppe.ZScore(x),
    "lambda_1": lambda x: steppe.GradientNormThreshold(10, x),
    "beta": lambda x: steppe.Stochastic(steppe.L2(), x),
    "n_data": lambda x: variants.bsam(nn.Linear(2, 2).parameters(), n_data=x),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_c35_nan_is_no_hyperparameter(name):
    with pytest.raises(ValueError, match=f"{name} (must be|is out of range)"):
        NUMBERS[name](math.nan)


@pytest.mark.parametrize("value", [True, "0.5", 0.5j, None])
def test_c35_hyperparameter_that_is_no_number_raises(value):
    with pytest.raises(TypeError, match="p must be a number"):
        steppe.Bernoulli(value)


SLOTS = {
    "a perturbation as cadence": ({"cadence": steppe.L2()}, r"cadence=L2\(\) .*write perturbation=L2\(\)"),
    "a cadence as perturbation": ({"perturbation": steppe.Periodic(2)}, "write cadence=Periodic"),
    "a combination as perturbation": ({"perturbation": steppe.SurrogateGap()}, "write combination=SurrogateGap"),
    "a perturbation as combination": ({"combination": steppe.L2()}, r"write perturbation=L2\(\)"),
    "a class": ({"perturbation": steppe.Adaptive}, r"the class Adaptive: write perturbation=Adaptive\(...\)"),
    "a name": ({"perturbation": "adaptive"}, "needs a rule, a function of a steppe.rules.Point, got 'adaptive'"),
    "none": ({"cadence": None}, "needs a rule"),
    "a function as combination": ({"combination": lambda point, perturbed: perturbed}, "needs_unperturbed_gradient"),
}


@pytest.mark.parametrize("what", SLOTS)
def test_c35_rule_of_another_kind_than_its_slot_raises(what):
    rules, message = SLOTS[what]
    with pytest.raises(TypeError, match=message):
        SAM(base_of(nn.Linear(2, 2)), **rules)


def test_function_without_annotations_may_be_any_rule():
    model = nn.Linear(2, 2)
    optimizer = SAM(base_of(model), perturbation=lambda point: steppe.L2()(point), cadence=lambda point: True)
    by_closure(optimizer, lambda: model(torch.ones(1, 2)).sum())


FOREIGN = {
    "a copy of the model": lambda model: steppe.norm_layers(copy.deepcopy(model)),
    "partly a copy": lambda model: [*model.parameters(), *copy.deepcopy(model).parameters()],
    "another model": lambda model: nn.Linear(2, 2).parameters(),
}
NOT_TENSORS = {
    "names": lambda model: ["1.weight", "1.bias"],
    "a string": lambda model: "1.weight",
    "numbers": lambda model: [1],
    "a tensor": lambda model: model[1].weight,
    "a module": lambda model: model[1],
}


def layered():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


@pytest.mark.parametrize("what", FOREIGN)
def test_c35_subset_of_other_parameters_raises(what):
    model = layered()
    with pytest.raises(ValueError, match="are not in the optimizer"):
        variants.sam(base_of(model), only=FOREIGN[what](model))
    rule = steppe.AscentSteps(steppe.ParameterSubset(steppe.L2(), FOREIGN[what](model)))
    with pytest.raises(ValueError, match="are not in the optimizer"):
        SAM(base_of(model), perturbation=rule)


@pytest.mark.parametrize("what", NOT_TENSORS)
def test_c35_subset_of_no_parameters_raises(what):
    model = layered()
    with pytest.raises(TypeError, match="must hold the parameters themselves"):
        variants.sam(base_of(model), only=NOT_TENSORS[what](model))


def test_c35_exhausted_iterator_raises():
    model = layered()
    parameters = model.parameters()
    list(parameters)
    with pytest.raises(ValueError, match="an iterator gives its parameters only once"):
        variants.sam(base_of(model), only=parameters)


def test_c35_mask_of_another_parameter_raises():
    model, other = layered(), nn.Parameter(torch.ones(2))
    rule = steppe.Masked(steppe.L2(), {other: torch.tensor([True, False])})
    with pytest.raises(ValueError, match="1 of the 1 masks are of parameters that are not in the optimizer"):
        SAM(base_of(model), perturbation=rule)


def test_frozen_parameter_of_a_subset_may_be_missing():
    model = layered()
    model[0].weight.requires_grad_(False)
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    by_closure(variants.sam(base, only=model.parameters()), lambda: model(torch.ones(2, 3)).square().sum())
