"""RST: the distribution of its draws, and checkpoints."""

import functools
import itertools
import math
import random

import pytest
import torch
from named_methods import passes_per_step

import steppe
from checks import resumes
from steppe.methods.looksam import GradientReuse
from steppe.methods.random_sam import Bernoulli
from support import BASES


def is_perturbed(cadence: Bernoulli, steps: int) -> list[bool]:
    return [cadence(steppe.Point([], [], [], [], step)) for step in range(steps)]


@pytest.mark.parametrize(("p", "passes"), [(0.0, 1.0), (1.0, 2.0)])
def test_p_of_zero_and_one_cost_one_and_two_passes(p, passes):
    assert passes_per_step("random_sam", p=p) == passes


def test_draws_are_fair_and_depend_on_seed_and_step_only():
    state, torch_state = random.getstate(), torch.get_rng_state()
    drawn = is_perturbed(Bernoulli(0.3, seed=5), 20_000)
    assert sum(drawn) / 20_000 == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 20_000))
    after = [b for a, b in itertools.pairwise(drawn) if a]
    assert sum(after) / len(after) == pytest.approx(0.3, abs=0.03)
    assert is_perturbed(Bernoulli(0.3, seed=5), 100) == drawn[:100]
    agree = sum(a == b for a, b in zip(drawn, is_perturbed(Bernoulli(0.3, seed=6), 20_000), strict=True))
    assert agree / 20_000 == pytest.approx(0.58, abs=0.02)  # 0.3^2 + 0.7^2
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_resumed_run_has_the_same_bits():
    def build(cadence, model: torch.nn.Module) -> steppe.SAM:
        rules = {"combination": GradientReuse(), "cadence": cadence}
        return steppe.SAM(BASES["adamw"](model.parameters()), rho=0.1, model=model, **rules)

    resumes(functools.partial(build, Bernoulli(0.5, seed=7)), "closure", after=3, steps=9)


@pytest.mark.parametrize("p", [1.1, float("nan")])
def test_p_out_of_range_is_an_error(p):
    with pytest.raises(ValueError, match="p must be between 0 and 1"):
        Bernoulli(p)
