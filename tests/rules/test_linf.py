"""SAM with p = inf, in the notation of its paper."""

from types import MappingProxyType

import pytest
import torch
from perturbations import RHO, PerturbationTests, e, point
from slow_reference import Tensors

from steppe.rules.linf import LInf


def linf_e(g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
    """e = rho sign(g) |g|^(q-1) / (|g|_q^q)^(1/p) with p = inf, q = 1 (arXiv 2010.01412, equation 2)."""
    p, q = float("inf"), 1
    norm_q_q = sum((part.abs() ** q).sum() for part in g)
    return [rho * torch.sign(part) * part.abs() ** (q - 1) / norm_q_q ** (1 / p) for part in g]


class TestLInf(PerturbationTests):
    cases = MappingProxyType({"linf": (LInf(), lambda: linf_e)})


def test_every_coordinate_is_perturbed_by_rho():
    (perturbation,) = e(LInf(), point([torch.tensor([1e-30, -1e30, 0.0])]))
    assert perturbation.tolist() == pytest.approx([RHO, -RHO, 0.0])
