"""The trace against known spectra."""

import math

import pytest
import torch
from known_hessians import (
    SPECTRUM,
    assert_determined_by_seed,
    matrix,
)

from steppe.flatness import eigenvalues, trace


def test_trace_is_unbiased_with_a_correct_standard_error():
    exact = sum(SPECTRUM)
    found = [trace(matrix(), probes=8, seed=seed) for seed in range(60)]
    inside = sum(abs(f.value - exact) <= 2 * f.error for f in found)
    assert 48 <= inside <= 60  # 92 % of Student's t with 7 degrees of freedom lie within two standard errors
    mean = sum(f.value for f in found) / 60
    spread = math.sqrt(sum(f.error**2 for f in found)) / 60
    assert abs(mean - exact) <= 4 * spread


def test_deflation_lowers_the_standard_error_of_the_trace():
    hessian = matrix()
    top = eigenvalues(hessian, 4, tol=1e-9)
    exact, plain, deflated = sum(SPECTRUM), trace(hessian, probes=40), trace(hessian, probes=40, top=top)
    assert deflated.error < plain.error / 2
    assert abs(deflated.value - exact) <= 4 * deflated.error
    (everything,) = [trace(hessian, probes=1, top=eigenvalues(hessian, 96, tol=1e-9))]
    assert everything.value == pytest.approx(exact, rel=1e-9)


def test_trace_without_probes_raises():
    with pytest.raises(ValueError, match="probes must be 1 or more"):
        trace(matrix(), probes=0)


def test_seed_alone_determines_the_trace():
    assert_determined_by_seed(lambda seed: torch.tensor(trace(matrix(), probes=3, seed=seed).value))
