"""Which data climbs: a fraction of the batch, selected samples, micro-batches; each against the formula."""

import pytest
import torch
from torch import nn

import steppe
from steppe import SAM, closures
from support import batch, bits, net

RHO = 0.3


def problem(n=8, seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)


def per_sample(w, x):
    return torch.sin(x @ w) + (x @ w).square() / 5


def gradient(w, x):
    w = w.clone().requires_grad_()
    return torch.autograd.grad(per_sample(w, x).mean(), w)[0]


def build(w, **rules):
    p = nn.Parameter(w.clone())
    return p, SAM(torch.optim.SGD([p], lr=0.1), RHO, **rules)


@pytest.mark.parametrize(("share", "climbing"), [(0.25, 2), (0.3, 3), (1.0, 8)])
def test_a_fraction_climbs_and_all_go_down(share, climbing):
    w, x = problem()
    p, optimizer = build(w)
    seen = []
    for _ in range(20):

        def loss(x):
            seen.append(len(x))
            return per_sample(p, x).mean()

        optimizer.step(closures.fraction(optimizer, loss, (x,), fraction=share))
        g = gradient(w, x[:climbing])
        w = w - 0.1 * gradient(w + RHO * g / g.norm(), x)
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
    assert seen == [climbing, 8] * 20


def test_a_quarter_costs_one_and_a_quarter_and_a_plain_step_sees_all():
    w, x = problem()
    p, optimizer = build(w, cadence=steppe.Periodic(2))
    samples = []

    def loss(x):
        samples.append(len(x))
        return per_sample(p, x).mean()

    for _ in range(4):
        optimizer.step(closures.fraction(optimizer, loss, (x,)))
    assert samples == [2, 8, 8, 2, 8, 8]
    assert sum(samples[:2]) / 8 == 1.25


def test_a_fraction_with_several_climbs_and_around_a_plain_optimizer():
    w, x = problem()
    p, optimizer = build(w, perturbation=steppe.AscentSteps(steppe.L2(), 2))
    samples = []

    def loss(x):
        samples.append(len(x))
        return per_sample(p, x).mean()

    optimizer.step(closures.fraction(optimizer, loss, (x,)))
    assert samples == [2, 2, 8]


def test_a_cadence_that_goes_by_the_gradient_cannot_have_a_fraction():
    w, x = problem()
    p, optimizer = build(w, cadence=steppe.GradientNormThreshold(steps=10))
    with pytest.raises(RuntimeError, match="nobody knows yet"):
        optimizer.step(closures.fraction(optimizer, lambda x: per_sample(p, x).mean(), (x,)))
    assert torch.equal(p.detach(), w)


def test_the_samples_whose_loss_rises_most_go_down():
    w, x = problem()
    p, optimizer = build(w)
    for _ in range(20):
        optimizer.step(closures.selected(optimizer, lambda x: per_sample(p, x), (x,), gamma=0.5))
        g = gradient(w, x)
        climbed = w + RHO * g / g.norm()
        rise = per_sample(climbed, x) - per_sample(w, x)
        chosen = sorted(range(8), key=lambda i: -rise[i])[:4]
        w = w - 0.1 * gradient(climbed, x[chosen])
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_selecting_all_is_sam_and_a_plain_step_selects_nothing():
    w, x = problem()
    p, optimizer = build(w, cadence=steppe.Periodic(2))
    q, reference = build(w, cadence=steppe.Periodic(2))
    sizes = []

    def losses(x):
        sizes.append((len(x), torch.is_grad_enabled()))
        return per_sample(p, x)

    for gamma in (1.0, 0.4):
        optimizer.step(closures.selected(optimizer, losses, (x,), gamma=gamma))
        reference.step(closures.fraction(reference, lambda x: per_sample(q, x).mean(), (x,), fraction=1.0))
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert sizes == [(8, True), (8, False), (8, True), (8, True)]


def test_a_selection_needs_losses_at_w_and_one_a_sample():
    w, x = problem()
    p, optimizer = build(w)
    with pytest.raises(ValueError, match="needs the loss of each"):
        optimizer.step(closures.selected(optimizer, lambda x: per_sample(p, x).mean(), (x,)))
    ahead = SAM(torch.optim.SGD([p], lr=0.1, momentum=0.9), perturbation=steppe.Momentum())
    with pytest.raises(RuntimeError, match="no losses at w"):
        ahead.step(closures.selected(ahead, lambda x: per_sample(p, x), (x,)))


@pytest.mark.parametrize("m", [1, 3, 8, 100])
def test_each_micro_batch_has_its_own_perturbation(m):
    w, x = problem()
    p, optimizer = build(w)
    for _ in range(20):
        want = per_sample(w, x).mean()
        loss = closures.micro_batches(optimizer, lambda x: per_sample(p, x).mean(), (x,), m=m)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
        down = torch.zeros(3, dtype=torch.float64)
        for part in x.split(m):
            g = gradient(w, part)
            down += gradient(w + RHO * g / g.norm(), part) * len(part) / len(x)
        w = w - 0.1 * down
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_micro_batches_with_a_nan_skip_the_step_as_a_whole():
    w, x = problem()
    p, optimizer = build(w)
    x[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="skipped"):
        closures.micro_batches(optimizer, lambda x: per_sample(p, x).mean(), (x,), m=2)
    assert torch.equal(p.detach(), w)


def test_buffers_are_those_of_the_first_pass():
    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x, y = batch()
    loss = nn.CrossEntropyLoss(reduction="none")
    optimizer.step(closures.selected(optimizer, lambda x, y: loss(model(x), y), (x, y)))
    assert int(model.layers[1].num_batches_tracked) == 1
    twin = net()
    twin(x)
    assert bits(b for b in model.buffers()) == bits(b for b in twin.buffers())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, x: closures.fraction(o, len, (x,), fraction=0.0), "fraction must be more than 0"),
        (lambda o, x: closures.fraction(o, len, (x, x[:3])), "all of the same length"),
        (lambda o, x: closures.fraction(o, len, ()), "at least one tensor"),
        (lambda o, x: closures.fraction(o, len, (x[:0],)), "at least one sample"),
        (lambda o, x: closures.selected(o, len, (x,), gamma=1.5), "gamma must be more than 0"),
        (lambda o, x: closures.micro_batches(o, len, (x,), m=0), "m must be 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    w, x = problem()
    _, optimizer = build(w)
    with pytest.raises(ValueError, match=message):
        call(optimizer, x)
