"""MSAM against its slow reference, and the single pass of rules that need no gradient."""

import copy

import pytest
import torch
from named_methods import passes_per_step
from torch import nn

import steppe
from checks import bumpy, split
from reference import loss_and_gradient
from steppe import SAM
from steppe.methods.msam import Momentum
from support import DRIVES, bits, by_closure, by_passes, model_bits, net, plain, train

BASES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "momentum_buffer"),
    "maximize": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, maximize=True), "momentum_buffer"),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-2), "exp_avg"),
}
single_pass = pytest.mark.parametrize("drive", ["closure", "passes"])


@single_pass
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0])
def test_rule_matches_its_slow_reference_and_its_mutants_do_not(base, drive, factor):
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
    assert len(calls) == 20, "one pass per step"
    assert torch.allclose(got, w, rtol=1e-12, atol=1e-12) == (factor == 1.0)


@single_pass
def test_single_pass_changes_buffers_and_generators_as_a_plain_step_does(drive):
    model, twin = net(), net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9), rho=3.0, model=model)
    optimizer.perturbation = Momentum()
    base = torch.optim.SGD(twin.parameters(), lr=0.0, momentum=0.9)
    torch.manual_seed(1)
    train(model, optimizer, DRIVES[drive], 1)  # no momentum yet: no perturbation
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


def test_single_pass_restores_after_an_exception_and_skips_a_step_that_is_not_finite():
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


def test_uses_that_need_a_pass_at_w_are_errors():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1, momentum=0.9), perturbation=Momentum())
    w.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"first_step\(\) with Momentum"):
        optimizer.first_step()
    optimizer.cadence = lambda point: bool(point.gradient_norm > 1)
    with pytest.raises(ValueError, match="needs the gradient at w"):
        by_passes(optimizer, lambda: w.square().sum())
    bare = SAM(torch.optim.SGD([w], lr=0.1), perturbation=Momentum())
    by_passes(bare, lambda: w.square().sum())
    with pytest.raises(ValueError, match="keeps no momentum"):
        by_passes(bare, lambda: w.square().sum())


@pytest.mark.parametrize("drive", DRIVES)
def test_combination_that_needs_g_gets_a_pass_at_w_and_one_at_w_plus_e(drive):
    """PGN around MSAM, for 5 steps against the formula."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    combination = steppe.PenalizedNorm(alpha=0.3)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1, momentum=0.9), 0.5, perturbation=Momentum(), combination=combination)
    points = []

    def loss():
        points.append(w.detach().clone())
        return (w**4).sum() / 4

    want, v = w.detach().clone(), None
    for _ in range(5):
        perturbed = want if v is None else want - 0.5 * v / v.norm()
        update = 0.7 * want**3 + 0.3 * perturbed**3
        v = update if v is None else 0.9 * v + update
        want = want - 0.1 * v
        DRIVES[drive](optimizer, loss)
        torch.testing.assert_close(w.detach(), want, rtol=1e-12, atol=1e-12)
    assert len(points) == 10


def test_step_costs_one_pass():
    assert passes_per_step("msam") == 1.0
