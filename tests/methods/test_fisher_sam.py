"""Fisher SAM against its slow reference, which inverts F as a matrix."""

import math
from functools import partial
from types import MappingProxyType

import pytest
import torch
from named_methods import passes_per_step
from perturbations import (
    RHO,
    PerturbationTests,
    assert_equals_sam,
    assert_float16_gradients_of_any_size_work,
    e,
    gradients,
    length,
    point,
)
from slow_reference import Tensors

from steppe.methods.fisher_sam import Fisher


def fisher_e(g: Tensors, rho: float, w: Tensors | None = None, eta: float = 1.0) -> Tensors:
    """e = rho F^-1 g / sqrt(g' F^-1 g), F = I + eta diag(f), as a matrix; f the squared gradient (arXiv 2206.04920)."""
    flat = torch.cat([part.reshape(-1) for part in g])
    inverse = torch.linalg.inv(torch.eye(flat.numel(), dtype=flat.dtype) + eta * torch.diag(flat**2))
    e = rho * inverse @ flat / torch.sqrt(flat @ inverse @ flat)
    return [line.reshape(part.shape) for line, part in zip(e.split([part.numel() for part in g]), g, strict=True)]


class TestFisher(PerturbationTests):
    cases = MappingProxyType(
        {
            "default": (Fisher(), lambda: fisher_e),
            "eta 0.05": (Fisher(eta=0.05), lambda: partial(fisher_e, eta=0.05)),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("fisher_sam") == 2.0


@pytest.mark.parametrize("size", [1e-4, 300.0, 6e4])
def test_float16_gradients_of_any_size_give_the_e_of_float64(size):
    assert_float16_gradients_of_any_size_work(Fisher(), size)


def test_length_of_e_is_rho_in_the_fisher_metric():
    torch.manual_seed(0)
    g = gradients()
    perturbation = e(Fisher(eta=0.7), point(g))
    in_metric = sum(((1 + 0.7 * part**2) * d**2).sum() for part, d in zip(g, perturbation, strict=True)).sqrt()
    assert in_metric.item() == pytest.approx(RHO, rel=1e-12)
    assert length(perturbation) < RHO


def test_eta_zero_is_sam():
    assert_equals_sam(Fisher(eta=0.0))


@pytest.mark.parametrize(
    ("eta", "message"), [(-0.5, "eta must be finite and not negative, got -0.5"), (math.nan, "eta must be")]
)
def test_eta_out_of_range_is_an_error(eta, message):
    with pytest.raises(ValueError, match=message):
        Fisher(eta)
