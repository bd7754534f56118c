"""Contract C17 and C18: overflows under a loss scaler, and gradients that are not finite without one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checks import build_with_memory
from steppe import SAM, variants
from support import BASES, DRIVES, batch, bits, every_drive, net, train


@pytest.mark.parametrize("overflow", [None, 0, 1])
def test_c17_loss_scaler_in_the_explicit_loop_equals_training_without_scaler(overflow):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer = SAM(BASES["momentum"](model.parameters()), rho=0.1, model=model)
    unscaled = SAM(BASES["momentum"](twin.parameters()), rho=0.1, model=twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        before = bits(model.parameters())
        x, y = batch(step)
        for sam_pass in optimizer.passes():
            with sam_pass:
                loss = F.cross_entropy(model(x), y)
                if step == 1 and overflow == int(sam_pass.is_perturbed):
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 1 and overflow is not None:
            assert bits(model.parameters()) == before
            assert scaler.get_scale() == 2.0**9
    for step in range(3):
        if overflow is None or step != 1:
            x, y = batch(step)
            for sam_pass in unscaled.passes():
                with sam_pass:
                    F.cross_entropy(twin(x), y).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            unscaled.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("enabled", [True, False])
def test_c17_scaler_step_with_a_closure_raises_if_the_scaler_is_enabled(enabled):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps step()
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)

    def closure():
        optimizer.zero_grad()
        loss = scaler.scale(w.square().sum())
        loss.backward()
        return loss

    closure()
    if not enabled:
        scaler.step(optimizer, closure)
        assert w.tolist() != [1.0, 2.0]
        return
    with pytest.raises(RuntimeError, match="multiplied by its scale"):
        scaler.step(optimizer, closure)
    assert w.tolist() == [1.0, 2.0]


@every_drive
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, "both"])
@pytest.mark.parametrize("base", BASES)
def test_c18_non_finite_gradient_skips_the_step(base, which, bad, drive):
    model = net(dropout=0.0)
    optimizer = SAM(BASES[base](model.parameters()), rho=0.1, model=model)
    train(model, optimizer, DRIVES[drive], 2)
    weights, state = bits(model.parameters()), copy.deepcopy(optimizer.state_dict())
    x, y = batch(5)
    calls = []

    def loss():
        calls.append(1)
        factor = bad if which in (len(calls) - 1, "both") else 1.0
        return F.cross_entropy(model(x), y) * factor

    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        DRIVES[drive](optimizer, loss)
    assert bits(model.parameters()) == weights
    assert str(optimizer.state_dict()) == str(state)
    assert optimizer.skipped_steps == 1
    train(model, optimizer, DRIVES[drive], 1)
    assert optimizer.skipped_steps == 1
    assert bits(model.parameters()) != weights


@every_drive
def test_c18_non_finite_gradient_does_not_enter_rule_memory(drive):
    model = net(dropout=0.0)
    optimizer = build_with_memory("sgd", model)  # a rule with a memory, at every second step
    x, y = batch()
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(model(x), y) * float("nan"))
    train(model, optimizer, DRIVES[drive], 3)
    assert optimizer.skipped_steps == 1
    memory = [value for name, value in optimizer.state_dict()["state"][0].items() if name.startswith("sam.")]
    assert memory
    assert all(value.isfinite().all() for value in memory)


def test_c18_non_finite_first_pass_skips_the_step_after_a_finite_second_pass():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss = (w * float("inf")).sum() if not sam_pass.is_perturbed else w.nan_to_num(0.0).sum()
            loss.backward()
    assert not torch.isfinite(w.grad).all(), "a scaler reads .grad, so .grad must show the first pass"
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    assert w.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("decoupled", [None, False, True])
def test_c18_empty_parameter_does_not_hide_a_gradient_that_is_not_finite(decoupled):
    w, empty = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.empty(0))
    base = torch.optim.SGD([w, empty], lr=0.1)
    optimizer = SAM(base, rho=0.1) if decoupled is None else variants.wsam(base, rho=0.1, decoupled=decoupled)
    for bad in (0, 1):
        for number, sam_pass in enumerate(optimizer.passes()):
            with sam_pass:
                (w.sum() * (float("inf") if number == bad else 1.0) + empty.sum()).backward()
        with pytest.warns(RuntimeWarning, match="skipped"):
            optimizer.step()
    assert w.tolist() == [1.0, 2.0]
