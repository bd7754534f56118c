"""Coupled WSAM against its slow reference. test_decoupled_wsam.py has the form with weight decouple."""

from types import MappingProxyType

import pytest
from combinations import CombinationTests, Reference, assert_is_base, assert_is_sam
from named_methods import passes_per_step
from torch import Tensor

from steppe.methods.wsam import WeightedSharpness


def wsam(gamma: float) -> Reference:
    """arXiv 2305.15817: L_WSAM = L + gamma / (1 - gamma) (L_SAM - L), written as a mean of the two gradients."""

    def update(g: Tensor, g_tilde: Tensor | None, _: dict[str, Tensor]) -> Tensor:
        if g_tilde is None:
            return g
        return (1 - 2 * gamma) / (1 - gamma) * g + gamma / (1 - gamma) * g_tilde

    return update


class TestWeightedSharpness(CombinationTests):
    cases = MappingProxyType(
        {
            "interval 1": (WeightedSharpness(gamma=0.8), wsam(0.8), 1),
            "interval 2": (WeightedSharpness(gamma=0.3), wsam(0.3), 2),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("wsam") == 2.0


def test_gamma_one_half_is_sam():
    assert_is_sam(WeightedSharpness(0.5))


def test_gamma_zero_is_the_base():
    assert_is_base(WeightedSharpness(0.0))


@pytest.mark.parametrize("gamma", [1.0, -0.1])
def test_gamma_out_of_range_is_an_error(gamma):
    with pytest.raises(ValueError, match="gamma must be at least 0 and less than 1"):
        WeightedSharpness(gamma)
