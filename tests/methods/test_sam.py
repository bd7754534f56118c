"""The named function of SAM and ASAM: several ascent steps, and a subset of the parameters."""

import torch
from named_methods import passes_per_step

import steppe
from steppe import testing, variants


def test_step_costs_two_passes_and_one_more_for_each_further_ascent_step():
    assert passes_per_step("sam") == 2.0
    assert passes_per_step("sam", ascent_steps=3) == 4.0


def test_ascent_steps_and_subset_become_rules():
    model = testing.Net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    assert variants.sam(base, ascent_steps=3).perturbation == steppe.AscentSteps(steppe.L2(), 3)
    subset = variants.asam(base, only=steppe.norm_layers(model)).perturbation
    assert (subset.rule, len(subset.parameters)) == (steppe.Adaptive(), 6)
