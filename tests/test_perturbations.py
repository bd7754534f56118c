"""The ways up beyond SAM and ASAM: each against its slow reference, with mutants, resumed, at zero, in bfloat16."""

import math
from functools import partial

import pytest
import torch

import steppe
from checks import bumpy, resumes
from reference_perturbations import (
    DynamicSparseE,
    FriendlyCodeE,
    FriendlyE,
    SparseE,
    StochasticE,
    VarianceSuppressedE,
    fisher_e,
    layerwise_e,
    linf_e,
    trajectory,
    zscore_e,
)
from steppe import sam
from steppe._engine import engine
from steppe._engine import state_dict as checkpoints
from steppe.methods.dynamic_sparse_sam import DynamicSparse
from steppe.methods.esam import Stochastic
from steppe.methods.fisher_sam import Fisher
from steppe.methods.friendly_sam import Friendly
from steppe.methods.layerwise_sam import LayerWise
from steppe.methods.sparse_sam import Sparse
from steppe.methods.vasso import VarianceSuppressed
from steppe.methods.zsharp import ZScore
from steppe.rules import Point, ScaledDirection
from steppe.rules.l2 import L2
from steppe.rules.linf import LInf
from support import BASES, DRIVES, batch, bits, by_closure, net, train

RHO = 0.1
SHAPES = [(3, 4), (2, 2, 3), (5,), ()]

# A rule, and what makes its slow reference: a fresh one for each run, as some have a memory.
WAYS = {
    "linf": (LInf(), lambda: linf_e),
    "zscore": (ZScore(), lambda: zscore_e),
    "zscore 0.5": (ZScore(percentile=0.5), lambda: partial(zscore_e, Q_p=0.5)),
    "zscore 0.0": (ZScore(percentile=0.0), lambda: partial(zscore_e, Q_p=0.0)),
    "friendly": (Friendly(), FriendlyE),
    "friendly 0.5": (Friendly(sigma=0.5, lmbda=0.6), lambda: FriendlyE(0.5, 0.6)),
    "vasso": (VarianceSuppressed(), VarianceSuppressedE),
    "vasso 0.2": (VarianceSuppressed(theta=0.2), lambda: VarianceSuppressedE(0.2)),
    "fisher": (Fisher(), lambda: fisher_e),
    "fisher 0.05": (Fisher(eta=0.05), lambda: partial(fisher_e, eta=0.05)),
    "layerwise": (LayerWise(), lambda: layerwise_e),
    "layerwise absolute": (LayerWise(relative=False), lambda: partial(layerwise_e, relative=False)),
    "sparse": (Sparse(L2(), sparsity=0.5, every=5), lambda: SparseE(0.5, 5)),
    "sparse 0.9": (Sparse(L2(), sparsity=0.9, every=7), lambda: SparseE(0.9, 7)),
    "dynamic": (DynamicSparse(L2(), steps=20, every=5), lambda: DynamicSparseE(20, 0.5, 0.5, 5, 0)),
    "dynamic 0.8": (
        DynamicSparse(L2(), steps=12, sparsity=0.8, drop=0.9, every=2, seed=3),
        lambda: DynamicSparseE(12, 0.8, 0.9, 2, 3),
    ),
    "stochastic": (Stochastic(L2()), lambda: StochasticE(0.6, 0)),
    "stochastic whole": (Stochastic(L2(), beta=0.5, seed=5, whole=True), lambda: StochasticE(0.5, 5, whole=True)),
}
RULES = {name: rule for name, (rule, _) in WAYS.items()}
WITH_MEAN = {name: rule for name, rule in RULES.items() if isinstance(rule, Friendly | VarianceSuppressed)}
WITH_MASK = {name: rule for name, rule in RULES.items() if isinstance(rule, Sparse | DynamicSparse)}
WITH_MEMORY = WITH_MEAN | WITH_MASK
OF_LENGTH_RHO = [n for n in WAYS if n.split()[0] in ("zscore", "friendly", "vasso")]


def start() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]


def loss(w: list[torch.Tensor], t: int) -> torch.Tensor:
    """A bumpy loss with another slope for each batch: without noise F-SAM would have nothing to climb."""
    flat = torch.cat([part.reshape(-1) for part in w])
    slope = torch.randn(flat.numel(), dtype=flat.dtype, generator=torch.Generator().manual_seed(t))
    return bumpy(flat) + slope @ flat


def matches_reference(name: str, base: str, *, steps: int = 20) -> None:
    """20 steps in float64 agree with the slow reference to 1e-12."""
    rule, way = WAYS[name]
    want = trajectory(loss, start(), way(), BASES[base], rho=RHO, steps=steps)
    params = [torch.nn.Parameter(p) for p in start()]
    optimizer = steppe.SAM(BASES[base](params), rho=RHO, perturbation=rule)
    for t in range(steps):
        by_closure(optimizer, lambda t=t: loss(params, t))
    torch.testing.assert_close([p.detach() for p in params], want, rtol=1e-12, atol=1e-12)


def point(g: list[torch.Tensor], memory: dict | None = None, w: list[torch.Tensor] | None = None) -> Point:
    w = [torch.zeros_like(part) for part in g] if w is None else w
    return Point(w, g, [RHO] * len(g), [{}] * len(g), 0, {} if memory is None else memory)


def e(rule, point: Point) -> list[torch.Tensor]:
    direction, scale = rule(point)
    ascent_steps = zip(point.rho, direction, point.weights, strict=True)
    return [torch.zeros_like(w) if d is None else rho * scale * d for rho, d, w in ascent_steps]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", WAYS)
def test_rule_matches_its_slow_reference(name, base):
    matches_reference(name, base)


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.999])
@pytest.mark.parametrize("name", WAYS)
def test_mutant_wrong_perturbation_is_killed(monkeypatch, name, factor):
    move = engine.Engine.move

    def mutant(self, at, perturbation):
        climb = perturbation(at)
        move(self, at, lambda _: ScaledDirection(climb.direction, climb.scale * factor))

    monkeypatch.setattr(engine.Engine, "move", mutant)
    with pytest.raises(AssertionError):
        matches_reference(name, "sgd")


@pytest.mark.parametrize("name", [n for n in WAYS if n != "linf"])
def test_mutant_plain_sam_is_killed(monkeypatch, name):
    monkeypatch.setitem(WAYS, name, (steppe.L2(), WAYS[name][1]))
    with pytest.raises(AssertionError):
        matches_reference(name, "sgd")


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_mutant_memory_of_one_step_is_killed(monkeypatch, name):
    monkeypatch.setattr(Point, "memory_of", lambda self, rule: [{} for _ in self.parameters])
    with pytest.raises(AssertionError):
        matches_reference(name, "sgd")


def build_with(rule, base):
    def build(model):
        return steppe.SAM(BASES[base](model.parameters()), rho=0.1, model=model, perturbation=rule)

    return build


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_run_resumed_in_the_middle_has_the_same_bits(name, base):
    resumes(build_with(WITH_MEMORY[name], base), "closure")


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_mutant_checkpoint_without_memory_is_killed(monkeypatch, name):
    monkeypatch.setattr(sam, "pack", lambda base, memory, step: checkpoints.pack(base, {}, step))
    with pytest.raises(AssertionError):
        resumes(build_with(WITH_MEMORY[name], "sgd"), "closure")


@pytest.mark.parametrize("name", WAYS)
def test_zero_gradient_gives_zero_at_first_and_stays_finite(name):
    rule, memory = RULES[name], {}
    w = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    zero = [torch.zeros(shape) for shape in SHAPES]
    assert all((part == 0).all() for part in e(rule, point(zero, memory, w)))
    torch.manual_seed(1)
    assert length(e(rule, point([torch.randn(shape) for shape in SHAPES], memory, w))) > 0
    assert all(part.isfinite().all() for part in e(rule, point(zero, memory, w)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WAYS)
def test_half_precision_weights_are_restored_exactly(name, dtype):
    model = net(dtype=dtype)
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.7, model=model, perturbation=RULES[name])
    before, away = bits(model.parameters()), []
    model.register_forward_pre_hook(lambda *_: away.append(bits(model.parameters()) != before))
    train(model, optimizer, DRIVES["closure"], 5)
    assert away == [False, True] * 5
    assert bits(model.parameters()) == before
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("name", WAYS)
def test_rule_only_reads_the_gradient(name):
    torch.manual_seed(0)
    g, w = [torch.randn(shape) for shape in SHAPES], [torch.zeros(shape) for shape in SHAPES]
    before, memory = bits(g), {}
    for _ in range(2):
        RULES[name](point(g, memory, w))
    assert bits(g) == before
    kept = [t for own in memory.get(type(RULES[name]).__name__, {}).values() for t in own.values()]
    assert all(t.data_ptr() != part.data_ptr() for t in kept for part in g)


def length(x: list[torch.Tensor]) -> float:
    return float(torch.cat([part.reshape(-1) for part in x]).norm())


@pytest.mark.parametrize("name", OF_LENGTH_RHO)
def test_length_of_e_is_rho(name):
    rule, memory, w = RULES[name], {}, start()
    torch.manual_seed(0)
    for _ in range(3):
        g = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        assert length(e(rule, point(g, memory, w))) == pytest.approx(RHO, rel=1e-12)


def test_linf_moves_every_coordinate_by_rho():
    (up,) = e(LInf(), point([torch.tensor([1e-30, -1e30, 0.0])]))
    assert up.tolist() == pytest.approx([RHO, -RHO, 0.0])


def test_zscore_agrees_with_the_quantile_of_torch_for_any_size_and_percentile():
    torch.manual_seed(0)
    for n in (3, 4, 20, 21, 100, 101, 1001):
        for percentile in (0.0, 0.25, 0.5, 0.7, 0.95, 0.99):
            g = [torch.randn(1, n, dtype=torch.float64)]
            torch.testing.assert_close(e(ZScore(percentile), point(g)), zscore_e(g, RHO, Q_p=percentile))


def test_zscore_keeps_the_top_five_percent_of_each_matrix_and_all_of_a_vector():
    torch.manual_seed(0)
    g = [torch.randn(20, 50), 1e-6 * torch.randn(20, 50), torch.randn(7)]
    assert [int((up != 0).sum()) for up in e(ZScore(), point(g))] == [50, 50, 7]


def test_zscore_keeps_a_matrix_of_which_nothing_would_be_left():
    constant, one_zero = torch.full((2, 2), 3.0), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    direction, _ = ZScore(0.5)(point([constant, one_zero, torch.empty(0, 3)]))
    assert torch.equal(direction[0], constant)
    assert torch.equal(direction[1], one_zero)


def test_friendly_with_sigma_1_is_the_authors_code_for_the_same_mean():
    rule, memory, w = Friendly(), {}, start()
    torch.manual_seed(0)
    first = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    rule(point(first, memory, w))
    code = FriendlyCodeE([0.1 * part for part in first])  # the code itself starts from m = first
    for _ in range(5):
        g = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        torch.testing.assert_close(e(rule, point(g, memory, w)), code(g, RHO), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memory_of_a_gradient_that_is_not_finite_is_not_kept(name):
    """On an accelerator a rule sees such a gradient, for nobody has looked at it yet."""
    torch.manual_seed(0)
    rule = RULES[name]
    w, with_bad, without = start(), {}, {}
    good = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    bad = [good[0], good[1] * float("inf"), *good[2:]]
    rule(point(good, with_bad, w))
    rule(point(bad, with_bad, w))
    rule(point(good, without, w))
    torch.testing.assert_close(with_bad, without, rtol=0, atol=0)
    first = {}
    rule(point(bad, first, w))
    assert all(part.isfinite().all() for part in e(rule, point(good, first, w)))


@pytest.mark.parametrize("name", WITH_MEAN)
def test_parameter_that_joins_later_begins_its_own_memory(name):
    rule, memory = RULES[name], {}
    w, g = start(), start()
    rule(point(g[:2], memory, w[:2]))
    assert length(e(rule, point(g, memory, w))) == pytest.approx(RHO)
    assert set(memory[type(rule).__name__]) == set(w)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ZScore(percentile=95), "percentile must be at least 0 and less than 1, got 95"),
        (lambda: ZScore(percentile=-0.1), "percentile must be"),
        (lambda: ZScore(percentile=float("nan")), "percentile must be"),
        (lambda: Friendly(sigma=-1.0), "sigma must be finite and not negative, got -1.0"),
        (lambda: Friendly(sigma=float("inf")), "sigma must be"),
        (lambda: Friendly(lmbda=1.0), "lmbda must be between 0 and 1, got 1.0"),
        (lambda: Friendly(lmbda=0.0), "lmbda must be"),
        (lambda: VarianceSuppressed(theta=0.0), "theta must be more than 0 and at most 1, got 0.0"),
        (lambda: VarianceSuppressed(theta=1.1), "theta must be"),
        (lambda: Fisher(eta=-0.5), "eta must be finite and not negative, got -0.5"),
        (lambda: Fisher(eta=math.nan), "eta must be"),
    ],
)
def test_wrong_hyperparameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_limits_are_sam():
    memories, w = ({}, {}), start()
    for _ in range(3):
        g = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        sam_e = e(steppe.L2(), point(g, w=w))
        torch.testing.assert_close(e(Friendly(sigma=0.0), point(g, memories[0], w)), sam_e)
        torch.testing.assert_close(e(VarianceSuppressed(theta=1.0), point(g, memories[1], w)), sam_e)
        torch.testing.assert_close(e(Fisher(eta=0.0), point(g, w=w)), sam_e)
        torch.testing.assert_close(e(Stochastic(L2(), beta=1.0), point(g, w=w)), sam_e)
        torch.testing.assert_close(e(Sparse(L2(), sparsity=0.0), point(g, {}, w)), sam_e)


@pytest.mark.parametrize("name", WAYS)
def test_training_with_the_rule_brings_the_loss_down(name):
    model = net(dropout=0.0)
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1e-3, model=model, perturbation=RULES[name])
    x, y = batch()
    values = [by_closure(optimizer, lambda: torch.nn.functional.cross_entropy(model(x), y)).item() for _ in range(15)]
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("name", WAYS)
def test_complex_parameters_climb_as_their_real_views(name):
    torch.manual_seed(4)
    z = [torch.randn(3, 2, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128)]
    slope = torch.randn(20, dtype=torch.float64)
    ends = []
    for params in ([torch.nn.Parameter(p.clone()) for p in z], [torch.nn.Parameter(torch.view_as_real(p)) for p in z]):
        optimizer = steppe.SAM(torch.optim.SGD(params, lr=0.05), rho=RHO, perturbation=RULES[name])

        def numbers(params=params):
            real = [torch.view_as_real(p) if p.is_complex() else p for p in params]
            return torch.cat([p.reshape(-1) for p in real])

        for t in range(8):
            by_closure(optimizer, lambda t=t, n=numbers: bumpy(n()) + n() @ slope.roll(t))
        ends.append(numbers().detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WAYS)
def test_every_group_climbs_with_its_own_rho(name):
    ascent_steps = []
    for radii in ((RHO, RHO), (RHO, 3 * RHO)):
        params = [torch.nn.Parameter(p) for p in start()]
        groups = [{"params": params[:2], "sam_rho": radii[0]}, {"params": params[2:], "sam_rho": radii[1]}]
        optimizer = steppe.SAM(torch.optim.SGD(groups, lr=0.0), rho=RHO, perturbation=RULES[name])
        places = []

        def value(params=params, places=places):
            places.append([p.detach().clone() for p in params])
            return loss(params, 0)

        by_closure(optimizer, value)
        ascent_steps.append([up - at for at, up in zip(*places, strict=True)])
    (a, b, c, d), other = ascent_steps
    assert any(part.any() for part in ascent_steps[0])
    torch.testing.assert_close(other, [a, b, 3 * c, 3 * d])


@pytest.mark.parametrize("name", ["fisher", "layerwise", "layerwise absolute"])
@pytest.mark.parametrize("size", [1e-4, 300.0, 6e4])
def test_float16_gradients_of_any_size_give_the_same_e_as_in_float64(name, size):
    """300 squared, and 1 / 1e-7, are beyond float16."""
    torch.manual_seed(0)
    g = [(size * torch.randn(shape).clamp(-1, 1)).half() for shape in SHAPES]
    w = [torch.randn(shape).half() for shape in SHAPES]
    got = e(RULES[name], point(g, w=w))
    want = e(RULES[name], point([part.double() for part in g], w=[part.double() for part in w]))
    torch.testing.assert_close([part.double() for part in got], want, rtol=2e-3, atol=1e-6)


def test_fisher_climbs_by_rho_in_its_own_metric():
    torch.manual_seed(0)
    g = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    up = e(Fisher(eta=0.7), point(g))
    in_metric = sum(((1 + 0.7 * part**2) * climb**2).sum() for part, climb in zip(g, up, strict=True)).sqrt()
    assert in_metric.item() == pytest.approx(RHO, rel=1e-12)
    assert length(up) < RHO


def test_layerwise_lengths_are_relative_or_all_the_same_and_zero_layers_stay():
    torch.manual_seed(0)
    w, g = start(), [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    w[1].zero_()
    g[2].zero_()
    lengths = [length([part]) for part in e(LayerWise(), point(g, w=w))]
    assert lengths == pytest.approx([RHO * length([w[0]]), 0, 0, RHO * length([w[3]])], rel=1e-12)
    lengths = [length([part]) for part in e(LayerWise(relative=False), point(g, w=w))]
    assert lengths == pytest.approx([RHO, RHO, 0, RHO], rel=1e-12)
