"""ESAM: the random share of the weights, and the selection of samples, each against its definition."""

import math
from types import MappingProxyType

import pytest
import torch
from linear_batch import RHO, build, gradient, per_sample, problem
from masks_of_rules import point
from named_methods import passes_per_step
from perturbations import PerturbationTests, assert_equals_sam
from slow_reference import Tensors, along, generator
from torch import nn

import steppe
from steppe import SAM, closures, variants
from steppe.methods.esam import Stochastic
from steppe.rules.l2 import L2
from steppe.rules.linf import LInf
from support import batch, bits, net


class StochasticE:
    """e_i = rho g_i / (beta |g|) with probability beta, else 0 (arXiv 2110.03141); or so for whole tensors."""

    def __init__(self, beta: float, seed: int, whole: bool = False) -> None:
        self.beta, self.seed, self.whole, self.t = beta, seed, whole, 0

    def __call__(self, g: Tensors, rho: float, w: Tensors | None = None) -> Tensors:
        t, self.t = self.t, self.t + 1
        draws = [generator("Stochastic", self.seed, t, i) for i in range(len(g))]
        if self.whole:
            is_drawn = [draw.initial_seed() % 2**64 < self.beta * 2**64 for draw in draws]
            d = [part if drawn else 0 * part for part, drawn in zip(g, is_drawn, strict=True)]
            return along(d, rho / self.beta) if any(is_drawn) else d
        m = [torch.rand(p.shape, generator=draw) < self.beta for p, draw in zip(g, draws, strict=True)]
        return [part * mask / self.beta for part, mask in zip(along(g, rho), m, strict=True)]


class TestStochastic(PerturbationTests):
    cases = MappingProxyType(
        {
            "single weights": (Stochastic(L2()), lambda: StochasticE(0.6, 0)),
            "whole tensors": (
                Stochastic(L2(), beta=0.5, seed=5, whole=True),
                lambda: StochasticE(0.5, 5, whole=True),
            ),
        }
    )


def test_plain_closure_costs_two_passes():
    assert passes_per_step("esam") == 2.0


def test_beta_one_is_sam():
    assert_equals_sam(Stochastic(L2(), beta=1.0))


@pytest.mark.parametrize("whole", [False, True])
def test_e_is_that_of_the_rule_on_average(whole):
    g = [torch.randn(40, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(5)]
    rule, want = LInf(), torch.cat(g).sign()
    total, steps, shares = torch.zeros(200, dtype=torch.float64), 3000, []
    for step in range(steps):
        direction, scale = Stochastic(rule, beta=0.4, whole=whole)(point(g, step))
        e = torch.cat([torch.zeros(40) if d is None else scale * d for d in direction])
        shares.append((e != 0).double().mean())
        total += e
    standard_error = math.sqrt((1 - 0.4) / 0.4 / steps)
    assert (total / steps - want).abs().max() < 5 * standard_error
    assert torch.stack(shares).mean() == pytest.approx(0.4, abs=0.03)
    assert torch.stack(shares).std() > 0.02


def test_rule_gets_only_the_tensors_drawn_as_a_whole():
    g = [torch.tensor([float(3 + i)]) for i in range(6)]
    direction, scale = Stochastic(L2(), beta=0.5, seed=1, whole=True)(point(g))
    chosen = [part for part in direction if part is not None]
    assert 0 < len(chosen) < 6
    assert (scale * torch.cat(chosen)).norm().item() == pytest.approx(2.0)


def test_draws_are_independent_of_those_of_a_cadence_with_the_same_seed():
    cadence = steppe.Bernoulli(p=0.5, seed=0)
    rule = Stochastic(LInf(), beta=0.5, seed=0, whole=True)
    g = [torch.ones(1)]
    both = [(cadence(point(g, step)), rule(point(g, step)).direction[0] is not None) for step in range(1000)]
    at_perturbed_steps = [drawn for perturbed, drawn in both if perturbed]
    assert sum(at_perturbed_steps) / len(at_perturbed_steps) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stochastic(L2(), beta=0.0), "beta must be more than 0 and at most 1, got 0.0"),
        (lambda: Stochastic(L2(), beta=1.1), "beta must be"),
        (
            lambda: Stochastic(steppe.AscentSteps(L2(), ascent_steps=3)),
            r"makes 3 ascent steps.*Steps\(Stochastic\(L2\(\)\)\)",
        ),
    ],
)
def test_hyperparameter_or_rule_that_does_not_fit_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The selection of samples.


def test_update_uses_the_samples_whose_loss_rises_most():
    w, x = problem()
    p, optimizer = build(w)
    for _ in range(20):
        optimizer.step(closures.selected(optimizer, lambda x: per_sample(p, x), (x,), gamma=0.5))
        g = gradient(w, x)
        perturbed = w + RHO * g / g.norm()
        rise = per_sample(perturbed, x) - per_sample(w, x)
        chosen = sorted(range(8), key=lambda i: -rise[i])[:4]
        w = w - 0.1 * gradient(perturbed, x[chosen])
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_selection_of_all_samples_is_sam_and_plain_steps_use_all():
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


def test_selection_costs_4_3_plus_gamma_passes():
    """A sample costs one pass with its backward, and a third without."""
    w, x = nn.Parameter(torch.randn(3)), torch.randn(64, 3)
    passes = []

    def losses(x):
        passes.append(len(x) * (1.0 if torch.is_grad_enabled() else 1 / 3))
        return (x @ w).square()

    esam = variants.esam(torch.optim.SGD([w], lr=0.01))
    esam.step(closures.selected(esam, losses, (x,), gamma=0.5))
    assert sum(passes) / 64 == pytest.approx(4 / 3 + 0.5)


def test_losses_that_cannot_be_selected_from_are_an_error():
    w, x = problem()
    p, optimizer = build(w)
    with pytest.raises(ValueError, match="needs the loss of each"):
        optimizer.step(closures.selected(optimizer, lambda x: per_sample(p, x).mean(), (x,)))
    single_pass = SAM(torch.optim.SGD([p], lr=0.1, momentum=0.9), perturbation=steppe.Momentum())
    with pytest.raises(RuntimeError, match="no losses at w"):
        single_pass.step(closures.selected(single_pass, lambda x: per_sample(p, x), (x,)))


def test_gamma_out_of_range_is_an_error():
    w, x = problem()
    _, optimizer = build(w)
    with pytest.raises(ValueError, match="gamma must be more than 0"):
        closures.selected(optimizer, len, (x,), gamma=1.5)


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
