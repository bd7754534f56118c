"""VaSSO against its slow reference."""

from types import MappingProxyType

import pytest
from named_methods import passes_per_step
from perturbations import RunningMeanTests, assert_equals_sam
from slow_reference import Tensors, along

from steppe.methods.vasso import VarianceSuppressed


class VarianceSuppressedE:
    """d_t = (1 - theta) d_{t-1} + theta g_t, d_0 = g_0; e = rho d / |d| (arXiv 2309.15639)."""

    def __init__(self, theta: float = 0.9) -> None:
        self.theta = theta
        self.d: Tensors | None = None

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        before = g if self.d is None else self.d
        self.d = [(1 - self.theta) * d + self.theta * part for d, part in zip(before, g, strict=True)]
        return along(self.d, rho)


class TestVarianceSuppressed(RunningMeanTests):
    cases = MappingProxyType(
        {
            "default": (VarianceSuppressed(), VarianceSuppressedE),
            "theta 0.2": (VarianceSuppressed(theta=0.2), lambda: VarianceSuppressedE(0.2)),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("vasso") == 2.0


def test_theta_one_is_sam():
    assert_equals_sam(VarianceSuppressed(theta=1.0))


@pytest.mark.parametrize(
    ("theta", "message"), [(0.0, "theta must be more than 0 and at most 1, got 0.0"), (1.1, "theta must be")]
)
def test_theta_out_of_range_is_an_error(theta, message):
    with pytest.raises(ValueError, match=message):
        VarianceSuppressed(theta)
