"""Stable SAM against its slow reference."""

from types import MappingProxyType

import pytest
from combinations import CombinationTests, norm, unperturbed_and_perturbed
from named_methods import passes_per_step
from torch import Tensor

import steppe
from steppe.methods.stable_sam import Renormalized
from steppe.rules.ops import norm as norm_of_list


def renormalized(g: Tensor, g_s: Tensor | None, memory: dict[str, Tensor]) -> Tensor:
    """arXiv 2401.07250: gamma_t g_s with gamma_t = |g| / |g_s|."""
    return g if g_s is None else norm(g) / norm(g_s) * g_s


class TestRenormalized(CombinationTests):
    cases = MappingProxyType(
        {"interval 1": (Renormalized(), renormalized, 1), "interval 2": (Renormalized(), renormalized, 2)}
    )


def test_step_costs_two_passes():
    assert passes_per_step("stable_sam") == 2.0


def test_update_gradient_has_the_length_of_g_over_all_parameters():
    g, g_s = unperturbed_and_perturbed()
    update = Renormalized()(steppe.Point(g, g, [0.1] * 3, [{}] * 3, 0), g_s)
    assert float(norm_of_list(update)) == pytest.approx(float(norm_of_list(g)), rel=1e-12)
