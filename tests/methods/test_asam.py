"""ASAM against its slow reference."""

import pytest
import torch
from named_methods import passes_per_step

import steppe
from checks import matches_reference
from support import BASES, DRIVES


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", BASES)
def test_asam_matches_its_slow_reference(base, drive):
    matches_reference("asam", base, drive)


def test_step_costs_two_passes():
    assert passes_per_step("asam") == 2.0


def test_length_of_e_is_rho_in_units_of_the_weights():
    w = torch.nn.Parameter(torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64))
    g = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    direction, scale = steppe.Adaptive(eta=0.1)(steppe.Point([w], [g], [0.5], [{}], 0))
    T = w.detach().abs() + 0.1
    assert float((0.5 * scale * direction[0] / T).norm()) == pytest.approx(0.5, rel=1e-12)


def test_negative_eta_is_an_error():
    with pytest.raises(ValueError, match="eta must be finite"):
        steppe.Adaptive(eta=-1.0)
