"""GSAM against its slow reference."""

from types import MappingProxyType

import pytest
from combinations import CombinationTests, Reference, assert_is_sam, norm, unperturbed_and_perturbed
from named_methods import passes_per_step
from torch import Tensor

import steppe
from steppe.methods.gsam import SurrogateGap
from steppe.rules.ops import dot


def gsam(alpha: float) -> Reference:
    """arXiv 2203.08065, algorithm 1: f is the loss, f_p the perturbed one."""

    def update(g_f: Tensor, g_fp: Tensor | None, _: dict[str, Tensor]) -> Tensor:
        if g_fp is None:
            return g_f
        unit = g_fp / norm(g_fp)
        parallel = (g_f * unit).sum() * unit
        orthogonal = g_f - parallel
        return g_fp - alpha * orthogonal

    return update


class TestSurrogateGap(CombinationTests):
    cases = MappingProxyType(
        {
            "interval 1": (SurrogateGap(alpha=0.4), gsam(0.4), 1),
            "interval 2": (SurrogateGap(alpha=0.4), gsam(0.4), 2),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("gsam") == 2.0


def test_alpha_zero_is_sam():
    assert_is_sam(SurrogateGap(0.0))


def test_added_part_is_orthogonal_to_g_s_and_raises_the_loss_at_w():
    g, g_s = unperturbed_and_perturbed()
    point = steppe.Point(g, g, [0.1] * 3, [{}] * 3, 0)
    added = [u - p for u, p in zip(SurrogateGap(0.5)(point, g_s), g_s, strict=True)]
    assert float(dot(added, g_s)) == pytest.approx(0, abs=1e-13)
    assert float(dot(added, g)) < -0.1


@pytest.mark.parametrize("alpha", [-0.1, float("nan")])
def test_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        SurrogateGap(alpha)
