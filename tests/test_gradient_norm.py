"""AE-SAM's cadence: against a slow reference, resumed in the middle, and what it refuses."""

import io
import math

import pytest
import torch
from torch import nn

import steppe
from steppe import SAM, GradientNormThreshold
from support import DRIVES, by_closure

STEPS = 40


def noisy(w, t):
    """A loss whose gradient's length jumps about."""
    a = 1.0 + 2.0 * math.sin(7.0 * t) ** 2
    return (a * w.square()).sum() + torch.sin(3 * w).sum()


def decisions(start, lambda_1, lambda_2, delta):
    """Algorithm of arXiv 2304.14647 with plain SGD, lr 0.05, rho 0.1; returns the weights and who climbed."""
    w, mu, variance, climbed = start.clone(), 0.0, 0.0, []
    for t in range(STEPS):

        def gradient(at, t=t):
            at = at.clone().requires_grad_()
            return torch.autograd.grad(noisy(at, t), at)[0]

        g = gradient(w)
        square = float(g @ g)
        mu = delta * mu + (1 - delta) * square
        variance = delta * variance + (1 - delta) * (square - mu) ** 2
        c = t / STEPS * lambda_1 + (1 - t / STEPS) * lambda_2
        climbed.append(square >= mu + c * math.sqrt(variance))
        if climbed[-1]:
            g = gradient(w + 0.1 * g / math.sqrt(square))
        w = w - 0.05 * g
    return w, climbed


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("how", [(-1.0, 1.0, 0.9), (-0.5, 0.5, 0.5)])
def test_it_matches_the_slow_reference(drive, how):
    start = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    w = nn.Parameter(start.clone())
    optimizer = SAM(torch.optim.SGD([w], lr=0.05), 0.1, cadence=GradientNormThreshold(STEPS, *how))
    want, climbed = decisions(start, *how)
    calls = []
    for t in range(STEPS):
        DRIVES[drive](optimizer, lambda t=t: (calls.append(t), noisy(w, t))[1])
    torch.testing.assert_close(w.detach(), want, rtol=1e-12, atol=1e-12)
    assert 5 < sum(climbed) < 35
    if drive != "classic":
        assert [calls.count(t) == 2 for t in range(STEPS)] == climbed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_resumes_to_the_bit(dtype):
    """Its running numbers are wider than the weights, and no checkpoint may round them."""

    def run(w, optimizer, ts):
        for t in ts:
            by_closure(optimizer, lambda t=t: noisy(w, t))

    def make():
        w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=dtype))
        return w, SAM(torch.optim.SGD([w], lr=0.05), 0.1, cadence=GradientNormThreshold(STEPS))

    straight, optimizer = make()
    run(straight, optimizer, range(STEPS))
    for via_base in (False, True):
        w, first = make()
        run(w, first, range(13))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed, second = make()
        resumed.data.copy_(w.data)
        (second.base if via_base else second).load_state_dict(torch.load(file, weights_only=True))
        run(resumed, second, range(13, STEPS))
        assert torch.equal(resumed, straight)
        assert str(second.state_dict()) == str(optimizer.state_dict())


def test_a_gradient_that_is_not_finite_is_not_remembered():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.05), 0.1, cadence=GradientNormThreshold(STEPS))
    by_closure(optimizer, lambda: w.square().sum())
    with pytest.warns(RuntimeWarning, match="skipped"):
        by_closure(optimizer, lambda: w.square().sum() * float("inf"))
    by_closure(optimizer, lambda: w.square().sum())
    assert all(math.isfinite(v) for v in optimizer.state_dict()["state"][0].values())


def test_with_a_perturbation_that_makes_no_pass_at_w_it_is_refused():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    base = torch.optim.SGD([w], lr=0.05, momentum=0.9)
    optimizer = SAM(base, 0.1, perturbation=steppe.Momentum(), cadence=GradientNormThreshold(STEPS))
    with pytest.raises(ValueError, match="asks for the gradient at w"):
        by_closure(optimizer, lambda: w.square().sum())


@pytest.mark.parametrize(("wrong", "message"), [({"steps": 0}, "steps must be 1"), ({"delta": 1.0}, "delta must be")])
def test_wrong_hyperparameters_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GradientNormThreshold(**{"steps": 10, **wrong})
