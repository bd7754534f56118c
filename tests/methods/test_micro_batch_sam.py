"""A perturbation for each micro-batch, against the formula."""

import pytest
import torch
from linear_batch import RHO, build, gradient, per_sample, problem

from steppe import closures


@pytest.mark.parametrize("m", [1, 3, 8, 100])
def test_each_micro_batch_has_its_own_perturbation(m):
    w, x = problem()
    p, optimizer = build(w)
    for _ in range(20):
        want = per_sample(w, x).mean()
        loss = closures.micro_batches(optimizer, lambda x: per_sample(p, x).mean(), (x,), m=m)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
        update = torch.zeros(3, dtype=torch.float64)
        for part in x.split(m):
            g = gradient(w, part)
            update += gradient(w + RHO * g / g.norm(), part) * len(part) / len(x)
        w = w - 0.1 * update
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_nan_in_one_micro_batch_skips_the_whole_step():
    w, x = problem()
    p, optimizer = build(w)
    x[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="skipped"):
        closures.micro_batches(optimizer, lambda x: per_sample(p, x).mean(), (x,), m=2)
    assert torch.equal(p.detach(), w)


def test_m_of_zero_is_an_error():
    w, x = problem()
    _, optimizer = build(w)
    with pytest.raises(ValueError, match="m must be 1 or more"):
        closures.micro_batches(optimizer, len, (x,), m=0)
