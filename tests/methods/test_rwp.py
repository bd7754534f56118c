"""RWP and m-RWP against their slow reference, and the distribution of the noise."""

import math

import pytest
import torch
from named_methods import passes_per_step
from perturbations import assert_reads_no_value_on_the_host
from slow_reference import Tensors, along, generator, length
from torch import nn

import steppe
from checks import bumpy, resumes, split
from reference import loss_and_gradient
from steppe import SAM
from steppe._tensors import random as random_tensors
from steppe.methods.arwp import AdaptiveNoise
from steppe.methods.esam import Stochastic
from steppe.methods.rwp import GaussianNoise
from steppe.rules import Point
from steppe.rules.masks import Masked
from steppe.rules.subsets import ParameterSubset
from support import DRIVES, bits, by_closure, by_passes, net, plain, train

single_pass = pytest.mark.parametrize("drive", ["closure", "passes"])


def random_e(w: Tensors, rho: float, step: int, *, filterwise: bool, seed: int = 0) -> Tensors:
    """Noise of length rho; or e_ij ~ N(0, (rho |w_i|)^2) in the filter w_i (arXiv 2211.11489)."""
    r = [torch.randn(p.shape, dtype=p.dtype, generator=generator("Random", seed, step, i)) for i, p in enumerate(w)]
    if not filterwise:
        return along(r, rho)
    e = []
    for noise, part in zip(r, w, strict=True):
        if part.ndim > 1:
            e.append(torch.stack([rho * length([w_i]) * r_i for w_i, r_i in zip(part, noise, strict=True)]))
        else:
            e.append(rho * length([part]) * noise)
    return e


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


@single_pass
@pytest.mark.parametrize("filterwise", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0, 0.999])
def test_rwp_matches_its_slow_reference_and_its_mutants_do_not(filterwise, drive, factor):
    """g(w + e), with a new draw of e at each step (arXiv 2211.11489)."""
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
    assert len(calls) == 20, "one pass per step"
    assert torch.allclose(flat(params), w, rtol=1e-12, atol=1e-12) == (factor == 1.0)


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_mixed_rwp_mixes_both_gradients_in_two_passes(drive, alpha):
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


def test_draws_depend_on_step_seed_position_and_rule_only():
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


def test_filterwise_noise_has_the_scale_of_each_filter_and_filters_at_zero_have_none():
    w = [torch.ones(3, 4000), torch.ones(2, 50, 80), torch.ones(9000), torch.tensor(2.0)]
    w[0][1] *= 10
    w[0][2] = 0
    point = Point(w, [], rho=[1.0] * 4, base_state=[{}] * 4, step=1)
    matrix, cube, vector, number = GaussianNoise(filterwise=True)(point).direction
    assert matrix.std(dim=1).tolist() == pytest.approx([4000**0.5, 10 * 4000**0.5, 0], rel=0.06)
    assert cube.flatten(1).std(dim=1).tolist() == pytest.approx([4000**0.5] * 2, rel=0.06)
    assert vector.std().item() == pytest.approx(9000**0.5, rel=0.06)
    assert number != 0


def test_complex_filters_are_those_of_the_real_view():
    """A filter is all of w[i], and for a vector each number."""
    torch.manual_seed(0)
    w = [torch.randn(3, 2, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128)]
    point = Point(w, [], rho=[1.0] * 2, base_state=[{}] * 2, step=0)
    direction = GaussianNoise(filterwise=True)(point).direction
    r = [torch.randn(shape, dtype=torch.float64, generator=draw(i)) for i, shape in enumerate([(3, 2, 2), (4, 2)])]
    want = [torch.linalg.vector_norm(w[0], dim=1).view(3, 1, 1) * r[0], w[1].abs().view(4, 1) * r[1]]
    torch.testing.assert_close(list(direction), want, rtol=1e-12, atol=1e-12)


def draw(position):
    return random_tensors.generator(torch.device("cpu"), random_tensors.key("Random", 0, 0, position))


@pytest.mark.parametrize("filterwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_perturbed_by_rho_and_restored(dtype, filterwise):
    model = net(dtype=dtype)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    optimizer.perturbation = GaussianNoise(filterwise=filterwise)
    before, perturbations = [p.detach().clone() for p in model.parameters()], []
    model.register_forward_pre_hook(
        lambda *_: perturbations.append([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
    )
    train(model, optimizer, DRIVES["closure"], 3)
    norms = [flat(e).float().norm().item() for e in perturbations]
    assert all(norm == pytest.approx(0.5, rel=0.05) for norm in norms) or filterwise
    assert len(perturbations) == 3
    assert min(norms) > 0
    assert all(math.isfinite(norm) for norm in norms)
    assert bits(model.parameters()) == bits(before)


@pytest.mark.parametrize("filterwise", [False, True])
@single_pass
def test_resumed_run_has_the_same_bits_and_no_generator_is_used(filterwise, drive):
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


def test_noise_can_be_restricted_thinned_out_and_masked():
    a, b = nn.Parameter(torch.ones(200)), nn.Parameter(torch.ones(3))
    only = ParameterSubset(GaussianNoise(), [a])
    nowhere = torch.zeros(3, dtype=torch.bool)
    for rule, share in ((only, 1.0), (Stochastic(only, beta=0.5), 0.5), (Masked(GaussianNoise(), {b: nowhere}), 1.0)):
        optimizer = SAM(torch.optim.SGD([a, b], lr=0.0), rho=0.5, perturbation=rule)
        moves = []
        by_passes(optimizer, lambda moves=moves: (moves.append((a - 1, b - 1)), a.sum() + b.sum())[1])
        ((moved, unmoved),) = moves
        assert not unmoved.any()
        assert (moved != 0).double().mean().item() == pytest.approx(share, abs=0.12)
        assert moved.norm().item() == pytest.approx(0.5 / math.sqrt(share), rel=0.15)


@pytest.mark.parametrize("filterwise", [False, True])
def test_no_value_is_read_on_the_host(monkeypatch, filterwise):
    assert_reads_no_value_on_the_host(GaussianNoise(filterwise=filterwise), monkeypatch)


def test_step_costs_one_pass_and_two_when_mixed():
    assert passes_per_step("rwp") == 1.0
    assert passes_per_step("mixed_rwp") == 2.0


def squares_by_filter(v: Tensors) -> Tensors:
    return [part.flatten(1).sum(1).reshape(-1, *[1] * (part.ndim - 1)) if part.ndim > 1 else part for part in v]


@pytest.mark.parametrize("drive", ["closure", "passes"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.999])
def test_arwp_matches_its_slow_reference_and_its_mutants_do_not(mixed, drive, factor):
    """e = rho |w_f| r / sqrt(1 + eta v_f), v <- beta v + g_s^2, as in the code of arXiv 2404.00357."""
    torch.manual_seed(3)
    start = torch.randn(10, dtype=torch.float64)
    w = start.clone().requires_grad_()
    reference = torch.optim.SGD([w], lr=1e-2, momentum=0.9)
    v = torch.zeros(10, dtype=torch.float64)
    for t in range(20):
        noise = random_e(split(w.detach()), 0.3, t, filterwise=True, seed=5)
        sums = squares_by_filter(split(v))
        e = flat([r / (1 + factor * 0.7 * s).sqrt() for r, s in zip(noise, sums, strict=True)])
        _, g = loss_and_gradient(bumpy, w.detach())
        _, g_s = loss_and_gradient(bumpy, w.detach() + e)
        v = 0.9 * v + g_s.square()
        w.grad = 0.4 * g + 0.6 * g_s if mixed else g_s
        reference.step()
    params = [nn.Parameter(p) for p in split(start)]
    base = torch.optim.SGD(params, lr=1e-2, momentum=0.9)
    arguments = {"eta": 0.7, "beta": 0.9, "seed": 5}
    if mixed:
        optimizer = steppe.variants.mixed_arwp(base, 0.3, alpha=0.6, **arguments)
    else:
        optimizer = steppe.variants.arwp(base, 0.3, **arguments)
    calls = []
    for _ in range(20):
        DRIVES[drive](optimizer, lambda: (calls.append(1), bumpy(flat(params)))[1])
    assert len(calls) == (40 if mixed else 20)
    assert torch.allclose(flat(params), w, rtol=1e-12, atol=1e-12) == (factor == 1.0)


def test_arwp_without_squares_is_rwp():
    for adaptive, plain_noise in (("arwp", "rwp"), ("mixed_arwp", "mixed_rwp")):
        ends = []
        for name, arguments in ((adaptive, {"eta": 0.0}), (plain_noise, {})):
            model = net(dropout=0.0)
            optimizer = getattr(steppe.variants, name)(
                torch.optim.SGD(model.parameters(), lr=0.1), 0.05, model=model, **arguments
            )
            train(model, optimizer, by_passes, 3)
            ends.append(bits(model.parameters()))
        assert ends[0] == ends[1]


def test_cosine_schedule_gives_the_deviation_of_the_authors_recipe():
    optimizer = steppe.variants.arwp(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), 0.001)
    schedule = steppe.rho_schedule.CosineRho(optimizer, total_steps=10, end=0.011)
    for t in range(10):
        factor = -math.cos(t * math.pi / 10) * 0.5 + 0.5
        assert schedule.get_last_rho() == pytest.approx([0.001 * (factor * 10 + 1)])
        optimizer.base.step()
        schedule.step()


def test_steps_of_adaptive_noise_without_the_combination_that_keeps_squares_warn():
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = steppe.SAM(base, 0.01, perturbation=AdaptiveNoise(), model=model)
    train(model, optimizer, by_closure, 1)  # the first step has no squares in any case
    with pytest.warns(UserWarning, match=r"it is GaussianNoise.*RunningSquares\(\)"):
        train(model, optimizer, by_closure, 1)
