"""Masks: which coordinates they keep, when they change, what of them is saved; and the helpers that choose layers."""

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import steppe
from steppe import SAM
from steppe._tensors import random as random_tensors
from steppe.methods.dynamic_sparse_sam import DynamicSparse
from steppe.methods.esam import Stochastic
from steppe.methods.fisher_sam import Fisher
from steppe.methods.layerwise_sam import LayerWise
from steppe.methods.msam import Momentum
from steppe.methods.rwp import GaussianNoise
from steppe.methods.sparse_sam import Sparse
from steppe.rules import Point
from steppe.rules.l2 import L2
from steppe.rules.linf import LInf
from steppe.rules.masks import Masked
from steppe.rules.subsets import ParameterSubset, last_layers, layers
from support import DRIVES, by_closure, net, train

SHAPES = [(30, 20), (7, 3, 3), (11,), ()]  # 675 numbers
DYNAMIC = DynamicSparse(LInf(), steps=100, every=5)


def gradients(seed=0, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(dtype) for shape in SHAPES]


def at(g, step=0, memory=None, w=None):
    return Point(g if w is None else w, g, [1.0] * len(g), [{}] * len(g), step, {} if memory is None else memory)


def mask(rule, point):
    """Where the climb is not zero: with LInf, the mask."""
    return torch.cat([d.reshape(-1) for d in rule(point).direction]) != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 675), (0.5, 337), (0.9, 67), (0.98, 13), (0.9999, 1)])
@pytest.mark.parametrize("make", [Sparse, lambda rule, s: DynamicSparse(rule, 100, s, every=1)])
def test_the_kept_fraction_is_exact_at_every_step(make, sparsity, kept, dtype):
    """In bfloat16 many gradients are equal."""
    rule, memory, w = make(LInf(), sparsity), {}, gradients()
    for step in range(12):
        got = mask(rule, at(gradients(step, dtype), step, memory, w))
        assert abs(int(got.sum()) - kept) <= 1
        assert int(got.sum()) == max(1, 675 - round(675 * sparsity))


def test_all_of_a_constant_gradient_is_no_more_than_the_fraction():
    rule, zero = Sparse(LInf(), 0.5), [torch.ones(10)]
    assert int(mask(rule, at(zero)).sum()) == 5


def test_sparse_keeps_the_largest_gradients_of_all_parameters_together():
    g = [torch.tensor([5.0, -4.0]), torch.tensor([[0.1, -3.0]]), torch.tensor(2.0), torch.tensor([-6.0])]
    direction, _ = Sparse(L2(), sparsity=0.5)(at(g))
    assert [d.tolist() for d in direction] == [[5.0, -4.0], [[0.0, 0.0]], 0.0, [-6.0]]


def test_the_mask_comes_after_the_normalization():
    g = gradients()
    direction, scale = Sparse(L2(), sparsity=0.5)(at(g))
    e = torch.cat([(scale * d).reshape(-1) for d in direction])
    line = torch.cat([part.reshape(-1) for part in g])
    torch.testing.assert_close(e.float(), torch.where(e != 0, line / line.norm(), 0.0))
    assert e.norm() < 0.999


@pytest.mark.parametrize("rule", [Sparse(LInf(), every=5), DYNAMIC], ids=["sparse", "dynamic"])
def test_masks_change_at_the_steps_of_their_interval_only(rule):
    memory, w = {}, gradients()
    masks = [mask(rule, at(gradients(step), step, memory, w)) for step in range(3, 17)]
    changes = [step for step, (a, b) in enumerate(pairwise(masks), 4) if not torch.equal(a, b)]
    assert changes == [5, 10, 15]


@pytest.mark.parametrize("step", [0, 25, 50, 100, 250])
def test_dynamic_drops_the_flattest_and_grows_what_was_not_there(step):
    memory, w = {}, gradients()
    rule = DynamicSparse(LInf(), steps=100, drop=0.4, every=1)
    before = mask(rule, at(gradients(1), 1, memory, w))
    g = gradients(2)
    after = mask(rule, at(g, step, memory, w))
    size = torch.cat([part.reshape(-1).abs() for part in g])
    number = int(0.4 * (1 + math.cos(math.pi * min(step, 100) / 100)) / 2 * 337)
    gone, come = before & ~after, after & ~before
    assert gone.sum() == come.sum() == number
    if number:
        assert size[gone].max() < size[before & after].min()


def test_dynamic_draws_another_mask_for_another_seed():
    masks = [mask(DynamicSparse(LInf(), 10, seed=seed), at(gradients())) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert 200 < (masks[0] ^ masks[2]).sum() < 500
    parts = DynamicSparse(LInf(), 10)(at(gradients())).direction
    assert (parts[0] != 0).double().mean() == pytest.approx(0.5, abs=0.1)


def test_masks_change_once_in_a_step_of_several_climbs():
    w = [nn.Parameter(part) for part in gradients()]
    for inner in (Sparse(LInf(), every=1), DynamicSparse(LInf(), steps=100, every=1)):
        optimizer = SAM(torch.optim.SGD(w, lr=0.0), rho=1e-3, perturbation=steppe.AscentSteps(inner, k=3))
        places = []

        def loss(places=places):
            line = torch.cat([p.reshape(-1) for p in w])
            places.append(line.detach().clone())
            return line @ torch.cat([part.reshape(-1) for part in gradients(len(places))])

        for _ in range(3):
            places.clear()
            by_closure(optimizer, loss)
            moved = [place != places[0] for place in places[1:]]
            assert moved[0].any()
            assert not (moved[2] & ~moved[0]).any()


@pytest.mark.parametrize("rule", [Sparse(L2(), every=5), DYNAMIC], ids=["sparse", "dynamic"])
@pytest.mark.parametrize("drive", DRIVES)
def test_memory_is_a_bool_a_coordinate_before_and_after_a_checkpoint(rule, drive):
    def memory_of(optimizer):
        return {p: own["mask"] for p, own in optimizer._engine.memory[type(rule).__name__].items()}

    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model, perturbation=rule)
    train(model, optimizer, DRIVES[drive], 3)
    masks = memory_of(optimizer)
    assert all(m.dtype == torch.bool and m.shape == p.shape for p, m in masks.items())
    assert all(m.untyped_storage().nbytes() == m.numel() for m in masks.values())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model, perturbation=rule)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    train(model, fresh, DRIVES[drive], 1, start=3)
    assert all(
        torch.equal(memory_of(fresh)[p], m) and memory_of(fresh)[p].dtype == torch.bool for p, m in masks.items()
    )


def test_a_mask_of_ones_own_stays_and_leaves_other_parameters_whole():
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([12.0]))
    masks = {a: torch.tensor([False, True])}
    optimizer = SAM(torch.optim.SGD([a, b], lr=0.0), rho=1.0, perturbation=Masked(L2(), masks))
    masks.clear()
    seen = []
    by_closure(optimizer, lambda: (seen.append(a.tolist() + b.tolist()), (a.square().sum() + b.square().sum()) / 2)[1])
    assert seen[1] == pytest.approx([3.0, 4.0 + 4 / 13, 12.0 + 12 / 13])
    a2, copied = copy.deepcopy((a, optimizer))
    assert any(p is a2 for p in copied.perturbation.masks)
    z = nn.Parameter(torch.tensor([1 + 1j, 2 + 2j]))
    optimizer = SAM(
        torch.optim.SGD([z], lr=0.0), rho=1.0, perturbation=Masked(LInf(), {z: torch.tensor([True, False])})
    )
    seen = []
    by_closure(optimizer, lambda: (seen.append(z.tolist()), z.abs().square().sum())[1])
    assert seen[1] == [2 + 2j, 2 + 2j]


@pytest.mark.parametrize("whole", [False, True])
def test_stochastic_is_the_rule_on_average(whole):
    g = [torch.randn(40, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(5)]
    rule, want = LInf(), torch.cat(g).sign()
    total, steps, shares = torch.zeros(200, dtype=torch.float64), 3000, []
    for step in range(steps):
        direction, scale = Stochastic(rule, beta=0.4, whole=whole)(at(g, step))
        e = torch.cat([torch.zeros(40) if d is None else scale * d for d in direction])
        shares.append((e != 0).double().mean())
        total += e
    spread = math.sqrt((1 - 0.4) / 0.4 / steps)
    assert (total / steps - want).abs().max() < 5 * spread
    assert torch.stack(shares).mean() == pytest.approx(0.4, abs=0.03)
    assert torch.stack(shares).std() > 0.02


def test_stochastic_whole_gives_the_rule_the_chosen_tensors_only():
    g = [torch.tensor([float(3 + i)]) for i in range(6)]
    direction, scale = Stochastic(L2(), beta=0.5, seed=1, whole=True)(at(g))
    chosen = [part for part in direction if part is not None]
    assert 0 < len(chosen) < 6
    assert (scale * torch.cat(chosen)).norm().item() == pytest.approx(2.0)


def test_stochastic_does_not_draw_with_a_cadence_of_the_same_seed():
    cadence = steppe.Bernoulli(p=0.5, seed=0)
    rule = Stochastic(LInf(), beta=0.5, seed=0, whole=True)
    g = [torch.ones(1)]
    both = [(cadence(at(g, step)), rule(at(g, step)).direction[0] is not None) for step in range(1000)]
    ascent_steps = [drawn for climbed, drawn in both if climbed]
    assert sum(ascent_steps) / len(ascent_steps) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparse(L2(), sparsity=1.0), "sparsity must be at least 0 and less than 1, got 1.0"),
        (lambda: Sparse(L2(), sparsity=-0.1), "sparsity must be"),
        (lambda: Sparse(L2(), every=0), "every must be 1 or more, got 0"),
        (lambda: Sparse(Momentum()), "needs no gradient at w, and there is none then to choose a mask by"),
        (lambda: DynamicSparse(GaussianNoise(), 10), "needs no gradient at w"),
        (lambda: DynamicSparse(L2(), 10, drop=1.5), "drop must be between 0 and 1, got 1.5"),
        (lambda: DynamicSparse(L2(), 0), "steps must be 1 or more, got 0"),
        (lambda: Stochastic(L2(), beta=0.0), "beta must be more than 0 and at most 1, got 0.0"),
        (lambda: Stochastic(L2(), beta=1.1), "beta must be"),
        (lambda: Stochastic(steppe.AscentSteps(L2(), k=3)), r"climbs 3 times.*Steps\(Stochastic\(L2\(\)\)\)"),
        (lambda: Sparse(steppe.AscentSteps(L2(), k=2)), r"Steps\(Sparse\(L2\(\)\)\)"),
        (lambda: Masked(L2(), {torch.ones(2): torch.ones(2)}), r"a bool tensor of its shape \(2,\), got torch.float32"),
        (lambda: Masked(L2(), {torch.ones(2): torch.ones(3, dtype=torch.bool)}), r"shape \(3,\)"),
        (lambda: layers(nn.Linear(1, 1)), "no pattern, so no layer"),
        (lambda: layers(nn.Sequential(nn.Linear(1, 1)), "0", "head"), "called 'head': this model has 0"),
        (lambda: layers(nn.Sequential(nn.ReLU()), "0"), "this model has none at all"),
        (lambda: last_layers(nn.Sequential(nn.Linear(1, 1)), 2), "k must be between 1 and 1.*got 2"),
        (lambda: last_layers(nn.Sequential(nn.Linear(1, 1)), 0), "got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_several_climbs_may_be_masked_or_restricted():
    p, q = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(1))
    for rule in (
        ParameterSubset(steppe.AscentSteps(LInf(), k=2), [p]),
        Masked(steppe.AscentSteps(LInf(), k=2), {q: torch.zeros(1, dtype=torch.bool)}),
    ):
        optimizer = SAM(torch.optim.SGD([p, q], lr=0.0), rho=1.0, perturbation=rule)
        seen = []
        by_closure(optimizer, lambda seen=seen: (seen.append(p.tolist() + q.tolist()), p.square().sum() + q.sum())[1])
        assert seen == [[3, 4, 1], [3.5, 4.5, 1], [4, 5, 1]]


def test_layers_are_chosen_by_the_names_of_modules():
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)), "head": nn.Linear(2, 1)}
    )
    names = {p: name for name, p in model.named_parameters()}

    def chosen(*patterns):
        return [names[p] for p in layers(model, *patterns)]

    assert chosen("head") == ["head.weight", "head.bias"]
    assert chosen("head", "body.[01]") == [f"{m}.{k}" for m in ("body.0", "body.1", "head") for k in ("weight", "bias")]
    assert chosen("body") == chosen("body.*") == [n for n in names.values() if n.startswith("body")]
    assert chosen("*") == list(names.values())
    assert [names[p] for p in last_layers(model, 2)] == ["body.2.weight", "body.2.bias", "head.weight", "head.bias"]
    assert len(last_layers(model, 4)) == 8


def test_last_layers_count_a_parameter_of_two_modules_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert len(last_layers(model, 2)) == len(layers(model, "*")) == 1


@pytest.mark.parametrize(
    "rule",
    [
        GaussianNoise(),
        GaussianNoise(filterwise=True),
        Fisher(),
        LayerWise(),
        Sparse(L2(), every=3),
        DynamicSparse(L2(), steps=10, every=3),
        Stochastic(L2()),
        Stochastic(L2(), whole=True),
    ],
    ids=repr,
)
def test_nothing_is_read_back_from_an_accelerator(rule, monkeypatch):
    """Tensors without values refuse to be read; a build without CUDA has no generators for it."""
    monkeypatch.setattr(random_tensors, "generator", lambda device, key: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in [(3, 4), (5,)]]
        optimizer = SAM(torch.optim.SGD(params, lr=0.1), rho=0.1, perturbation=rule)

        def give():
            for p in params:
                p.grad = torch.ones_like(p)

        for _ in range(8):
            optimizer.step(give)
        assert optimizer._engine.steps == 8
