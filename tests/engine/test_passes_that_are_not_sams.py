"""Contract C33: a pass that was not SAM's is noticed; and closures that only return the loss."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from steppe import SAM
from support import BASES, batch, bits, by_closure, by_passes, net, parameter


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


X, Y = torch.linspace(-1, 1, 32).reshape(8, 4), torch.arange(8) % 3


# Gradients that are lost, and steps past SAM.


def test_c33_passes_called_again_before_step_warn_once_that_a_gradient_is_lost():
    model = linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)

    def passes(**options):
        for sam_pass in optimizer.passes(**options):
            with sam_pass:
                F.cross_entropy(model(X), Y).backward()

    passes()
    optimizer.zero_grad()  # discards it
    passes()
    passes(accumulate=True)
    optimizer.step()
    passes()
    with pytest.warns(UserWarning, match=r"called again before step\(\)"):
        passes()
    passes()


def test_c33_passes_after_an_overflow_do_not_warn_of_a_lost_gradient():
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    for factor in (float("inf"), 1.0):
        for sam_pass in optimizer.passes():
            with sam_pass:
                (w * factor).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("where", ["after passes", "in a pass", "after first_step"])
def test_c33_step_of_the_base_in_the_middle_of_a_step_raises(where):
    w = parameter(3.0)
    base = torch.optim.SGD([w], lr=0.1)
    optimizer = SAM(base, rho=0.1)
    error = pytest.raises(RuntimeError, match=r"the base optimizer's step\(\) was called")
    if where == "after first_step":
        w.square().sum().backward()
        optimizer.first_step()
        with error:
            base.step()
        optimizer.restore()
    else:
        for sam_pass in optimizer.passes():
            with sam_pass:
                w.square().sum().backward()
                if where == "in a pass":
                    with error:
                        base.step()
        if where == "after passes":
            with error:
                base.step()
        optimizer.step()
    w.grad = torch.ones(1)
    base.step()  # between two steps it is the user's own


# Passes without a gradient.


def test_c33_passes_without_any_backward_warn_once():
    model = linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    for step in range(3):
        for sam_pass in optimizer.passes():
            with sam_pass:
                F.cross_entropy(model(X), Y)
        if step == 0:
            with pytest.warns(UserWarning, match="no pass of this step made a gradient"):
                optimizer.step()
        else:
            optimizer.step()


def test_c33_pass_without_a_gradient_beside_one_with_warns():
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss = w.square().sum()
            if sam_pass.is_first:
                loss.backward()
    with pytest.warns(UserWarning, match="pass 2 of a step made no gradient"):
        optimizer.step()


@pytest.mark.parametrize("when", ["between the passes", "after the passes"])
def test_c33_backward_outside_of_the_pass_raises(when):
    model = linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    before = bits(model.parameters())

    def loop():
        for sam_pass in optimizer.passes():
            with sam_pass:
                loss = F.cross_entropy(model(X), Y)
            if when == "between the passes":
                loss.backward()
        loss.backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match="the backward ran outside of `with sam_pass:`"):
        loop()
    assert bits(model.parameters()) == before


def test_c33_closure_may_leave_out_a_batch():
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    by_closure(optimizer, lambda: w.square().sum())
    assert optimizer.step(lambda: optimizer.zero_grad()) is None
    by_closure(optimizer, lambda: w.square().sum())


# Graphs and inputs that are not those of the pass.


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("outside", ["output", "loss", "weights"])
def test_c33_graph_from_before_the_pass_raises(outside, backward):
    w = parameter(1.0, 2.0, 3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    output = X @ w
    loss = output.square().mean()
    cached = 2 * w

    def closure():
        value = {"output": lambda: output.mean(), "loss": lambda: loss, "weights": lambda: (X @ cached).mean()}[
            outside
        ]()
        if backward:
            optimizer.zero_grad()
            value.backward(retain_graph=True)
        return value

    before = bits([w])
    with pytest.raises(RuntimeError, match=r"graph"):
        optimizer.step(closure)
    assert bits([w]) == before


def test_c33_closure_that_changes_its_input_in_place_warns():
    model = linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    x, total = X.clone(), torch.zeros(())

    def augmenting():
        x.mul_(0.5)
        return F.cross_entropy(model(x), Y)

    def counting():
        loss = F.cross_entropy(model(X), Y)
        if optimizer.current_pass.is_first:
            total.add_(loss.detach())
        return loss

    other = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    optimizer.step(counting)
    with pytest.warns(UserWarning, match=r"changes a tensor in place \(x\)"):
        other.step(augmenting)


def test_object_whose_tensor_the_closure_changes_in_place_is_named():
    class Loop:
        def __init__(self):
            self.seen = torch.zeros(())

        def closure(self):
            self.seen += len(X)
            return F.cross_entropy(model(X), Y)

    model = linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    with pytest.warns(UserWarning, match=r"changes a tensor in place \(self.seen\)"):
        optimizer.step(Loop().closure)


# Closures that only return the loss.


@pytest.mark.parametrize(
    "form", [lambda loss: loss, lambda loss: (loss, 1), lambda loss: [loss], lambda v: {"loss": v}]
)
@pytest.mark.parametrize("base", BASES)
def test_closure_that_returns_the_loss_equals_one_that_calls_backward(form, base):
    model, twin = net(), net()
    optimizer, other = (SAM(BASES[base](m.parameters()), rho=0.1, model=m) for m in (model, twin))
    for step in range(3):
        x, y = batch(step)
        torch.manual_seed(step)
        value = optimizer.step(lambda x=x, y=y: form(F.cross_entropy(model(x), y)))
        torch.manual_seed(step)
        want = by_closure(other, lambda x=x, y=y: F.cross_entropy(twin(x), y))
        assert type(value) is type(form(want))
        if isinstance(value, torch.Tensor):
            assert value.equal(want)
            assert not value.requires_grad, "it is detached"
        nn.utils.clip_grad_norm_(model.parameters(), float("inf"))  # reads the norm of the update gradient
    assert bits(model.state_dict().values()) == bits(twin.state_dict().values())


def test_closure_that_returns_the_loss_is_scaled_by_the_scaler():
    model, twin = linear(), linear()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model, scaler=scaler)
    other = SAM(torch.optim.SGD(twin.parameters(), lr=0.1), rho=0.1, model=twin)
    scales = []
    model.bias.register_hook(lambda g: scales.append(g.abs().max().item()))
    for _ in range(2):
        loss = optimizer.step(lambda: F.cross_entropy(model(X), Y))
        scaler.update()
        torch.testing.assert_close(loss, by_closure(other, lambda: F.cross_entropy(twin(X), Y)).detach())
    assert min(scales) > 1.0, "the backward is that of the scaled loss"
    torch.testing.assert_close(model.weight, twin.weight)


def test_closure_that_returns_the_loss_refuses_gradients_accumulated_before():
    model = linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match=r"accumulated before step\(closure\)"):
        optimizer.step(lambda: F.cross_entropy(model(X), Y))
    optimizer.zero_grad()
    optimizer.step(lambda: F.cross_entropy(model(X), Y))


def test_closure_that_returns_no_loss_raises():
    model = linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    with pytest.raises(RuntimeError, match=r"of shape \(8, 3\), which is no loss"):
        optimizer.step(lambda: model(X))
    optimizer.step(lambda: F.cross_entropy(model(X), Y))


# Gradients that were set to zero in place are not accumulated gradients.


@pytest.mark.parametrize("where", ["optimizer after", "model after", "model before", "model inside", "by hand inside"])
def test_gradients_zeroed_in_place_are_cleared_ones(where):
    model, twin = linear(), linear()
    optimizer, other = (SAM(BASES["momentum"](m.parameters()), rho=0.1, model=m) for m in (model, twin))

    def closure():
        if where == "model inside":
            model.zero_grad(set_to_none=False)
        if where == "by hand inside":
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.detach_().zero_()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    for _ in range(3):
        if where == "model before":
            model.zero_grad(set_to_none=False)
        optimizer.step(closure)
        by_closure(other, lambda: F.cross_entropy(twin(X), Y))
        if where == "optimizer after":
            optimizer.zero_grad(set_to_none=False)
        elif where == "model after":
            model.zero_grad(set_to_none=False)
        elif where != "model before":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert bits(model.parameters()) == bits(twin.parameters())


def test_ordinary_loops_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = linear()
        optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
        for _ in range(3):
            by_passes(optimizer, lambda: F.cross_entropy(model(X), Y))
            optimizer.step(lambda: F.cross_entropy(model(X), Y))
