"""Unified SAM against its slow reference."""

from types import MappingProxyType

import pytest
from named_methods import passes_per_step
from perturbations import RHO, PerturbationTests, assert_equals_sam, e, gradients, length, point
from slow_reference import Tensors
from slow_reference import length as norm

from steppe.methods.unified_sam import PartlyNormalized


class UnifiedE:
    """e_t = rho (1 - lambda_t + lambda_t / |g|) g, t = 1, 2, ... (arXiv 2503.02225)."""

    def __init__(self, lmbda) -> None:
        self.lmbda = lmbda
        self.t = 0

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        self.t += 1
        lmbda = self.lmbda(self.t)
        return [rho * (1 - lmbda + lmbda / norm(g)) * part for part in g]


class TestPartlyNormalized(PerturbationTests):
    cases = MappingProxyType(
        {
            "default": (PartlyNormalized(), lambda: UnifiedE(lambda t: 1 - 1 / t)),
            "1/t": (PartlyNormalized("1/t"), lambda: UnifiedE(lambda t: 1 / t)),
            "usam": (PartlyNormalized(0.0), lambda: UnifiedE(lambda t: 0.0)),
            "half": (PartlyNormalized(0.5), lambda: UnifiedE(lambda t: 0.5)),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("unified_sam") == 2.0


def test_lambda_one_is_sam():
    assert_equals_sam(PartlyNormalized(1.0))


def test_length_of_usam_is_rho_times_that_of_the_gradient():
    g = gradients()
    assert length(e(PartlyNormalized(0.0), point(g))) == pytest.approx(RHO * length(g), rel=1e-12)


@pytest.mark.parametrize("lmbda", [-0.1, 1.1, float("nan")])
def test_lambda_out_of_range_is_an_error(lmbda):
    with pytest.raises(ValueError, match="lmbda must be between 0 and 1"):
        PartlyNormalized(lmbda)


def test_unknown_schedule_is_an_error_that_names_the_schedules():
    with pytest.raises(TypeError, match=r"lmbda must be a number, got '1/s'.* '1/t' or '1-1/t'"):
        PartlyNormalized("1/s")
