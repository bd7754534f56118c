"""AE-SAM against its slow reference; its memory in checkpoints."""

import math

import pytest
import torch
from named_methods import passes_per_step
from torch import nn

import steppe
from steppe import SAM, GradientNormThreshold
from support import DRIVES, by_closure, saved_and_loaded

STEPS = 40


def noisy(w, t):
    """A loss whose gradient norm varies much from step to step."""
    a = 1.0 + 2.0 * math.sin(7.0 * t) ** 2
    return (a * w.square()).sum() + torch.sin(3 * w).sum()


def decisions(start, lambda_1, lambda_2, delta):
    """Algorithm of arXiv 2304.14647 with plain SGD, lr 0.05, rho 0.1; returns the weights and the decisions."""
    w, mu, variance, is_perturbed = start.clone(), 0.0, 0.0, []
    for t in range(STEPS):

        def gradient(w, t=t):
            w = w.clone().requires_grad_()
            return torch.autograd.grad(noisy(w, t), w)[0]

        g = gradient(w)
        square = float(g @ g)
        mu = delta * mu + (1 - delta) * square
        variance = delta * variance + (1 - delta) * (square - mu) ** 2
        c = t / STEPS * lambda_1 + (1 - t / STEPS) * lambda_2
        is_perturbed.append(square >= mu + c * math.sqrt(variance))
        if is_perturbed[-1]:
            g = gradient(w + 0.1 * g / math.sqrt(square))
        w = w - 0.05 * g
    return w, is_perturbed


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("hyperparameters", [(-1.0, 1.0, 0.9), (-0.5, 0.5, 0.5)])
def test_cadence_matches_its_slow_reference(drive, hyperparameters):
    start = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    w = nn.Parameter(start.clone())
    optimizer = SAM(torch.optim.SGD([w], lr=0.05), 0.1, cadence=GradientNormThreshold(STEPS, *hyperparameters))
    want, is_perturbed = decisions(start, *hyperparameters)
    calls = []
    for t in range(STEPS):
        DRIVES[drive](optimizer, lambda t=t: (calls.append(t), noisy(w, t))[1])
    torch.testing.assert_close(w.detach(), want, rtol=1e-12, atol=1e-12)
    assert 5 < sum(is_perturbed) < 35
    if drive != "classic":
        assert [calls.count(t) == 2 for t in range(STEPS)] == is_perturbed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumed_run_has_the_same_bits(dtype):
    """mu and sigma are wider than the weights, and no checkpoint may round them."""

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
        state = saved_and_loaded(first.state_dict())
        resumed, second = make()
        resumed.data.copy_(w.data)
        (second.base if via_base else second).load_state_dict(state)
        run(resumed, second, range(13, STEPS))
        assert torch.equal(resumed, straight)
        assert str(second.state_dict()) == str(optimizer.state_dict())


def test_gradient_that_is_not_finite_leaves_the_memory_finite():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.05), 0.1, cadence=GradientNormThreshold(STEPS))
    by_closure(optimizer, lambda: w.square().sum())
    with pytest.warns(RuntimeWarning, match="skipped"):
        by_closure(optimizer, lambda: w.square().sum() * float("inf"))
    by_closure(optimizer, lambda: w.square().sum())
    assert all(math.isfinite(v) for v in optimizer.state_dict()["state"][0].values())


def test_single_pass_perturbation_is_an_error():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    base = torch.optim.SGD([w], lr=0.05, momentum=0.9)
    optimizer = SAM(base, 0.1, perturbation=steppe.Momentum(), cadence=GradientNormThreshold(STEPS))
    with pytest.raises(ValueError, match="needs the gradient at w"):
        by_closure(optimizer, lambda: w.square().sum())


@pytest.mark.parametrize(
    ("wrong", "message"), [({"total_steps": 0}, "total_steps must be 1"), ({"delta": 1.0}, "delta must be")]
)
def test_hyperparameter_out_of_range_is_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        GradientNormThreshold(**{"total_steps": 10, **wrong})


def test_step_costs_between_one_and_two_passes():
    assert 1.0 < passes_per_step("aesam") < 2.0
