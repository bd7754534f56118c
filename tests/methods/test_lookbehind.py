"""Lookbehind: against its slow reference with 2 k gradients, and its reductions."""

import pytest
import torch
from problems import CALM, agree, loss, start, trained
from reference_methods import lookbehind

import steppe
from checks import split
from steppe.methods.lookbehind_sam import Lookbehind
from support import BASES, DRIVES, bits, by_closure, by_passes, model_bits, net, plain, train

RHO = 0.1


def want(base, k=3, alpha=0.4):
    return lookbehind(loss, start(), CALM[base], 20, RHO, k, alpha, split)


@pytest.mark.parametrize("drive", ["closure", "passes"])
@pytest.mark.parametrize("base", CALM)
@pytest.mark.parametrize(("k", "alpha"), [(3, 0.4), (2, 0.8), (5, 1.0), (1, 0.5), (3, None)])
def test_it_matches_its_slow_reference(base, drive, k, alpha):
    agree(trained(lambda ps: Lookbehind(CALM[base](ps), RHO, ascent_steps=k, alpha=alpha), drive), want(base, k, alpha))


@pytest.mark.parametrize("base", CALM)
def test_mutants_are_killed(base):
    for rho, k, alpha in ((0.999 * RHO, 3, 0.4), (0.0, 3, 0.4), (RHO, 2, 0.4), (RHO, 3, 0.4 * 0.999), (RHO, 3, 1.0)):
        mutant = trained(lambda ps, r=rho, k=k, a=alpha: Lookbehind(CALM[base](ps), r, ascent_steps=k, alpha=a))
        with pytest.raises(AssertionError):
            agree(mutant, want(base))


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", BASES)
def test_k_one_with_alpha_one_is_sam_bit_for_bit(base, drive):
    model, twin = net(), net()
    one = Lookbehind(BASES[base](model.parameters()), 0.1, ascent_steps=1, alpha=1.0, model=model)
    two = steppe.SAM(BASES[base](twin.parameters()), 0.1, model=twin)
    for m, o in ((model, one), (twin, two)):
        torch.manual_seed(7)
        train(m, o, DRIVES[drive], 5)
    assert model_bits(model) == model_bits(twin)


@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_k_steps_of_the_base_with_the_same_gradient(base):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    train(
        model, Lookbehind(BASES[base](model.parameters()), 0.0, ascent_steps=3, alpha=1.0, model=model), by_closure, 4
    )
    plain_base = BASES[base](twin.parameters())
    repeat = plain_base.step
    plain_base.step = lambda: [repeat() for _ in range(3)]
    train(twin, plain_base, plain, 4)
    assert model_bits(model) == model_bits(twin)


def test_alpha_zero_stays():
    model = net()
    before = bits(model.parameters())
    train(model, Lookbehind(BASES["adamw"](model.parameters()), 0.1, alpha=0.0, model=model), by_passes, 3)
    assert bits(model.parameters()) == before


def test_the_climbs_go_on_from_each_other_and_the_base_steps_k_times():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lookbehind(torch.optim.SGD([w], lr=0.1), rho=1.0, ascent_steps=3)
    steps, lengths = [], []
    optimizer.base.register_step_pre_hook(lambda *_: steps.append(w.grad.clone()))
    for sam_pass in optimizer.passes():
        with sam_pass:
            lengths.append(w.norm().item())
            w.square().sum().backward()
    assert lengths == pytest.approx([5, 6, 7, 8])
    assert not steps
    optimizer.step()
    assert [g.norm().item() / 2 for g in steps] == pytest.approx([6, 7, 8])


def test_asam_climbs_and_maximize():
    w, v = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    down = Lookbehind(torch.optim.SGD([w], lr=1e-3), rho=0.5, perturbation=steppe.Adaptive())
    up = Lookbehind(torch.optim.SGD([v], lr=1e-3, maximize=True), rho=0.5, perturbation=steppe.Adaptive())
    for _ in range(4):
        by_closure(down, lambda: w.pow(4).sum())
        by_closure(up, lambda: -v.pow(4).sum())
    assert bits([w]) == bits([v])


def test_a_step_without_a_climb_is_one_step_of_the_base():
    w = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Lookbehind(torch.optim.SGD([w], lr=0.1), ascent_steps=3, alpha=1.0, cadence=steppe.LatePhase(1.0, 100))
    by_closure(optimizer, lambda: w.square().sum())
    assert w.item() == pytest.approx(0.8)


def test_wrong_arguments_are_refused():
    w = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(ValueError, match="ascent_steps must be 1 or more"):
        Lookbehind(sgd, ascent_steps=0)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        Lookbehind(sgd, alpha=1.5)
    with pytest.raises(ValueError, match="climbs once along the gradient"):
        Lookbehind(sgd, perturbation=steppe.Momentum())
    optimizer = Lookbehind(sgd)
    with pytest.raises(RuntimeError, match=r"accumulate=True.*micro-batches inside"):
        next(optimizer.passes(accumulate=True))


def test_every_pass_that_goes_down_says_so():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lookbehind(torch.optim.SGD([w], lr=0.1), rho=1.0, ascent_steps=3)
    said = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            said.append(sam_pass.is_last)
            w.square().sum().backward()
    assert said == [False, True, True, True]
