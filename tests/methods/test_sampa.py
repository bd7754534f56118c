"""SAMPa: against its slow reference; two processes against one; special cases, exceptions and arguments."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
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
from ranks import start_ranks
from steppe.methods.sampa import Delayed, SAMPa
from support import BASES, DRIVES, bits, by_closure, by_passes, model_bits, net, plain, saved_and_loaded, train

RHO = 0.3


def sampa(L: Loss, w: Tensor, base, steps: int, rho: float, lambda_: float) -> Tensor:
    """arXiv 2410.10683, as the authors' loop runs it: batch t - 1 at the perturbed weights, batch t at y."""
    x = w.detach().clone().requires_grad_()
    optimizer = base([x])
    g_y = torch.zeros_like(x)
    for t in range(steps):
        group, eta = optimizer.param_groups[0], optimizer.param_groups[0]["lr"]
        x_tilde = x.detach() + rho * normalized(g_y)
        descent = g_y
        m = optimizer.state[x].get("momentum_buffer")
        if m is not None:
            descent = g_y + group["weight_decay"] * x.detach() + group["momentum"] * m
        y = x.detach() - eta * descent
        g_x = gradient(L, x_tilde, max(t - 1, 0))
        g_y = gradient(L, y, t)
        base_step(optimizer, x, (1 - lambda_) * g_x + lambda_ * g_y)
    return x.detach()


def reference(base, lmbda=0.2):
    return sampa(loss, start(), STABLE_BASES[base], 20, RHO, lmbda)


@pytest.mark.parametrize("drive", ["closure", "passes"])
@pytest.mark.parametrize("base", STABLE_BASES)
@pytest.mark.parametrize("lmbda", [0.2, 0.0, 1.0, 0.7])
def test_sampa_matches_its_slow_reference(base, drive, lmbda):
    assert_close(trained(lambda ps: SAMPa(STABLE_BASES[base](ps), RHO, lmbda=lmbda), drive), reference(base, lmbda))


@pytest.mark.parametrize("base", STABLE_BASES)
def test_mutant_other_rho_lambda_or_y_is_killed(base, monkeypatch):
    for rho, lmbda in ((0.999 * RHO, 0.2), (0.0, 0.2), (RHO, 0.0), (RHO, 0.2 * 0.999)):
        mutant = trained(lambda ps, r=rho, m=lmbda: SAMPa(STABLE_BASES[base](ps), r, lmbda=m))
        with pytest.raises(AssertionError):
            assert_close(mutant, reference(base))
    sam = trained(lambda ps: steppe.SAM(STABLE_BASES[base](ps), RHO))
    with pytest.raises(AssertionError):
        assert_close(sam, reference(base, 0.0))
    monkeypatch.setattr(SAMPa, "_displace_to_y", lambda self: None)  # y = x
    with pytest.raises(AssertionError):
        assert_close(trained(lambda ps: SAMPa(STABLE_BASES[base](ps), RHO)), reference(base))


@pytest.mark.parametrize("base", BASES)
def test_rho_and_lambda_zero_on_one_batch_are_the_base_to_the_bit(base):
    runs = []
    for make in (lambda ps: SAMPa(BASES[base](ps), 0.0, lmbda=0.0), BASES[base]):
        params = [torch.nn.Parameter(p.float()) for p in split(start())]
        optimizer = make(params)
        for _ in range(6):
            by_closure(optimizer, lambda ps=params: loss(flat(ps), 0))
        runs.append(bits(params))
    assert runs[0] == runs[1]


def test_passes_run_at_y_and_at_the_perturbed_weights():
    w = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = SAMPa(torch.optim.SGD([w], lr=0.1), rho=0.5, lmbda=0.2)
    points = []
    for _ in range(2):
        for sam_pass in optimizer.passes():
            with sam_pass:
                points.append((round(w.item(), 4), sam_pass.is_perturbed))
                w.square().sum().backward()
        assert w.grad is None
        optimizer.step()
    assert points[:3] == [(1.0, False), (1.3, True), (0.6, False)]
    assert w.item() == pytest.approx(0.8 - 0.1 * (0.8 * 2.6 + 0.2 * 1.2))
    assert points[3] == (pytest.approx(0.568 + 0.5), True)


def test_adaptive_perturbation_and_maximize_mirror_minimization():
    w, v = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0}
    down = SAMPa(torch.optim.SGD([w], **options), rho=0.5, perturbation=steppe.Adaptive())
    up = SAMPa(torch.optim.SGD([v], **options, maximize=True), rho=0.5, perturbation=steppe.Adaptive())
    for _ in range(5):
        by_closure(down, lambda: w.pow(4).sum())
        by_closure(up, lambda: -v.pow(4).sum())
    assert bits([w]) == bits([v])


def test_after_an_exception_at_the_perturbed_weights_the_next_step_is_a_first_one():
    params = [torch.nn.Parameter(p) for p in split(start())]
    optimizer = SAMPa(STABLE_BASES["sgd"](params), RHO)
    by_closure(optimizer, lambda: loss(flat(params), 0))
    calls = []

    def fails():
        calls.append(1)
        return loss(flat(params), 1) if len(calls) == 1 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        by_closure(optimizer, fails)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = SAMPa(STABLE_BASES["sgd"](twin), RHO)
    for t in range(2, 5):
        by_closure(optimizer, lambda t=t: loss(flat(params), t))
        by_closure(fresh, lambda t=t: loss(flat(twin), t))
    assert bits(params) == bits(twin)


def test_delayed_yields_each_batch_one_step_later_and_the_first_twice():
    delayed = Delayed([1, 2, 3])
    assert (list(delayed), list(delayed), len(delayed)) == ([1, 1, 2], [3, 1, 2], 3)
    with pytest.raises(TypeError, match="have no length"):
        len(Delayed(itertools.count()))


def test_argument_out_of_range_is_an_error():
    w = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(ValueError, match="lmbda must be between 0 and 1"):
        SAMPa(sgd, lmbda=1.2)
    with pytest.raises(ValueError, match="perturbs once a step along the gradient"):
        SAMPa(sgd, perturbation=steppe.Momentum())
    with pytest.raises(TypeError, match="a cadence of its own"):
        SAMPa(sgd, cadence=steppe.Periodic(2))
    with pytest.raises(RuntimeError, match=r"accumulate=True.*micro-batches inside"):
        next(SAMPa(sgd).passes(accumulate=True))

    class Fixed(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    with pytest.raises(ValueError, match="no 'lr'"):
        SAMPa(Fixed([w]))


# Two processes.

STEPS = 12


def results_of_rank():
    """Return the results of the cases of the tests below on one rank."""
    rank, results = dist.get_rank(), {}
    for base, lmbda, drive in CASES:
        params = [torch.nn.Parameter(p) for p in split(start())]
        optimizer = SAMPa(STABLE_BASES[base](params), RHO, lmbda=lmbda, group=dist.group.WORLD)
        calls = []
        batches = Delayed(range(4)) if rank == 0 else range(4)
        for step, t in enumerate(itertools.chain(*(list(batches) for _ in range(STEPS // 4)))):
            if step == 5:  # through a checkpoint
                saved = copy.deepcopy(saved_and_loaded(optimizer.state_dict()))
                optimizer = SAMPa(STABLE_BASES[base](params), RHO, lmbda=lmbda, group=dist.group.WORLD)
                optimizer.load_state_dict(saved)
            DRIVES[drive](optimizer, lambda t=t, ps=params, c=calls: (c.append(1), loss(flat(ps), t))[1])
        results[base, lmbda, drive] = flat(params).detach()
        assert len(calls) == STEPS, "not one pass a step and rank"
    model = net(seed=rank, dropout=0.0)
    model.load_state_dict(net(seed=0, dropout=0.0).state_dict())
    optimizer = SAMPa(BASES["momentum"](model.parameters()), RHO, group=dist.group.WORLD, model=model)
    for step in range(4):
        train(model, optimizer, by_closure, 1, start=max(step - 1, 0) if rank == 0 else step)
    results["model"] = model.state_dict()
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = SAMPa(torch.optim.SGD([w], lr=0.1), group=dist.group.WORLD)
    for factor in (1.0, float("nan") if rank == 1 else 1.0, 1.0, float("nan") if rank == 0 else 1.0, 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_closure(optimizer, lambda f=factor: f * w.square().sum())
    results["skipped"] = torch.tensor(optimizer.skipped_steps)
    results["finite"] = w.detach()
    return results


CASES = [("sgd", 0.2, "closure"), ("momentum", 0.2, "passes"), ("adamw", 0.7, "closure"), ("momentum", 0.0, "closure")]


@pytest.fixture(scope="module")
def ranks():
    return start_ranks()(results_of_rank)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(ranks, case):
    base, lmbda, _ = case
    params = [torch.nn.Parameter(p) for p in split(start())]
    optimizer = SAMPa(STABLE_BASES[base](params), RHO, lmbda=lmbda)
    for step in range(STEPS):
        by_closure(optimizer, lambda t=step % 4: loss(flat(params), t))
    assert_close(ranks[0][case], flat(params).detach())
    assert bits([ranks[0][case]]) == bits([ranks[1][case]]), "the replicas differ"
    far = trained(lambda ps: SAMPa(STABLE_BASES[base](ps), RHO, lmbda=0.999 * lmbda + 1e-3), steps=STEPS)
    with pytest.raises(AssertionError):
        assert_close(ranks[0][case], far)


def test_model_in_two_processes_has_the_weights_and_buffers_of_one(ranks):
    model = net(dropout=0.0)
    train(model, SAMPa(BASES["momentum"](model.parameters()), RHO, model=model), by_passes, 4)
    for rank in ranks:
        torch.testing.assert_close(rank["model"], dict(model.state_dict()), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["model"].values(), ranks[1]["model"].values(), strict=True))


def test_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_both(ranks):
    for rank in ranks:
        assert rank["skipped"] == 2
        assert rank["finite"].isfinite().all()
    assert torch.equal(ranks[0]["finite"], ranks[1]["finite"])


def test_group_of_another_size_is_an_error(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="1 processes.*groups of two"):
            SAMPa(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_rho_and_lambda_zero_train_a_model_as_the_base_on_the_batch_before():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    one = SAMPa(BASES["sgd"](model.parameters()), 0.0, lmbda=0.0, model=model)
    two = BASES["sgd"](twin.parameters())
    for step in (0, 1, 2):
        train(model, one, by_closure, 1, start=step)
    for step in (0, 0, 1):  # the update gradient is that of the batch before
        train(twin, two, plain, 1, start=step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert model_bits(model) != model_bits(twin), "the buffers hold statistics of batch 2"


def test_perturbation_that_is_assigned_later_is_checked_like_the_constructors():
    optimizer = SAMPa(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    optimizer.perturbation = steppe.Adaptive()
    with pytest.raises(ValueError, match="SAMPa perturbs once a step along the gradient at y"):
        optimizer.perturbation = steppe.GaussianNoise()
    assert optimizer.perturbation == steppe.Adaptive()


def test_layer_that_is_frozen_does_not_move_any_more():
    model = net(dropout=0.0)
    optimizer = SAMPa(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    train(model, optimizer, by_closure, 2)
    first = next(iter(model.parameters())).requires_grad_(False)
    before = first.detach().clone()
    train(model, optimizer, by_closure, 2, start=2)
    assert torch.equal(first, before)
