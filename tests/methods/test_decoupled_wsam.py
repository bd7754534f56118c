"""Decoupled WSAM: against its slow reference, its reductions, and what is done to .grad between passes and step."""

import pytest
import torch
from problems import CALM, agree, flat, loss, start, trained
from reference_methods import decoupled_wsam

import steppe
from steppe.methods.wsam import DecoupledWSAM, WeightedSharpness
from support import BASES, DRIVES, bits, by_closure, by_passes, model_bits, net, plain, train

RHO, GAMMA = 0.3, 0.7


def want(base, gamma=GAMMA, rho=RHO):
    return decoupled_wsam(loss, start(), CALM[base], 20, rho, gamma)


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", CALM)
def test_it_matches_its_slow_reference(base, drive):
    agree(trained(lambda ps: DecoupledWSAM(CALM[base](ps), RHO, gamma=GAMMA), drive), want(base))


@pytest.mark.parametrize("base", CALM)
def test_mutants_are_killed(base):
    mutants = [
        lambda ps: DecoupledWSAM(CALM[base](ps), 0.999 * RHO, gamma=GAMMA),
        lambda ps: DecoupledWSAM(CALM[base](ps), 0.0, gamma=GAMMA),
        lambda ps: DecoupledWSAM(CALM[base](ps), RHO, gamma=0.999 * GAMMA),
        lambda ps: DecoupledWSAM(CALM[base](ps), RHO, gamma=0.0),
    ]
    if base != "sgd":
        mutants.append(lambda ps: steppe.SAM(CALM[base](ps), RHO, combination=WeightedSharpness(GAMMA)))
    for mutant in mutants:
        with pytest.raises(AssertionError):
            agree(trained(mutant), want(base))


def test_with_plain_sgd_it_is_the_coupled_form():
    coupled = trained(lambda ps: steppe.SAM(CALM["sgd"](ps), RHO, combination=WeightedSharpness(GAMMA)))
    agree(trained(lambda ps: DecoupledWSAM(CALM["sgd"](ps), RHO, gamma=GAMMA)), coupled)


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("rho", "gamma"), [(0.3, 0.0), (0.0, 0.8)])
def test_gamma_zero_and_rho_zero_are_the_base_bit_for_bit(base, drive, rho, gamma):
    model, twin = net(), net()
    optimizer = DecoupledWSAM(BASES[base](model.parameters()), rho, gamma=gamma, model=model)
    torch.manual_seed(7)
    train(model, optimizer, DRIVES[drive], 5)
    torch.manual_seed(7)
    train(twin, BASES[base](twin.parameters()), plain, 5)
    assert model_bits(model) == model_bits(twin)


def test_each_group_has_its_own_current_learning_rate():
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


def test_maximize_goes_the_other_way():
    w, v = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    down = DecoupledWSAM(torch.optim.SGD([w], lr=1e-3), rho=0.5)
    up = DecoupledWSAM(torch.optim.SGD([v], lr=1e-3, maximize=True), rho=0.5)
    for _ in range(4):
        by_closure(down, lambda: w.pow(4).sum())
        by_closure(up, lambda: -v.pow(4).sum())
    assert bits([w]) == bits([v])


@pytest.mark.parametrize("base", CALM)
def test_unscaling_between_the_passes_and_the_step_reaches_the_sharpness_too(base):
    from checks import split

    params = [torch.nn.Parameter(p) for p in split(start())]
    optimizer = DecoupledWSAM(CALM[base](params), RHO, gamma=GAMMA)
    for t in range(20):
        for sam_pass in optimizer.passes():
            with sam_pass:
                (1024 * loss(flat(params), t)).backward()
        for p in params:
            p.grad /= 1024
        optimizer.step()
    agree(flat(params).detach(), want(base))


def test_accumulated_micro_batches_each_have_their_own_climb():
    w = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = DecoupledWSAM(torch.optim.SGD([w], lr=0.1), rho=0.5, gamma=0.75)
    for i, a in enumerate((1.0, -2.0)):
        for sam_pass in optimizer.passes(accumulate=i > 0):
            with sam_pass:
                (a * w**3 / 2).sum().backward()
    optimizer.step()
    g = lambda a, w: 3 * a * w**2 / 2  # noqa: E731
    clean = g(1, 3) + g(-2, 3)
    sharpness = (g(1, 3.5) - g(1, 3)) + (g(-2, 2.5) - g(-2, 3))
    assert w.item() == pytest.approx(3 - 0.1 * clean - 0.1 * 3 * sharpness, rel=1e-12)


def test_a_step_given_up_leaves_nothing_behind():
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


def test_a_step_without_a_climb_is_the_bases():
    model, twin = net(), net()
    optimizer = DecoupledWSAM(
        BASES["momentum"](model.parameters()), 0.3, cadence=steppe.LatePhase(1.0, 100), model=model
    )
    torch.manual_seed(7)
    train(model, optimizer, by_passes, 3)
    torch.manual_seed(7)
    train(twin, BASES["momentum"](twin.parameters()), plain, 3)
    assert model_bits(model) == model_bits(twin)


def test_wrong_arguments_are_refused_and_both_forms_work():
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
