"""The classic API: code for the well-known implementation runs after a change of one import."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reference import sam_e, trajectory
from steppe.compat import SAM, disable_bn_stats, disable_running_stats, enable_bn_stats, enable_running_stats
from support import batch, by_classic, model_bits, net


def test_classic_loop_keeps_the_statistics_of_the_first_pass():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.0)
    for step in range(3):
        x, y = batch(step)
        enable_bn_stats(model)
        F.cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        disable_bn_stats(model)
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        F.cross_entropy(twin(x), y).backward()
    enable_bn_stats(model)
    assert model_bits(model) == model_bits(twin)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("adaptive", [False, True])
def test_classic_rules_match_the_reference(adaptive):
    L = lambda w: (w**3).sum() + w.prod()  # noqa: E731
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def perturb(w, g):  # the classic ASAM has no eta
        return w**2 * g * 0.5 / (w.abs() * g).norm() if adaptive else sam_e(w, g, 0.5)

    base = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)  # noqa: E731
    w = nn.Parameter(start.clone())
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, adaptive=adaptive, lr=1e-3, momentum=0.9)
    for _ in range(20):
        by_classic(optimizer, lambda: L(w))
    torch.testing.assert_close(w.detach(), trajectory(L, start, perturb, base, 20), rtol=1e-12, atol=1e-12)


def test_classic_constructor_arguments():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM([w], torch.optim.SGD, 0.1, False, lr=0.3)
    assert (optimizer.param_groups[0]["sam_rho"], optimizer.base_optimizer.param_groups[0]["lr"]) == (0.1, 0.3)
    assert SAM([w], base_optimizer=torch.optim.AdamW, lr=0.3).base_optimizer.defaults["lr"] == 0.3
    assert SAM([{"params": [w], "rho": 0.7}], torch.optim.SGD, lr=0.1).param_groups[0]["sam_rho"] == 0.7
    calls = []
    optimizer.step(lambda: (calls.append(1), optimizer.zero_grad(), w.square().sum().backward())[0])
    assert len(calls) == 2
    assert copy.deepcopy(optimizer).base_optimizer.defaults["lr"] == 0.3


def test_classic_step_calls_the_closure_for_the_second_pass_only():
    L = lambda w: (w**3).sum() + w.prod()  # noqa: E731
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    base = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)  # noqa: E731
    w = nn.Parameter(start.clone())
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=1e-3, momentum=0.9)
    calls, hooks = [], []
    optimizer.register_step_pre_hook(lambda *_: hooks.append(1))

    def closure():  # step() clears the gradient between the passes
        calls.append(1)
        loss = L(w)
        loss.backward()
        return loss

    for _ in range(20):
        L(w).backward()
        optimizer.step(closure)
        optimizer.zero_grad()
    want = trajectory(L, start, lambda w, g: sam_e(w, g, 0.5), base, 20)
    torch.testing.assert_close(w.detach(), want, rtol=1e-12, atol=1e-12)
    assert len(calls) == len(hooks) == 20
    before = w.detach().clone()
    L(w).backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.equal(w, before)
    optimizer.zero_grad()


def test_radius_written_into_the_group_takes_effect():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.0)
    optimizer.param_groups[0]["rho"] = 2.0
    w.square().sum().backward()
    optimizer.first_step(zero_grad=True)
    torch.testing.assert_close(w.detach(), torch.tensor([4.2, 5.6]))
    optimizer.restore()


NORMS = {"batch": nn.BatchNorm1d, "cumulative": lambda n: nn.BatchNorm1d(n, momentum=None), "sync": nn.SyncBatchNorm}


@pytest.mark.parametrize("norm", NORMS)
def test_disabled_statistics_stay_and_enabled_statistics_change(norm):
    layer, untouched = NORMS[norm](3), NORMS[norm](3)
    x = torch.randn(8, 3)
    before = model_bits(layer)
    disable_bn_stats(layer)
    disable_bn_stats(layer)
    torch.testing.assert_close(layer(x), untouched(x), msg="batch statistics are still used")
    assert model_bits(layer) == before
    assert model_bits(untouched) != before
    enable_bn_stats(layer)
    enable_bn_stats(layer)
    layer(x)
    assert model_bits(layer) == model_bits(untouched)
    disable_bn_stats(layer)
    layer.eval()
    torch.testing.assert_close(layer(x), untouched.eval()(x), msg="in eval mode the running statistics are used")


def test_layers_frozen_before_stay_frozen():
    stateless = nn.BatchNorm1d(3, track_running_stats=False)
    switched_off = nn.BatchNorm1d(3)
    switched_off.track_running_stats = False
    zero = nn.BatchNorm1d(3, momentum=0.0)
    model = nn.Sequential(stateless, switched_off, zero)
    disable_bn_stats(model)
    enable_bn_stats(model)
    assert [m.track_running_stats for m in model] == [False, False, True]
    assert zero.momentum == 0.0


def test_copy_made_while_disabled_can_be_enabled():
    layer = nn.BatchNorm1d(3)
    disable_running_stats(layer)
    other = copy.deepcopy(layer)
    enable_running_stats(layer)
    enable_running_stats(other)
    other(torch.randn(8, 3))
    assert layer.num_batches_tracked == 0
    assert other.num_batches_tracked == 1
