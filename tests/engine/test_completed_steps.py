"""Which steps are averaged: completed ones, and never the weights in the middle of one."""

import warnings

import pytest
import torch
from torch import nn

import steppe
from averaged_training import OF_AVERAGES, SOURCE, interrupted, sgd
from steppe.averaging import EMA, SWA
from support import (
    DRIVES,
    bits,
    by_passes,
    parameter,
)

# Steps that are none.


@pytest.mark.parametrize("drive", DRIVES)
def test_step_that_sam_skips_is_not_averaged(drive):
    w = parameter(1.0, 2.0)
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    averaged = SWA(nn.ParameterList([w]), optimizer)
    DRIVES[drive](optimizer, lambda: w.square().sum())
    with pytest.warns(RuntimeWarning, match="not finite"):
        DRIVES[drive](optimizer, lambda: w.square().sum() * float("nan"))
    assert int(averaged.n_steps) == int(averaged.n_averaged) == 1
    DRIVES[drive](optimizer, lambda: w.square().sum())
    assert int(averaged.n_averaged) == 2


@pytest.mark.parametrize("kind", ["plain", "fused", "passes", "closure"])
def test_step_that_a_loss_scaler_skips_is_not_averaged(kind):
    w = parameter(1.0, 2.0)
    model = nn.ParameterList([w])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    base = torch.optim.SGD([w], lr=0.1, fused=kind == "fused")
    if kind in ("plain", "fused"):
        optimizer = base
    else:
        optimizer = steppe.SAM(base, rho=0.1, scaler=scaler if kind == "closure" else None)
    averaged = SWA(model, optimizer)
    for factor in (1.0, float("inf"), 1.0):
        if kind == "closure":
            by_closure_with = lambda: scaler.scale(w.square().sum() * factor)  # noqa: B023, E731

            def closure(loss=by_closure_with):
                optimizer.zero_grad()
                loss().backward()

            optimizer.step(closure)
        elif kind == "passes":
            for sam_pass in optimizer.passes():
                with sam_pass:
                    scaler.scale(w.square().sum() * factor).backward()
            scaler.step(optimizer)
        else:
            optimizer.zero_grad()
            scaler.scale(w.square().sum() * factor).backward()
            scaler.step(optimizer)
        scaler.update()
    assert int(averaged.n_averaged) == 2


def test_step_without_learning_rate_is_not_averaged():
    w = parameter(1.0)
    optimizer = torch.optim.SGD([w], lr=torch.tensor(0.0))
    averaged = SWA(nn.ParameterList([w]), optimizer)
    w.grad = torch.ones(1)
    optimizer.step()
    assert int(averaged.n_steps) == 0
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert int(averaged.n_steps) == 1


def test_plain_step_of_sam_is_averaged():
    w = parameter(1.0)
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=1.0), rho=0.1)
    averaged = SWA(nn.ParameterList([w]), optimizer)
    w.grad = torch.ones(1)
    with pytest.warns(UserWarning, match="plain step"):
        optimizer.step()
    assert averaged.module[0].item() == 0.0
    assert int(averaged.n_averaged) == 1


def test_step_that_is_captured_in_a_cuda_graph_raises_before_it_is_taken(monkeypatch):
    w = parameter(1.0)
    optimizer = torch.optim.SGD([w], lr=1.0)
    averaged = SWA(nn.ParameterList([w]), optimizer)
    w.grad = torch.ones(1)
    monkeypatch.setattr(steppe._engine.completed_steps, "is_capturing", lambda parameter: True)
    with pytest.raises(RuntimeError, match="captured in a CUDA graph, whose replays call no hooks"):
        optimizer.step()
    assert w.item() == 1.0
    assert int(averaged.n_steps) == 0


# Interrupts, and calls in the middle of a step.


# an interrupt in a loop over passes() that Python is closing is printed, not raised
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("drive", DRIVES)
def test_interrupt_at_any_line_leaves_an_average_of_completed_steps(drive):
    x = torch.linspace(-1, 1, 12).reshape(4, 3) ** 3

    def problem():
        torch.manual_seed(0)
        nn.modules.module._global_forward_pre_hooks.clear()
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
        optimizer = steppe.SAM(sgd(model), rho=0.5, model=model)
        averaged = EMA(model, optimizer, 0.5, warmup=False)
        step = lambda: DRIVES[drive](optimizer, lambda: (model(x) - x[:, :2]).square().mean())  # noqa: E731
        step()
        return model, averaged, step

    model, averaged, step = problem()
    before, w_before = bits(averaged.module.parameters()), bits(model.parameters())
    lines = {source: interrupted(problem()[2], None, source) for source in (SOURCE, OF_AVERAGES)}
    step()
    after, w_after = bits(averaged.module.parameters()), bits(model.parameters())
    assert before != after
    tried = [(OF_AVERAGES, at) for at in range(lines[OF_AVERAGES])]
    tried += [(SOURCE, at) for at in range(0, lines[SOURCE], 23)]
    for source, at in tried:
        model, averaged, step = problem()
        interrupted(step, at, source)
        found = bits(averaged.module.parameters())
        assert found in (before, after), at
        if found == after:
            assert bits(model.parameters()) == w_after
        elif bits(model.parameters()) == w_before:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "passes.. was called again before step")
                step()
            assert bits(averaged.module.parameters()) == after, at


@pytest.mark.parametrize("stage", ["pass", "between", "classic"])
def test_average_in_the_middle_of_a_step_raises(stage):
    w = parameter(3.0, 4.0)
    model = nn.ParameterList([w])
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    averaged = SWA(model, optimizer)
    calls = {
        "update_parameters": averaged.update_parameters,
        "applied": lambda: averaged.applied().__enter__(),
        "SWA": lambda: SWA(model, optimizer),
    }

    def check():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"^{name}.* was called .* the weights may be w \+ e"):
                call()

    if stage == "classic":
        w.square().sum().backward()
        optimizer.first_step(zero_grad=True)
        check()
        w.square().sum().backward()
        optimizer.second_step()
    else:
        for sam_pass in optimizer.passes():
            with sam_pass:
                w.square().sum().backward()
                if stage == "pass":
                    check()
            if stage == "between":
                check()
        optimizer.step()
    assert bits(averaged.module.parameters()) == bits([w])
    averaged.update_parameters()
    assert int(averaged.n_averaged) == 2


def test_base_of_a_sam_is_refused_before_and_after_it_was_wrapped():
    w = parameter(1.0)
    model, base = nn.ParameterList([w]), torch.optim.SGD([w], lr=0.1)
    averaged = SWA(model, base)
    optimizer = steppe.SAM(base, rho=0.1)
    with pytest.raises(TypeError, match="give the average the SAM itself"):
        SWA(model, base)
    with pytest.raises(TypeError, match="give the average the SAM itself"):
        by_passes(optimizer, lambda: w.square().sum())
    assert w.item() == 1.0
    del averaged
    by_passes(optimizer, lambda: w.square().sum())
    assert w.item() != 1.0


def test_optimizer_whose_step_runs_no_hooks_is_refused():
    class Bare(torch.optim.Optimizer):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="whose step.. runs hooks, got Bare"):
        SWA(nn.Linear(2, 1), Bare())
