"""Layer-wise SAM against its slow reference."""

from functools import partial
from types import MappingProxyType

import pytest
import torch
from named_methods import passes_per_step
from perturbations import (
    RHO,
    PerturbationTests,
    assert_float16_gradients_of_any_size_work,
    e,
    gradients,
    length,
    point,
    start,
)
from slow_reference import Tensors
from slow_reference import length as norm

from steppe.methods.layerwise_sam import LayerWise


def layerwise_e(g: Tensors, rho: float, w: Tensors, relative: bool = True) -> Tensors:
    """e_l = rho |w_l| g_l / |g_l| in each layer, or without |w_l| (arXiv 2203.02714)."""
    return [rho * (norm([w_l]) if relative else 1) * g_l / norm([g_l]) for g_l, w_l in zip(g, w, strict=True)]


class TestLayerWise(PerturbationTests):
    cases = MappingProxyType(
        {
            "relative": (LayerWise(), lambda: layerwise_e),
            "absolute": (LayerWise(relative=False), lambda: partial(layerwise_e, relative=False)),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("layerwise_sam") == 2.0


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("size", [1e-4, 300.0, 6e4])
def test_float16_gradients_of_any_size_give_the_e_of_float64(size, relative):
    assert_float16_gradients_of_any_size_work(LayerWise(relative), size)


def test_lengths_are_relative_or_equal_and_layers_at_zero_are_not_perturbed():
    torch.manual_seed(0)
    w, g = start(), gradients()
    w[1].zero_()
    g[2].zero_()
    lengths = [length([part]) for part in e(LayerWise(), point(g, w=w))]
    assert lengths == pytest.approx([RHO * length([w[0]]), 0, 0, RHO * length([w[3]])], rel=1e-12)
    lengths = [length([part]) for part in e(LayerWise(relative=False), point(g, w=w))]
    assert lengths == pytest.approx([RHO, RHO, 0, RHO], rel=1e-12)
