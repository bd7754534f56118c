"""Contract C35 for the measures: what is counted is a whole number, so that NaN, True or 2.5 are noticed at once."""

import math

import numpy as np
import pytest
import torch
from known_hessians import matrix, quadratic

from steppe import flatness

COUNTS = {
    "ascent_steps": lambda found, n: flatness.sharpness(found, 0.1, ascent_steps=n),
    "restarts": lambda found, n: flatness.sharpness(found, 0.1, restarts=n),
    "pairs": lambda found, n: flatness.average_sharpness(found, 0.1, pairs=n),
    "k": lambda found, n: flatness.eigenvalues(matrix(), n),
    "probes": lambda found, n: flatness.trace(matrix(), probes=n),
    "num_iterations": lambda found, n: flatness.density(matrix(), num_iterations=n),
    "count": lambda found, n: flatness.random_directions(found, n),
    "points": lambda found, n: flatness.interpolation(found, found.weights, points=n),
    "total_steps": lambda found, n: flatness.connect(found, found.weights, total_steps=n),
    "m": lambda found, n: flatness.m_sharpness(found, 0.1, m=n),
    "parts": lambda found, n: flatness.m_sharpness(found, 0.1, m=1, parts=n),
    "bits": lambda found, n: flatness.rounded(found.weights, n),
}


@pytest.mark.parametrize("value", [math.nan, 2.5, True, "2"])
@pytest.mark.parametrize("name", COUNTS)
def test_c35_count_of_a_measure_that_is_no_whole_number_raises(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        COUNTS[name](quadratic(torch.eye(2)), value)


def test_whole_numbers_of_numpy_are_counts_of_a_measure():
    found = quadratic(torch.eye(2))
    of_int, of_numpy = (flatness.average_sharpness(found, 0.1, pairs=n).value for n in (2, np.int64(2)))
    assert of_int == of_numpy
