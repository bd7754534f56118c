"""LE-SAM against its slow reference."""

import math
from functools import partial
from types import MappingProxyType

import pytest
import torch
from named_methods import passes_per_step
from perturbations import RHO, PerturbationTests, e, gradients, length, point
from slow_reference import Tensors, along
from slow_reference import length as norm

from steppe.methods.le_sam import LossBudget
from steppe.rules import Point
from steppe.rules.ops import dot


def budget_e(g: Tensors, rho: float, w: Tensors | None = None, rho_max: float = 0.3) -> Tensors:
    """rho_t = min(sigma / |g|, rho_max), e = rho_t g / |g| (arXiv 2605.10183); rho is the paper's sigma."""
    return along(g, min(rho / float(norm(g)), rho_max))


class TestLossBudget(PerturbationTests):
    # |g| is 27 at first, and 6 to 12 later with SGD: the second limit acts at some of the steps only.
    cases = MappingProxyType(
        {
            "default": (LossBudget(), lambda: budget_e),
            "rho_max 0.0115": (LossBudget(0.0115), lambda: partial(budget_e, rho_max=0.0115)),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("le_sam") == 2.0


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_loss_rises_by_rho_to_first_order(size):
    torch.manual_seed(0)
    g = [size * part for part in gradients()]
    assert float(dot(e(LossBudget(rho_max=10.0), point(g)), g)) == pytest.approx(RHO, rel=1e-12)


def test_small_gradient_is_perturbed_by_rho_max():
    for size in (1e-3, 1e-30):
        g = [size * part for part in gradients(torch.float32)]
        assert length(e(LossBudget(rho_max=0.3), point(g))) == pytest.approx(0.3, rel=1e-6)


def test_all_groups_together_are_perturbed_by_rho_max():
    g = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    for rho in ([0.5, 1.0], [torch.tensor(0.5), torch.tensor(1.0)]):
        free, capped = (
            e(LossBudget(rho_max), Point(g, g, rho, [{}] * 2, 0)) for rho_max in (1.0, math.hypot(1.5, 4.0) / 50)
        )
        torch.testing.assert_close(free, [g[0] * 0.5 / 25, g[1] / 25])
        torch.testing.assert_close(capped, [part / 2 for part in free])


@pytest.mark.parametrize("rho_max", [0.0, -1.0, float("inf")])
def test_rho_max_out_of_range_is_an_error(rho_max):
    with pytest.raises(ValueError, match="rho_max must be finite and more than 0"):
        LossBudget(rho_max)
