"""Perturbations that need no gradient: one pass a step, at w + e. And the modifier that restricts any rule."""

import copy
import math

import pytest
import torch
from torch import nn

import steppe
from checks import bumpy, resumes, split
from reference import loss_and_gradient, sam_e
from reference_perturbations import random_e
from steppe import SAM
from steppe._tensors import random as random_tensors
from steppe.methods.esam import Stochastic
from steppe.methods.msam import Momentum
from steppe.methods.rwp import GaussianNoise
from steppe.rules import Point
from steppe.rules.masks import Masked
from steppe.rules.subsets import ParameterSubset, norm_layers
from support import DRIVES, bits, by_closure, by_passes, model_bits, net, plain, train

BASES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "momentum_buffer"),
    "maximize": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, maximize=True), "momentum_buffer"),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-2), "exp_avg"),
}
one_pass = pytest.mark.parametrize("drive", ["closure", "passes"])


@one_pass
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0])
def test_msam_matches_its_slow_reference_and_its_mutants_do_not(base, drive, factor):
    """v_t+1 = mu v_t + g(w_t - rho v_t / |v_t|) (arXiv 2401.12033, with the sign of its official code)."""
    build, buffer = BASES[base]
    sign = -1.0 if base == "maximize" else 1.0
    L = lambda w: sign * bumpy(w)  # noqa: E731
    torch.manual_seed(3)
    start = torch.randn(10, dtype=torch.float64)

    w = start.clone().requires_grad_()
    reference = build([w])
    for _ in range(20):
        v = reference.state[w].get(buffer)
        e = torch.zeros_like(w) if v is None else -factor * 0.3 * v / v.norm()
        _, w.grad = loss_and_gradient(L, (w + e).detach())
        reference.step()

    params = [nn.Parameter(p) for p in split(start)]
    optimizer = SAM(build(params), rho=0.3, perturbation=Momentum())
    calls = []

    def loss():
        calls.append(1)
        return L(torch.cat([p.reshape(-1) for p in params]))

    for _ in range(20):
        DRIVES[drive](optimizer, loss)
    got = torch.cat([p.detach().reshape(-1) for p in params])
    assert len(calls) == 20, "one pass a step"
    assert torch.allclose(got, w, rtol=1e-12, atol=1e-12) == (factor == 1.0)


@one_pass
def test_the_one_pass_is_an_ordinary_one_for_buffers_generators_and_weights(drive):
    model, twin = net(), net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9), rho=3.0, model=model)
    optimizer.perturbation = Momentum()
    base = torch.optim.SGD(twin.parameters(), lr=0.0, momentum=0.9)
    torch.manual_seed(1)
    train(model, optimizer, DRIVES[drive], 1)  # no momentum yet: no climb
    after = torch.get_rng_state()
    torch.manual_seed(1)
    train(twin, base, plain, 1)
    assert model_bits(model) == model_bits(twin)
    assert torch.equal(after, torch.get_rng_state())
    before = bits(model.parameters())
    train(model, optimizer, DRIVES[drive], 3, start=1)
    assert bits(model.parameters()) == before, "restored bit for bit"
    assert model.layers[1].num_batches_tracked.item() == 4
    counts = [m.num_batches_tracked.item() for m in model.modules() if hasattr(m, "num_batches_tracked")]
    assert counts == [4, 4]


def test_one_pass_restores_on_an_exception_and_skips_what_is_not_finite():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1, momentum=0.9), rho=1.0, perturbation=Momentum())
    by_passes(optimizer, lambda: w.square().sum())
    before, state = bits([w]), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(KeyError):
        by_closure(optimizer, lambda: {}["lost"])
    assert bits([w]) == before
    with pytest.warns(RuntimeWarning, match="skipped"):
        by_closure(optimizer, lambda: (w * float("nan")).sum())
    assert bits([w]) == before
    assert str(optimizer.state_dict()) == str(state)


def test_what_a_saved_pass_cannot_give_is_refused():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1, momentum=0.9), perturbation=Momentum())
    w.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"first_step\(\) with Momentum"):
        optimizer.first_step()
    optimizer.cadence = lambda point: bool(point.gradient_norm > 1)
    with pytest.raises(ValueError, match="asks for the gradient at w"):
        by_passes(optimizer, lambda: w.square().sum())
    bare = SAM(torch.optim.SGD([w], lr=0.1), perturbation=Momentum())
    by_passes(bare, lambda: w.square().sum())
    with pytest.raises(ValueError, match="keeps no momentum"):
        by_passes(bare, lambda: w.square().sum())


@pytest.mark.parametrize("drive", DRIVES)
def test_a_combination_that_needs_g_gets_a_pass_at_w_and_one_along_the_momentum(drive):
    """PGN around MSAM, for 5 steps against the formula."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    combination = steppe.PenalizedNorm(alpha=0.3)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1, momentum=0.9), 0.5, perturbation=Momentum(), combination=combination)
    places = []

    def loss():
        places.append(w.detach().clone())
        return (w**4).sum() / 4

    want, v = w.detach().clone(), None
    for _ in range(5):
        climbed = want if v is None else want - 0.5 * v / v.norm()
        down = 0.7 * want**3 + 0.3 * climbed**3
        v = down if v is None else 0.9 * v + down
        want = want - 0.1 * v
        DRIVES[drive](optimizer, loss)
        torch.testing.assert_close(w.detach(), want, rtol=1e-12, atol=1e-12)
    assert len(places) == 10


# Random.


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


@one_pass
@pytest.mark.parametrize("filterwise", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0, 0.999])
def test_rwp_matches_its_slow_reference_and_its_mutants_do_not(filterwise, drive, factor):
    """g(w + e), with e drawn anew at each step (arXiv 2211.11489)."""
    torch.manual_seed(3)
    start = torch.randn(10, dtype=torch.float64)
    w = start.clone().requires_grad_()
    reference = torch.optim.SGD([w], lr=1e-2, momentum=0.9)
    for t in range(20):
        e = factor * flat(random_e(split(w.detach()), 0.3, t, filterwise=filterwise, seed=5))
        _, w.grad = loss_and_gradient(bumpy, w.detach() + e)
        reference.step()
    params = [nn.Parameter(p) for p in split(start)]
    rule = GaussianNoise(filterwise=filterwise, seed=5)
    optimizer = SAM(torch.optim.SGD(params, lr=1e-2, momentum=0.9), rho=0.3, perturbation=rule)
    calls = []
    for _ in range(20):
        DRIVES[drive](optimizer, lambda: (calls.append(1), bumpy(flat(params)))[1])
    assert len(calls) == 20, "one pass a step"
    assert torch.allclose(flat(params), w, rtol=1e-12, atol=1e-12) == (factor == 1.0)


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_mixed_rwp_goes_down_with_both_gradients_in_two_passes(drive, alpha):
    """(1 - alpha) g(w) + alpha g(w + e) (arXiv 2404.00357, m-RWP)."""
    torch.manual_seed(3)
    start = torch.randn(10, dtype=torch.float64)
    w = start.clone().requires_grad_()
    reference = torch.optim.SGD([w], lr=1e-2, momentum=0.9)
    for t in range(20):
        e = flat(random_e(split(w.detach()), 0.3, t, filterwise=True))
        _, g = loss_and_gradient(bumpy, w.detach())
        _, g_e = loss_and_gradient(bumpy, w.detach() + e)
        w.grad = (1 - alpha) * g + alpha * g_e
        reference.step()
    params = [nn.Parameter(p) for p in split(start)]
    base = torch.optim.SGD(params, lr=1e-2, momentum=0.9)
    mix = steppe.PenalizedNorm(alpha)
    optimizer = SAM(base, rho=0.3, perturbation=GaussianNoise(filterwise=True), combination=mix)
    calls = []
    for _ in range(20):
        DRIVES[drive](optimizer, lambda: (calls.append(1), bumpy(flat(params)))[1])
    assert len(calls) == 40
    torch.testing.assert_close(flat(params), w, rtol=1e-12, atol=1e-12)


def noise(rule, shapes=((20, 30), (7,)), step=0, dtype=torch.float64):
    w = [torch.full(shape, 0.1, dtype=dtype) for shape in shapes]
    direction, scale = rule(Point(w, [], rho=[1.0] * len(w), base_state=[{}] * len(w), step=step))
    return [scale * d for d in direction]


def test_draws_differ_by_step_seed_position_and_rule_and_by_nothing_else():
    torch.manual_seed(1)
    first = noise(GaussianNoise(filterwise=True, seed=1), step=3)
    torch.manual_seed(2)
    again = noise(GaussianNoise(filterwise=True, seed=1), step=3)
    assert bits(first) == bits(again)
    others = [
        noise(GaussianNoise(filterwise=True, seed=2), step=3)[0],
        noise(GaussianNoise(filterwise=True, seed=1), step=4)[0],
        noise(GaussianNoise(filterwise=True, seed=1), ((7,), (20, 30)), step=3)[1],
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([first[0].reshape(-1), other.reshape(-1)]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(600)
    like = [torch.empty(600, dtype=torch.float64)]
    x, y = random_tensors.normal("A", 0, 0, like)[0], random_tensors.normal("B", 0, 0, like)[0]
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 5 / math.sqrt(600)
    assert not torch.equal(random_tensors.uniform("A", 0, 0, like)[0], random_tensors.uniform("B", 0, 0, like)[0])


def test_filterwise_noise_has_the_scale_of_each_filter_and_filters_at_zero_stay():
    w = [torch.ones(3, 4000), torch.ones(2, 50, 80), torch.ones(9000), torch.tensor(2.0)]
    w[0][1] *= 10
    w[0][2] = 0
    at = Point(w, [], rho=[1.0] * 4, base_state=[{}] * 4, step=1)
    matrix, cube, vector, number = GaussianNoise(filterwise=True)(at).direction
    assert matrix.std(dim=1).tolist() == pytest.approx([4000**0.5, 10 * 4000**0.5, 0], rel=0.06)
    assert cube.flatten(1).std(dim=1).tolist() == pytest.approx([4000**0.5] * 2, rel=0.06)
    assert vector.std().item() == pytest.approx(9000**0.5, rel=0.06)
    assert number != 0


def test_complex_filters_are_those_of_the_real_view():
    """All of w[i], and for a vector each number."""
    torch.manual_seed(0)
    w = [torch.randn(3, 2, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128)]
    at = Point(w, [], rho=[1.0] * 2, base_state=[{}] * 2, step=0)
    direction = GaussianNoise(filterwise=True)(at).direction
    r = [torch.randn(shape, dtype=torch.float64, generator=stream(i)) for i, shape in enumerate([(3, 2, 2), (4, 2)])]
    want = [torch.linalg.vector_norm(w[0], dim=1).view(3, 1, 1) * r[0], w[1].abs().view(4, 1) * r[1]]
    torch.testing.assert_close(list(direction), want, rtol=1e-12, atol=1e-12)


def stream(position):
    return random_tensors.generator(torch.device("cpu"), random_tensors.key("Random", 0, 0, position))


@pytest.mark.parametrize("filterwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rwp_in_half_precision_moves_by_rho_and_comes_back(dtype, filterwise):
    model = net(dtype=dtype)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    optimizer.perturbation = GaussianNoise(filterwise=filterwise)
    before, away = [p.detach().clone() for p in model.parameters()], []
    model.register_forward_pre_hook(
        lambda *_: away.append([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
    )
    train(model, optimizer, DRIVES["closure"], 3)
    lengths = [flat(e).float().norm().item() for e in away]
    assert all(length == pytest.approx(0.5, rel=0.05) for length in lengths) or filterwise
    assert len(away) == 3
    assert min(lengths) > 0
    assert all(math.isfinite(length) for length in lengths)
    assert bits(model.parameters()) == bits(before)


@pytest.mark.parametrize("filterwise", [False, True])
@one_pass
def test_rwp_resumes_and_leaves_every_generator_alone(filterwise, drive):
    def make(model, rho=0.05):
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return SAM(base, rho=rho, model=model, perturbation=GaussianNoise(filterwise=filterwise, seed=1))

    resumes(make, drive)
    states = []
    for wrap in (True, False):
        model = net()
        optimizer = make(model) if wrap else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        train(model, optimizer, DRIVES[drive] if wrap else plain, 3)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_rwp_goes_with_the_modifiers():
    a, b = nn.Parameter(torch.ones(200)), nn.Parameter(torch.ones(3))
    only = ParameterSubset(GaussianNoise(), [a])
    nowhere = torch.zeros(3, dtype=torch.bool)
    for rule, share in ((only, 1.0), (Stochastic(only, beta=0.5), 0.5), (Masked(GaussianNoise(), {b: nowhere}), 1.0)):
        optimizer = SAM(torch.optim.SGD([a, b], lr=0.0), rho=0.5, perturbation=rule)
        seen = []
        by_passes(optimizer, lambda seen=seen: (seen.append((a - 1, b - 1)), a.sum() + b.sum())[1])
        ((up, stays),) = seen
        assert not stays.any()
        assert (up != 0).double().mean().item() == pytest.approx(share, abs=0.12)
        assert up.norm().item() == pytest.approx(0.5 / math.sqrt(share), rel=0.15)


# Only.


@pytest.mark.parametrize("drive", DRIVES)
def test_only_climbs_with_the_chosen_parameters_and_has_their_radius(drive):
    """As the paper has it: e is zero elsewhere, and |e| = rho among them."""
    torch.manual_seed(3)
    start = torch.randn(10, dtype=torch.float64)
    mask = torch.cat([torch.zeros(6), torch.ones(4)]).double()  # the first tensor stays
    w = start.clone().requires_grad_()
    reference = torch.optim.SGD([w], lr=1e-2, momentum=0.9)
    for _ in range(20):
        _, g = loss_and_gradient(bumpy, w)
        _, w.grad = loss_and_gradient(bumpy, w.detach() + sam_e(w, g * mask, 0.3))
        reference.step()
    params = [nn.Parameter(p) for p in split(start)]
    optimizer = SAM(
        torch.optim.SGD(params, lr=1e-2, momentum=0.9), rho=0.3, perturbation=ParameterSubset(steppe.L2(), params[1:])
    )
    for _ in range(20):
        DRIVES[drive](optimizer, lambda: bumpy(torch.cat([p.reshape(-1) for p in params])))
    got = torch.cat([p.detach().reshape(-1) for p in params])
    torch.testing.assert_close(got, w.detach(), rtol=1e-12, atol=1e-12)
    whole = SAM(torch.optim.SGD(params, lr=1e-2), rho=0.3)
    assert repr(whole.perturbation) != repr(optimizer.perturbation)


def test_parameters_that_stay_are_neither_copied_nor_moved():
    model = net()
    chosen = norm_layers(model)
    assert len(chosen) == 4
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.0),
        rho=1.0,
        model=model,
        perturbation=ParameterSubset(steppe.L2(), chosen),
    )
    before = {id(p): p.detach().clone() for p in model.parameters()}
    moved = []

    def loss():
        moved.append([id(p) for p in model.parameters() if not torch.equal(p, before[id(p)])])
        return model(torch.randn(4, 1, 8, 8)).square().mean()

    by_closure(optimizer, loss)
    assert moved == [[], [id(p) for p in model.parameters() if any(p is c for c in chosen)]]
    copied = sum(c.numel() for c in optimizer._engine._displacement._copies.values())
    assert copied == sum(p.numel() for p in chosen)


def test_only_goes_with_a_one_pass_rule_a_copy_and_an_empty_choice():
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([1.0]))
    base = torch.optim.SGD([a, b], lr=0.0, momentum=0.9)
    optimizer = SAM(base, rho=0.5, perturbation=ParameterSubset(Momentum(), [a]))
    seen = []
    for _ in range(2):
        by_passes(optimizer, lambda: (seen.append((a.tolist(), b.tolist())), a.square().sum() + b.sum())[1])
    assert seen[0] == ([3.0, 4.0], [1.0])
    assert math.dist(seen[1][0], (3.0, 4.0)) == pytest.approx(0.5, rel=1e-6)
    assert seen[1][1] == [1.0]
    a2, copied = copy.deepcopy((a, optimizer))
    assert any(p is a2 for p in copied.perturbation.parameters)
    with pytest.raises(ValueError, match="no parameter is to climb"):
        ParameterSubset(steppe.L2(), [])
