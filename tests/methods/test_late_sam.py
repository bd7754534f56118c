"""Late SAM: the step of the switch, and checkpoints."""

import functools

import pytest
import torch
from named_methods import passes_per_step

import steppe
from checks import resumes
from steppe.methods.late_sam import LatePhase
from steppe.methods.looksam import GradientReuse
from support import BASES


def is_perturbed(cadence: LatePhase, steps: int) -> list[bool]:
    return [cadence(steppe.Point([], [], [], [], step)) for step in range(steps)]


def test_three_quarters_of_plain_steps_cost_1_25_passes():
    assert passes_per_step("late_sam", start=0.75) == 1.25


def test_perturbed_steps_start_at_the_exact_fraction():
    for percent in range(101):
        steps = is_perturbed(LatePhase(percent / 100, 100), 110)
        assert steps.index(True) == percent, "the float 0.55 * 100 is above 55"
    assert is_perturbed(LatePhase(0.5, 3), 4) == [False, False, True, True]


def test_resumed_run_has_the_same_bits():
    def build(cadence, model: torch.nn.Module) -> steppe.SAM:
        rules = {"combination": GradientReuse(), "cadence": cadence}
        return steppe.SAM(BASES["adamw"](model.parameters()), rho=0.1, model=model, **rules)

    resumes(functools.partial(build, LatePhase(0.5, 9)), "closure", after=3, steps=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.5, 10), "start must be between 0 and 1"), ((0.5, 0), "total_steps must be 1 or more")],
)
def test_hyperparameter_out_of_range_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        LatePhase(*arguments)
