"""Each combination and cadence against its slow reference, what it costs, and the mutants that must be killed."""

import functools
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import steppe
from checks import bumpy, resumes, split
from reference_combinations import gsam, looksam, pgn, trajectory, wsam
from steppe import sam
from steppe._engine.state_dict import pack
from steppe._tensors import ops as tensors
from steppe._tensors.ops import dot
from steppe.methods.gsam import SurrogateGap
from steppe.methods.late_sam import LatePhase
from steppe.methods.looksam import GradientReuse
from steppe.methods.pgn import PenalizedNorm
from steppe.methods.random_sam import Bernoulli
from steppe.methods.wsam import WeightedSharpness
from steppe.rules.periodic import Periodic
from support import BASES, DRIVES, batch, by_closure, model_bits, net, plain, train

RHO = 0.3
# Learning rates at which none of the rules is chaotic: there, 20 steps would make 1e-9 of a rounding error.
CALM = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.03),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}
RULES = {
    "gsam": (SurrogateGap(alpha=0.4), gsam(0.4), 1),
    "gsam-every-2": (SurrogateGap(alpha=0.4), gsam(0.4), 2),
    "wsam": (WeightedSharpness(gamma=0.8), wsam(0.8), 1),
    "wsam-every-2": (WeightedSharpness(gamma=0.3), wsam(0.3), 2),
    "pgn": (PenalizedNorm(alpha=0.7), pgn(0.7 * RHO, RHO), 1),
    "pgn-every-2": (PenalizedNorm(alpha=0.7), pgn(0.7 * RHO, RHO), 2),
    "looksam": (GradientReuse(alpha=0.7), looksam(0.7), 3),
}
COMBINATIONS = [SurrogateGap(0.4), WeightedSharpness(0.8), PenalizedNorm(0.7), GradientReuse(0.7)]


def flat_training(base, drive, combination, cadence, steps=20):
    torch.manual_seed(3)
    start = torch.randn(10, dtype=torch.float64)
    params = [torch.nn.Parameter(p) for p in split(start)]
    optimizer = steppe.SAM(CALM[base](params), rho=RHO, combination=combination, cadence=cadence)
    for _ in range(steps):
        DRIVES[drive](optimizer, lambda: bumpy(torch.cat([p.reshape(-1) for p in params])))
    return start, torch.cat([p.detach().reshape(-1) for p in params])


def matches_reference(rule, base, drive, *, combination=None, cadence=None):
    """20 steps in float64 agree with the slow reference to 1e-12."""
    ours, down, every = RULES[rule]
    start, got = flat_training(base, drive, combination or ours, cadence or Periodic(every))
    want = trajectory(bumpy, start, down, CALM[base], 20, RHO, lambda t: t % every == 0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", CALM)
@pytest.mark.parametrize("rule", RULES)
def test_combination_matches_its_slow_reference(rule, base, drive):
    matches_reference(rule, base, drive)


@pytest.mark.parametrize("drive", DRIVES)
def test_reuse_goes_down_with_g_before_the_first_climb(drive):
    start, got = flat_training("adamw", drive, GradientReuse(0.7), LatePhase(0.5, 20))
    want = trajectory(bumpy, start, looksam(0.7), CALM["adamw"], 20, RHO, lambda t: t >= 10)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# The mutants: the right combination, moved by a factor between an anchor (g, or g_s) and itself.


class Mutant:
    needs_unperturbed_gradient = True

    def __init__(self, right, anchor, factor):
        self.right, self.anchor, self.factor = right, anchor, factor

    def __call__(self, point, perturbed):
        right = self.right(point, perturbed)
        anchor = perturbed if self.anchor == "g_s" and perturbed is not None else point.gradients
        return [a + self.factor * (r - a) for a, r in zip(anchor, right, strict=True)]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("factor", [0.0, -1.0, 0.999])
@pytest.mark.parametrize("anchor", ["g", "g_s"])
@pytest.mark.parametrize("rule", ["gsam", "wsam", "pgn", "looksam"])
def test_mutant_wrong_combination_is_killed(rule, anchor, factor, base):
    with pytest.raises(AssertionError):
        matches_reference(rule, base, "closure", combination=Mutant(RULES[rule][0], anchor, factor))


@pytest.mark.parametrize("rule", ["gsam", "wsam", "pgn", "looksam"])
def test_the_mutant_with_factor_one_lives(rule):
    matches_reference(rule, "sgd", "closure", combination=Mutant(RULES[rule][0], "g", 1.0))


def test_mutant_wrong_cadence_is_killed():
    with pytest.raises(AssertionError):
        matches_reference("looksam", "sgd", "closure", cadence=Periodic(4))


def test_the_parts_are_orthogonal_and_reuse_keeps_its_length():
    g = torch.Generator().manual_seed(0)
    clean = [torch.randn(s, generator=g, dtype=torch.float64) for s in [(3, 4), (5,), ()]]
    perturbed = [c + torch.randn(c.shape, generator=g, dtype=torch.float64) for c in clean]
    weights = [torch.zeros_like(c) for c in clean]
    point = steppe.Point(weights, clean, [0.1] * 3, [{}] * 3, 0)
    move = [d - p for d, p in zip(SurrogateGap(0.5)(point, perturbed), perturbed, strict=True)]
    assert float(dot(move, perturbed)) == pytest.approx(0, abs=1e-13)
    assert float(dot(move, clean)) < -0.1  # up, against the clean loss's descent
    rule = GradientReuse(0.5)
    assert rule(point, perturbed) is perturbed
    between = steppe.Point(weights, perturbed, [0.1] * 3, [{}] * 3, 1, point.memory)
    move = [d - p for d, p in zip(rule(between, None), perturbed, strict=True)]
    assert float(dot(move, clean)) == pytest.approx(0, abs=1e-13)
    assert float(dot(move, move)) == pytest.approx(0.25 * float(dot(perturbed, perturbed)), rel=1e-12)


# Resuming.


def build(cadence, model):
    return steppe.SAM(
        BASES["adamw"](model.parameters()), rho=0.1, model=model, combination=GradientReuse(), cadence=cadence
    )


@pytest.mark.parametrize("after", [3, 4, 5])
@pytest.mark.parametrize("drive", DRIVES)
def test_reuse_resumes_to_the_bit(after, drive):
    resumes(functools.partial(build, Periodic(3)), drive, after=after, steps=9)


@pytest.mark.parametrize("cadence", [Bernoulli(0.5, seed=7), LatePhase(0.5, 9)])
def test_cadences_resume_to_the_bit(cadence):
    resumes(functools.partial(build, cadence), "closure", after=3, steps=9)


@pytest.mark.parametrize("lost", ["memory", "step"])
def test_mutant_incomplete_checkpoint_is_killed(monkeypatch, lost):
    monkeypatch.setattr(
        sam, "pack", lambda base, memory, step: pack(base, {} if lost == "memory" else memory, step * (lost != "step"))
    )
    with pytest.raises(AssertionError):
        resumes(functools.partial(build, Periodic(3)), "closure", after=4, steps=9)


# Limits.


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base_to_the_bit(base, combination):
    model, other = net(dropout=0.0), net(dropout=0.0)
    cadence = Periodic(2 if isinstance(combination, GradientReuse) else 1)
    optimizer = steppe.SAM(
        BASES[base](model.parameters()), rho=0.0, model=model, combination=combination, cadence=cadence
    )
    train(model, optimizer, by_closure, 5)
    train(other, BASES[base](other.parameters()), plain, 5)
    assert model_bits(model) == model_bits(other)


@pytest.mark.parametrize(
    ("combination", "same"),
    [
        (SurrogateGap(0.0), "sam"),
        (WeightedSharpness(0.5), "sam"),
        (PenalizedNorm(1.0), "sam"),
        (GradientReuse(0.0), "every-2"),
        (WeightedSharpness(0.0), "base"),
        (PenalizedNorm(0.0), "base"),
    ],
)
def test_the_ends_are_sam_and_the_base(combination, same):
    cadence = Periodic(2 if same == "every-2" else 1)
    start, got = flat_training("adamw", "closure", combination, cadence)
    if same == "base":
        want = trajectory(bumpy, start, lambda g, *_: g, CALM["adamw"], 20, RHO, lambda t: True)
    else:
        _, want = flat_training("adamw", "closure", steppe.Perturbed(), cadence)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_zero_and_absent_gradients_are_no_trouble(combination):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), combination=combination, cadence=Periodic(2))
    for loss in [lambda: 0.0 * w.sum()] * 3 + [lambda: torch.zeros((), requires_grad=True)] * 3:
        by_closure(optimizer, loss)
    assert torch.equal(w.detach(), torch.ones(3))


def test_reuse_does_not_remember_what_is_not_finite():
    w, g = torch.zeros(2), torch.tensor([1.0, 0.0])
    first = steppe.Point([w], [g], [0.1], [{}], 0)
    rule = GradientReuse(1.0)
    rule(first, [torch.tensor([1.0, 0.5])])
    for bad in (float("nan"), float("inf")):
        rule(steppe.Point([w], [g], [0.1], [{}], 1, first.memory), [torch.tensor([1.0, bad])])
        rule(steppe.Point([w], [g * bad], [0.1], [{}], 1, first.memory), [torch.tensor([1.0, 2.0])])
    (down,) = rule(steppe.Point([w], [g], [0.1], [{}], 2, first.memory), None)
    assert down.tolist() == [1.0, 1.0]


def test_a_parameter_that_joins_between_climbs_goes_down_with_its_g():
    a, b = torch.zeros(1), torch.zeros(1)
    climb = steppe.Point([a], [torch.ones(1)], [0.1], [{}], 0)
    GradientReuse()(climb, [torch.ones(1) * 2])
    both = steppe.Point([a, b], [torch.ones(1), torch.ones(1)], [0.1] * 2, [{}] * 2, 1, climb.memory)
    assert GradientReuse()(both, None)[1].tolist() == [1.0]


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_near(combination, dtype):
    g = torch.Generator().manual_seed(0)
    clean = [torch.randn(s, generator=g, dtype=torch.float64) for s in [(30, 4), (5,), (2, 3, 4, 4)]]
    perturbed = [c + 0.5 * torch.randn(c.shape, generator=g, dtype=torch.float64) for c in clean]
    outcomes = []
    for kind in (torch.float64, dtype):
        low, low_s = [c.to(kind) for c in clean], [p.to(kind) for p in perturbed]
        low_s[2] = low_s[2].to(memory_format=torch.channels_last)
        point = steppe.Point(low, low, [0.1] * 3, [{}] * 3, 0)
        outcomes.append([*combination(point, low_s), *combination(point, None)])
        assert all(torch.equal(x, c.to(kind)) for x, c in zip(low, clean, strict=True)), "g was written to"
        assert all(torch.equal(x, p.to(kind)) for x, p in zip(low_s, perturbed, strict=True)), "g_s was written to"
        assert {x.dtype for x in outcomes[-1]} == {kind}
    for want, got in zip(*outcomes, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=0, atol=40 * eps)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_nothing_is_read_on_the_host(combination):
    with FakeTensorMode():  # any look at a value raises
        g, g_s = ([torch.empty(s, device="cuda") for s in [(3, 2), (5,)]] for _ in range(2))
        point = steppe.Point(g, g, [0.1] * 2, [{}] * 2, 0)
        for down in (combination(point, g_s), combination(point, None)):
            assert [d.shape for d in down] == [x.shape for x in g]
            assert {d.device.type for d in down} == {"cuda"}


# What it costs.


def calls(steps, **rules):
    model = net()
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.01), model=model, **rules)
    x, y = batch()
    count = 0

    def closure():
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return count / steps


def test_passes_a_step():
    assert calls(20, combination=GradientReuse(), cadence=Periodic(5)) == 1.2
    assert calls(20, cadence=LatePhase(0.75, 20)) == 1.25
    assert calls(20, cadence=Bernoulli(0.0)) == 1.0
    assert calls(20, cadence=Bernoulli(1.0)) == 2.0
    for combination in (SurrogateGap(), WeightedSharpness(), PenalizedNorm()):
        assert calls(5, combination=combination) == 2.0


# Cadences.


def ascent_steps(cadence, steps):
    return [cadence(steppe.Point([], [], [], [], step)) for step in range(steps)]


def test_late_begins_at_its_fraction_exactly():
    for percent in range(101):
        assert ascent_steps(LatePhase(percent / 100, 100), 110).index(True) == percent, (
            "the float 0.55 * 100 is above 55"
        )
    assert ascent_steps(LatePhase(0.5, 3), 4) == [False, False, True, True]


def test_random_climbs_are_a_fair_function_of_seed_and_step():
    state, torch_state = random.getstate(), torch.get_rng_state()
    drawn = ascent_steps(Bernoulli(0.3, seed=5), 20_000)
    assert sum(drawn) / 20_000 == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 20_000))
    after = [b for a, b in itertools.pairwise(drawn) if a]
    assert sum(after) / len(after) == pytest.approx(0.3, abs=0.03)
    assert ascent_steps(Bernoulli(0.3, seed=5), 100) == drawn[:100]
    agree = sum(a == b for a, b in zip(drawn, ascent_steps(Bernoulli(0.3, seed=6), 20_000), strict=True))
    assert agree / 20_000 == pytest.approx(0.58, abs=0.02)  # 0.3^2 + 0.7^2
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SurrogateGap(-0.1), "alpha must be finite and not negative"),
        (lambda: SurrogateGap(float("nan")), "alpha must be finite and not negative"),
        (lambda: WeightedSharpness(1.0), "gamma must be at least 0 and less than 1"),
        (lambda: WeightedSharpness(-0.1), "gamma must be at least 0 and less than 1"),
        (lambda: PenalizedNorm(float("inf")), "alpha must be finite and not negative"),
        (lambda: GradientReuse(-1.0), "alpha must be finite and not negative"),
        (lambda: Bernoulli(1.1), "p must be between 0 and 1"),
        (lambda: Bernoulli(float("nan")), "p must be between 0 and 1"),
        (lambda: LatePhase(1.5, 10), "start must be between 0 and 1"),
        (lambda: LatePhase(0.5, 0), "steps must be 1 or more"),
    ],
)
def test_wrong_hyperparameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The inner product.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_inner_product_of_many_shapes_and_layouts(monkeypatch, dtype):
    monkeypatch.setattr(tensors, "_RUN", 500)
    g = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (1,), (257,), (300, 7), (8, 16, 3, 3), (500,), (501,)]
    xs, ys = ([torch.randn(s, generator=g).to(dtype) * 100 for s in shapes] for _ in range(2))
    xs.append(xs[5].to(memory_format=torch.channels_last))
    ys.append(ys[5])
    xs.append(xs[4].t())
    ys.append(ys[4].t().contiguous())
    want = math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(xs, ys, strict=True))
    assert float(dot(xs, ys)) == pytest.approx(want, rel=1e-11)
    assert dot(xs, ys).dtype == torch.float64
    assert dot([], []).item() == 0.0


def test_the_inner_product_is_exact_where_float32_would_lose_it():
    x = torch.full((3_000_000,), 0.1)
    # a float64 sum over runs of 2^20 entries is right to 2^20 eps = 2e-10, however it is cut among threads
    assert float(dot([x], [x])) == pytest.approx(3_000_000 * float(x[0].double()) ** 2, rel=2e-10)
    big = torch.full((3,), 3e38)
    assert float(dot([big], [big])) == pytest.approx(3 * float(big[0].double()) ** 2, rel=1e-12)
    near = [torch.tensor([1e8, 1.0, -1e8])], [torch.tensor([1.0, 1.0, 1.0])]
    assert float(dot(*near)) == 1.0
