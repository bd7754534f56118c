"""WSAM, coupled and decoupled: against slow references; special cases; `.grad` between passes and step."""

from types import MappingProxyType

import pytest
import torch
from combinations import CombinationTests, Reference, assert_is_base, assert_is_sam
from named_methods import passes_per_step
from own_step_problem import (
    STABLE_BASES,
    Loss,
    assert_close,
    base_step,
    flat,
    gradient,
    loss,
    normalized,
    start,
    trained,
)
from torch import Tensor

import steppe
from checks import split
from steppe.methods.wsam import DecoupledWSAM, WeightedSharpness
from support import BASES, DRIVES, bits, by_closure, by_passes, model_bits, net, plain, train

RHO, GAMMA = 0.3, 0.7


def wsam(gamma: float) -> Reference:
    """arXiv 2305.15817: L_WSAM = L + gamma / (1 - gamma) (L_SAM - L), written as a mean of the two gradients."""

    def update(g: Tensor, g_tilde: Tensor | None, _: dict[str, Tensor]) -> Tensor:
        if g_tilde is None:
            return g
        return (1 - 2 * gamma) / (1 - gamma) * g + gamma / (1 - gamma) * g_tilde

    return update


class TestWeightedSharpness(CombinationTests):
    cases = MappingProxyType(
        {
            "interval 1": (WeightedSharpness(gamma=0.8), wsam(0.8), 1),
            "interval 2": (WeightedSharpness(gamma=0.3), wsam(0.3), 2),
        }
    )


def test_step_costs_two_passes():
    assert passes_per_step("wsam") == 2.0


def test_gamma_one_half_is_sam():
    assert_is_sam(WeightedSharpness(0.5))


def test_gamma_zero_is_the_base():
    assert_is_base(WeightedSharpness(0.0))


@pytest.mark.parametrize("gamma", [1.0, -0.1])
def test_gamma_out_of_range_is_an_error(gamma):
    with pytest.raises(ValueError, match="gamma must be at least 0 and less than 1"):
        WeightedSharpness(gamma)


# Decoupled.


def decoupled_wsam(L: Loss, w: Tensor, base, steps: int, rho: float, gamma: float) -> Tensor:
    """arXiv 2305.15817, the algorithm with weight decouple."""
    w = w.detach().clone().requires_grad_()
    optimizer = base([w])
    for t in range(steps):
        g = gradient(L, w, t)
        delta = rho * normalized(g)
        g_tilde = gradient(L, w.detach() + delta, t)
        base_step(optimizer, w, g)
        with torch.no_grad():
            w -= optimizer.param_groups[0]["lr"] * gamma / (1 - gamma) * (g_tilde - g)
    return w.detach()


def reference(base):
    return decoupled_wsam(loss, start(), STABLE_BASES[base], 20, RHO, GAMMA)


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", STABLE_BASES)
def test_decoupled_wsam_matches_its_slow_reference(base, drive):
    assert_close(trained(lambda ps: DecoupledWSAM(STABLE_BASES[base](ps), RHO, gamma=GAMMA), drive), reference(base))


@pytest.mark.parametrize("base", STABLE_BASES)
def test_mutant_other_rho_gamma_or_coupled_form_is_killed(base):
    mutants = [
        lambda ps: DecoupledWSAM(STABLE_BASES[base](ps), 0.999 * RHO, gamma=GAMMA),
        lambda ps: DecoupledWSAM(STABLE_BASES[base](ps), 0.0, gamma=GAMMA),
        lambda ps: DecoupledWSAM(STABLE_BASES[base](ps), RHO, gamma=0.999 * GAMMA),
        lambda ps: DecoupledWSAM(STABLE_BASES[base](ps), RHO, gamma=0.0),
    ]
    if base != "sgd":
        mutants.append(lambda ps: steppe.SAM(STABLE_BASES[base](ps), RHO, combination=WeightedSharpness(GAMMA)))
    for mutant in mutants:
        with pytest.raises(AssertionError):
            assert_close(trained(mutant), reference(base))


def test_decoupled_form_with_plain_sgd_is_the_coupled_form():
    coupled = trained(lambda ps: steppe.SAM(STABLE_BASES["sgd"](ps), RHO, combination=WeightedSharpness(GAMMA)))
    assert_close(trained(lambda ps: DecoupledWSAM(STABLE_BASES["sgd"](ps), RHO, gamma=GAMMA)), coupled)


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("rho", "gamma"), [(0.3, 0.0), (0.0, 0.8)])
def test_decoupled_form_with_gamma_or_rho_zero_is_the_base_to_the_bit(base, drive, rho, gamma):
    model, twin = net(), net()
    optimizer = DecoupledWSAM(BASES[base](model.parameters()), rho, gamma=gamma, model=model)
    torch.manual_seed(7)
    train(model, optimizer, DRIVES[drive], 5)
    torch.manual_seed(7)
    train(twin, BASES[base](twin.parameters()), plain, 5)
    assert model_bits(model) == model_bits(twin)


def test_sharpness_term_is_subtracted_with_the_current_learning_rate_of_each_group():
    a, b = (torch.nn.Parameter(torch.tensor([v])) for v in (1.0, 2.0))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": torch.tensor(0.2)}]
    optimizer = DecoupledWSAM(torch.optim.SGD(groups, lr=0.1), rho=0.5, gamma=0.75)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    by_closure(optimizer, lambda: (a * a + b * b).sum())
    scheduler.step()
    e = 0.5 / 5**0.5
    assert a.item() == pytest.approx(1 - 0.1 * 2 - 0.1 * 3 * 2 * e, rel=1e-6)
    assert b.item() == pytest.approx(2 - 0.2 * 4 - 0.2 * 3 * 4 * e, rel=1e-6)
    x = a.item(), b.item()
    by_closure(optimizer, lambda: (a * a + b * b).sum())
    e = 0.5 / (x[0] ** 2 + x[1] ** 2) ** 0.5
    assert a.item() == pytest.approx(x[0] * (1 - 0.05 * 2 - 0.05 * 3 * 2 * e), rel=1e-6)
    assert b.item() == pytest.approx(x[1] * (1 - 0.1 * 2 - 0.1 * 3 * 2 * e), rel=1e-6)


def test_maximize_mirrors_minimization():
    w, v = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    down = DecoupledWSAM(torch.optim.SGD([w], lr=1e-3), rho=0.5)
    up = DecoupledWSAM(torch.optim.SGD([v], lr=1e-3, maximize=True), rho=0.5)
    for _ in range(4):
        by_closure(down, lambda: w.pow(4).sum())
        by_closure(up, lambda: -v.pow(4).sum())
    assert bits([w]) == bits([v])


@pytest.mark.parametrize("base", STABLE_BASES)
def test_unscaling_between_passes_and_step_unscales_the_sharpness_term(base):
    params = [torch.nn.Parameter(p) for p in split(start())]
    optimizer = DecoupledWSAM(STABLE_BASES[base](params), RHO, gamma=GAMMA)
    for t in range(20):
        for sam_pass in optimizer.passes():
            with sam_pass:
                (1024 * loss(flat(params), t)).backward()
        for p in params:
            p.grad /= 1024
        optimizer.step()
    assert_close(flat(params).detach(), reference(base))


def test_each_accumulated_micro_batch_has_its_own_perturbation():
    w = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = DecoupledWSAM(torch.optim.SGD([w], lr=0.1), rho=0.5, gamma=0.75)
    for i, a in enumerate((1.0, -2.0)):
        for sam_pass in optimizer.passes(accumulate=i > 0):
            with sam_pass:
                (a * w**3 / 2).sum().backward()
    optimizer.step()
    g = lambda a, w: 3 * a * w**2 / 2  # noqa: E731
    unperturbed = g(1, 3) + g(-2, 3)
    sharpness = (g(1, 3.5) - g(1, 3)) + (g(-2, 2.5) - g(-2, 3))
    assert w.item() == pytest.approx(3 - 0.1 * unperturbed - 0.1 * 3 * sharpness, rel=1e-12)


def test_zero_grad_clears_the_sharpness_term():
    w = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = DecoupledWSAM(torch.optim.SGD([w], lr=0.1), rho=0.5, gamma=0.75)
    for sam_pass in optimizer.passes():
        with sam_pass:
            w.pow(4).sum().backward()
    optimizer.zero_grad()
    w.grad = torch.zeros(1)
    with pytest.warns(UserWarning, match="a plain step"):
        optimizer.step()
    assert w.item() == 3.0


def test_unperturbed_step_is_a_step_of_the_base():
    model, twin = net(), net()
    optimizer = DecoupledWSAM(
        BASES["momentum"](model.parameters()), 0.3, cadence=steppe.LatePhase(1.0, 100), model=model
    )
    torch.manual_seed(7)
    train(model, optimizer, by_passes, 3)
    torch.manual_seed(7)
    train(twin, BASES["momentum"](twin.parameters()), plain, 3)
    assert model_bits(model) == model_bits(twin)


def test_decoupled_argument_that_does_not_fit_is_an_error_and_the_class_form_works():
    w = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="gamma must be at least 0 and less than 1"):
        DecoupledWSAM(torch.optim.SGD([w], lr=0.1), gamma=1.0)

    class Fixed(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    with pytest.raises(ValueError, match=r"has no 'lr'.*coupled form"):
        DecoupledWSAM(Fixed([w]))
    optimizer = DecoupledWSAM([w], torch.optim.SGD, rho=0.2, gamma=0.8, lr=0.1)
    assert optimizer.combination.gamma == 0.8
