"""Lookbehind: against its slow reference with 2 k gradients; its special cases, order of steps and arguments."""

import pytest
import torch
from own_step_problem import STABLE_BASES, Loss, assert_close, base_step, gradient, loss, normalized, start, trained
from torch import Tensor

import steppe
from checks import split
from steppe.methods.lookbehind_sam import Lookbehind
from support import BASES, DRIVES, bits, by_closure, by_passes, in_pairs, model_bits, net, plain, rest_is_slow, train

RHO = 0.1


def lookbehind(L: Loss, w: Tensor, base, steps: int, rho: float, k: int, alpha: float | None, parts) -> Tensor:
    """arXiv 2307.16704, algorithm 1; alpha None: from the angle, for each part of w separately."""
    phi = w.detach().clone()
    fast = phi.clone().requires_grad_()
    optimizer = base([fast])
    for t in range(steps):
        perturbed = phi.clone()
        with torch.no_grad():
            fast.copy_(phi)
        for i in range(k):
            perturbed = perturbed + rho * normalized(gradient(L, perturbed, t))
            base_step(optimizer, fast, gradient(L, perturbed, t))  # 2 k gradients, as the authors count
            if i == 0:
                first = fast.detach().clone()
        new = []
        for slow, one, last in zip(parts(phi), parts(first), parts(fast.detach()), strict=True):
            a = alpha
            if a is None:
                u, v = (one - slow).flatten(), (last - slow).flatten()
                a = (1 + (u * v).sum() / (u.square().sum() * v.square().sum()).sqrt()) / 2
            new.append((a * last + (1 - a) * slow).flatten())
        phi = torch.cat(new)
    return phi


def reference(base, k=3, alpha=0.4):
    return lookbehind(loss, start(), STABLE_BASES[base], 20, RHO, k, alpha, split)


@pytest.mark.parametrize(
    ("k_and_alpha", "base", "drive"),
    in_pairs([(3, 0.4), (2, 0.8), (5, 1.0), (1, 0.5), (3, None)], STABLE_BASES, ["closure", "passes"]),
)
def test_lookbehind_matches_its_slow_reference(k_and_alpha, base, drive):
    k, alpha = k_and_alpha
    assert_close(
        trained(lambda ps: Lookbehind(STABLE_BASES[base](ps), RHO, ascent_steps=k, alpha=alpha), drive),
        reference(base, k, alpha),
    )


@pytest.mark.parametrize("base", rest_is_slow(STABLE_BASES, lambda base: base == "momentum"))
def test_mutant_other_rho_k_or_alpha_is_killed(base):
    for rho, k, alpha in ((0.999 * RHO, 3, 0.4), (0.0, 3, 0.4), (RHO, 2, 0.4), (RHO, 3, 0.4 * 0.999), (RHO, 3, 1.0)):
        mutant = trained(lambda ps, r=rho, k=k, a=alpha: Lookbehind(STABLE_BASES[base](ps), r, ascent_steps=k, alpha=a))
        with pytest.raises(AssertionError):
            assert_close(mutant, reference(base))


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", BASES)
def test_one_ascent_step_with_alpha_one_is_sam_to_the_bit(base, drive):
    model, twin = net(), net()
    one = Lookbehind(BASES[base](model.parameters()), 0.1, ascent_steps=1, alpha=1.0, model=model)
    two = steppe.SAM(BASES[base](twin.parameters()), 0.1, model=twin)
    for m, o in ((model, one), (twin, two)):
        torch.manual_seed(7)
        train(m, o, DRIVES[drive], 5)
    assert model_bits(model) == model_bits(twin)


@pytest.mark.parametrize("base", BASES)
def test_rho_zero_repeats_the_base_step_with_the_same_gradient(base):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    train(
        model, Lookbehind(BASES[base](model.parameters()), 0.0, ascent_steps=3, alpha=1.0, model=model), by_closure, 4
    )
    plain_base = BASES[base](twin.parameters())
    repeat = plain_base.step
    plain_base.step = lambda: [repeat() for _ in range(3)]
    train(twin, plain_base, plain, 4)
    assert model_bits(model) == model_bits(twin)


def test_alpha_zero_leaves_the_weights_unchanged():
    model = net()
    before = bits(model.parameters())
    train(model, Lookbehind(BASES["adamw"](model.parameters()), 0.1, alpha=0.0, model=model), by_passes, 3)
    assert bits(model.parameters()) == before


def test_each_ascent_step_starts_where_the_last_ended_and_the_base_steps_once_for_each():
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


def test_adaptive_perturbation_and_maximize_mirror_minimization():
    w, v = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    down = Lookbehind(torch.optim.SGD([w], lr=1e-3), rho=0.5, perturbation=steppe.Adaptive())
    up = Lookbehind(torch.optim.SGD([v], lr=1e-3, maximize=True), rho=0.5, perturbation=steppe.Adaptive())
    for _ in range(4):
        by_closure(down, lambda: w.pow(4).sum())
        by_closure(up, lambda: -v.pow(4).sum())
    assert bits([w]) == bits([v])


@pytest.mark.parametrize("alpha", [1.0, 0.5, None])
def test_unperturbed_step_is_one_step_of_the_base(alpha):
    w = torch.nn.Parameter(torch.tensor([1.0]))
    cadence = steppe.LatePhase(1.0, 100)
    optimizer = Lookbehind(torch.optim.SGD([w], lr=0.1), ascent_steps=3, alpha=alpha, cadence=cadence)
    by_closure(optimizer, lambda: w.square().sum())
    assert w.item() == pytest.approx(0.8)


def test_argument_out_of_range_is_an_error():
    w = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(ValueError, match="ascent_steps must be 1 or more"):
        Lookbehind(sgd, ascent_steps=0)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        Lookbehind(sgd, alpha=1.5)
    with pytest.raises(ValueError, match="one ascent step along the gradient"):
        Lookbehind(sgd, perturbation=steppe.Momentum())
    optimizer = Lookbehind(sgd)
    with pytest.raises(RuntimeError, match=r"accumulate=True.*micro-batches inside"):
        next(optimizer.passes(accumulate=True))


def test_every_perturbed_pass_is_marked_as_one_that_gives_an_update_gradient():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lookbehind(torch.optim.SGD([w], lr=0.1), rho=1.0, ascent_steps=3)
    is_last = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            is_last.append(sam_pass.is_last)
            w.square().sum().backward()
    assert is_last == [False, True, True, True]


def test_perturbation_that_is_assigned_later_is_repeated_and_checked_like_the_constructors():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lookbehind(torch.optim.SGD([w], lr=0.1), rho=1.0, ascent_steps=3)
    optimizer.perturbation = steppe.Adaptive()
    assert (optimizer.perturbation.rule, optimizer.perturbation.ascent_steps) == (steppe.Adaptive(), 3)
    optimizer.perturbation = optimizer.perturbation  # what it has built itself is not built upon again
    assert optimizer.perturbation.rule == steppe.Adaptive()
    for unfit in (steppe.GaussianNoise(), steppe.AscentSteps(steppe.L2(), 2)):
        with pytest.raises(ValueError, match=r"Lookbehind makes 3 ascent steps, .* does not fit"):
            optimizer.perturbation = unfit
    with pytest.raises(TypeError, match="got the class L2"):
        Lookbehind(torch.optim.SGD([w], lr=0.1), perturbation=steppe.L2)
