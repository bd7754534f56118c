"""The perturbation computed on a fraction of the batch, against the formula."""

import pytest
import torch
from linear_batch import RHO, build, gradient, per_sample, problem
from torch import nn

import steppe
from steppe import closures, variants


@pytest.mark.parametrize(("share", "samples"), [(0.25, 2), (0.3, 3), (1.0, 8)])
def test_fraction_gives_the_perturbation_and_all_samples_the_update(share, samples):
    w, x = problem()
    p, optimizer = build(w)
    sizes = []
    for _ in range(20):

        def loss(x):
            sizes.append(len(x))
            return per_sample(p, x).mean()

        optimizer.step(closures.fraction(optimizer, loss, (x,), fraction=share))
        g = gradient(w, x[:samples])
        w = w - 0.1 * gradient(w + RHO * g / g.norm(), x)
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
    assert sizes == [samples, 8] * 20


def test_quarter_costs_1_25_passes_and_a_plain_step_uses_all_samples():
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


def test_named_sam_with_a_quarter_costs_1_25_passes():
    w, x = nn.Parameter(torch.randn(3)), torch.randn(64, 3)
    samples = []

    def loss(x):
        samples.append(len(x))
        return (x @ w).square().mean()

    sam = variants.sam(torch.optim.SGD([w], lr=0.01))
    sam.step(closures.fraction(sam, loss, (x,), fraction=0.25))
    assert sum(samples) / 64 == 1.25


def test_each_of_several_ascent_steps_uses_the_fraction():
    w, x = problem()
    p, optimizer = build(w, perturbation=steppe.AscentSteps(steppe.L2(), 2))
    samples = []

    def loss(x):
        samples.append(len(x))
        return per_sample(p, x).mean()

    optimizer.step(closures.fraction(optimizer, loss, (x,)))
    assert samples == [2, 2, 8]


def test_cadence_that_depends_on_the_gradient_is_an_error():
    w, x = problem()
    p, optimizer = build(w, cadence=steppe.GradientNormThreshold(total_steps=10))
    with pytest.raises(RuntimeError, match="it is not known whether a part of the batch is enough"):
        optimizer.step(closures.fraction(optimizer, lambda x: per_sample(p, x).mean(), (x,)))
    assert torch.equal(p.detach(), w)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, x: closures.fraction(o, len, (x,), fraction=0.0), "fraction must be more than 0"),
        (lambda o, x: closures.fraction(o, len, (x, x[:3])), "all of the same length"),
        (lambda o, x: closures.fraction(o, len, ()), "at least one tensor"),
        (lambda o, x: closures.fraction(o, len, (x[:0],)), "at least one sample"),
    ],
)
def test_fraction_or_batch_that_does_not_fit_is_an_error(call, message):
    w, x = problem()
    _, optimizer = build(w)
    with pytest.raises(ValueError, match=message):
        call(optimizer, x)


@pytest.mark.parametrize("batch", [{"x": torch.ones(8, 3)}, torch.ones(8, 3), (torch.ones(8, 3), [0] * 8)])
@pytest.mark.parametrize(
    "closure_of",
    [closures.fraction, closures.selected, lambda *args: closures.micro_batches(*args, m=2)],
    ids=["fraction", "selected", "micro_batches"],
)
def test_a_batch_that_is_no_tuple_of_tensors_is_refused_and_not_split_by_its_rows(closure_of, batch):
    _, optimizer = build(problem()[0])
    with pytest.raises(TypeError, match="give a tuple of tensors"):
        closure_of(optimizer, lambda *args: args[0].sum(), batch)


@pytest.mark.parametrize("closure_of", [closures.fraction, closures.selected])
def test_the_returned_loss_has_no_graph(closure_of):
    w, x = problem()
    p, optimizer = build(w)
    mean = closure_of is closures.fraction
    loss = optimizer.step(closure_of(optimizer, lambda x: per_sample(p, x).mean() if mean else per_sample(p, x), (x,)))
    assert not loss.requires_grad
