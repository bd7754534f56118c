"""Contract C33: a pass that was not SAM's is noticed; and closures that only return the loss."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from steppe import SAM
from support import BASES, batch, bits, by_closure, by_passes, model_bits, net, parameter


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


@pytest.mark.parametrize("retain_graph", [True, False])
@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_error_of_torch_about_a_graph_from_before_the_pass_says_what_to_do(drive, retain_graph):
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(3, 3))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    before = model_bits(model)
    loss = F.cross_entropy(model(X), Y)

    def backward():
        loss.backward(retain_graph=retain_graph)

    def by_loop():
        for sam_pass in optimizer.passes():
            with sam_pass:
                backward()

    with pytest.raises(RuntimeError, match=r"inplace operation|a second time") as raised:
        optimizer.step(backward) if drive == "closure" else by_loop()
    assert any("Run the whole forward inside each pass" in note for note in raised.value.__notes__)
    assert model_bits(model) == before


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


@pytest.mark.parametrize("decorate", [torch.enable_grad(), lambda f: lambda: f()])
def test_input_that_a_decorated_closure_changes_in_place_is_named(decorate):
    model, x = linear(), X.clone()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    with pytest.warns(UserWarning, match=r"changes a tensor in place \(x\)"):
        optimizer.step(decorate(lambda: F.cross_entropy(model(x.mul_(0.5)), Y)))


def augmented(model, held):
    return model(X + held.normal_())


def copied(model, held):
    held.copy_(X)
    return model(held)


def masked(model, held):
    held.copy_(X).masked_fill_(X > 0, float("nan"))
    return model(held.nan_to_num())


@pytest.mark.parametrize("write", [augmented, copied, masked])
def test_writes_in_place_that_each_pass_repeats_exactly_do_not_warn(write):
    model = linear()
    held = torch.full_like(X, float("nan"))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.step(lambda: F.cross_entropy(write(model, held), Y))


def test_noise_written_in_place_that_each_pass_draws_anew_warns():
    model, held = linear(), torch.empty_like(X)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model, replay_rng=False)
    with pytest.warns(UserWarning, match=r"changes a tensor in place \(held\)"):
        optimizer.step(lambda: F.cross_entropy(augmented(model, held), Y))


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


def attacked(model, clear):
    delta = torch.zeros_like(X, requires_grad=True)
    F.cross_entropy(model(X + delta), Y).backward()
    clear()
    return F.cross_entropy(model(X + 0.5 * delta.grad.sign()), Y)


def test_loss_whose_backward_another_one_hides_warns():
    model = linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    with pytest.warns(UserWarning, match=r"the closure ran a backward, and returned a loss of which it was not"):
        optimizer.step(lambda: attacked(model, lambda: None))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_loss_after_another_backward_and_zero_grad_is_trained(set_to_none):
    model, twin = linear(), linear()
    ours, by_hand = (SAM(torch.optim.SGD(m.parameters(), lr=0.1), rho=0.1, model=m) for m in (model, twin))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.step(lambda: attacked(model, partial(model.zero_grad, set_to_none=set_to_none)))
    for sam_pass in by_hand.passes():
        with sam_pass:
            attacked(twin, twin.zero_grad).backward()
    by_hand.step()
    assert model_bits(model) == model_bits(twin)


def retained(loss):
    loss.backward(retain_graph=True)
    return loss


def multiplied(loss):
    retained(loss)
    return 3 * loss


def in_parts(loss):
    (0.5 * loss).backward(retain_graph=True)
    (0.5 * loss).backward()
    return loss


def clipped(model, loss):
    retained(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    return loss


@pytest.mark.parametrize("differentiate", [retained, multiplied, in_parts, clipped])
def test_closure_that_ran_the_backward_of_its_loss_does_not_warn(differentiate):
    model = linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    run = partial(differentiate, model) if differentiate is clipped else differentiate

    def closure():
        optimizer.zero_grad()
        return run(F.cross_entropy(model(X), Y))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)


# Parameters that are unfrozen inside a pass.


DISPLACED_FIRST = ["rwp", "arwp", "msam", "stale_sam", "sampa", "bsam"]


def method(name, model):
    if name == "bsam":
        return steppe.variants.bsam(model.parameters(), n_data=8, model=model)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return getattr(steppe.variants, name)(base, rho=0.1, model=model)


@pytest.mark.parametrize("drive", [by_closure, by_passes])
@pytest.mark.parametrize("name", DISPLACED_FIRST)
def test_parameters_that_are_unfrozen_only_inside_a_pass_before_w_warn_once(name, drive):
    """As the discriminator of a GAN, which is frozen for the step of the generator."""
    model = linear()
    optimizer = method(name, model)

    def loss():
        model.requires_grad_(True)
        return F.cross_entropy(model(X), Y)

    drive(optimizer, loss)
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"2 parameters were frozen .* Unfreeze them before step\(\)"):
        drive(optimizer, loss)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drive(optimizer, loss)


@pytest.mark.parametrize("name", [*DISPLACED_FIRST, "sam"])
def test_parameters_that_stay_frozen_or_are_unfrozen_before_the_step_do_not_warn(name):
    model = linear()
    optimizer = method(name, model)

    def loss():
        if name == "sam":  # its first pass is at w anyway
            model.requires_grad_(True)
        return F.cross_entropy(model(X), Y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            model.weight.requires_grad_(True)
            model.bias.requires_grad_(step % 2 == 0)
            if name == "sam":
                model.requires_grad_(False)
            optimizer.step(loss)


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


def test_backward_of_a_closure_that_makes_gradients_of_zeros_is_not_run_again():
    """Such as a hinge, or a triplet loss, of a batch without any error."""
    model, twin = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizer, other = (SAM(torch.optim.SGD(m.parameters(), lr=0.1), rho=0.1, model=m) for m in (model, twin))
    x = torch.randn(8, 4, dtype=torch.float64)
    for margin in (5.0, -100.0, -100.0, 5.0):

        def loss(m, margin=margin):
            return (m(x).square() + margin).relu().mean()

        def closure(loss=loss):
            value = loss(model)
            value.backward()
            return value

        model.zero_grad(set_to_none=False)
        optimizer.step(closure)
        by_passes(other, lambda loss=loss: loss(twin))
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert bits(model.parameters()) == bits(twin.parameters())


def test_closure_that_differentiates_and_returns_the_loss_needs_a_backward_after_gradients_of_zeros():
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.0)

    def closure():
        torch.autograd.grad(w.square().sum(), w)
        return w.square().sum()

    w.grad = torch.zeros(2)
    optimizer.step(closure)
    torch.testing.assert_close(w.detach(), torch.tensor([2.4, 3.2]))


def test_ordinary_loops_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = linear()
        optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
        for _ in range(3):
            by_passes(optimizer, lambda: F.cross_entropy(model(X), Y))
            optimizer.step(lambda: F.cross_entropy(model(X), Y))


# The classic API.


CLEARED = {
    "zero_grad=True": lambda optimizer, w: None,
    "zero_grad()": lambda optimizer, w: optimizer.zero_grad(),
    "zero_grad() in place": lambda optimizer, w: optimizer.zero_grad(set_to_none=False),
    "zero_grad() of the base": lambda optimizer, w: optimizer.base.zero_grad(set_to_none=False),
    "None": lambda optimizer, w: setattr(w, "grad", None),
    "new zeros": lambda optimizer, w: setattr(w, "grad", torch.zeros(2)),
    "zero_()": lambda optimizer, w: w.grad.zero_(),
    "zero_() of the data": lambda optimizer, w: w.grad.data.zero_(),
}


@pytest.mark.parametrize("how", [*CLEARED, "not at all"])
def test_c33_gradients_that_are_not_cleared_between_the_classic_passes_warn_once(how):
    w, unused = parameter(3.0, 4.0), parameter(1.0)
    optimizer = SAM(torch.optim.SGD([w, unused], lr=0.1), rho=0.5)
    for step in range(2):
        optimizer.zero_grad()
        w.square().sum().backward()
        optimizer.first_step(zero_grad=how == "zero_grad=True")
        CLEARED.get(how, lambda *_: None)(optimizer, w)
        for _ in range(2):  # micro-batches
            w.square().sum().div(2).backward()
        if how == "not at all" and step == 0:
            with pytest.warns(UserWarning, match=r"the update is g \+ g_s.*first_step\(zero_grad=True\)"):
                optimizer.second_step()
        else:
            optimizer.second_step()
    assert not w._backward_hooks


def test_c33_classic_step_that_is_aborted_leaves_no_hooks():
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    w.square().sum().backward()
    optimizer.first_step()
    optimizer.restore()
    assert not w._backward_hooks


# Arguments that are no closure, and loops that are none.


def test_c33_step_with_a_loss_in_the_place_of_a_closure_raises():
    for make in (SAM, lambda base, rho: steppe.compat.SAM(base.param_groups, torch.optim.SGD, rho=rho, lr=0.1)):
        w = parameter(3.0)
        optimizer = make(torch.optim.SGD([w], lr=0.1), rho=0.5)
        loss = w.square().sum()
        loss.backward()
        with pytest.raises(TypeError, match=r"step\(\) got a Tensor, and needs a closure.*step\(lambda: "):
            optimizer.step(loss)
        assert w.item() == 3.0


@pytest.mark.parametrize("name", ["sam", "lookbehind_sam"])
def test_c33_passes_in_a_with_statement_raise(name):
    optimizer = getattr(steppe.variants, name)(torch.optim.SGD([parameter(3.0)], lr=0.1), rho=0.5)
    with pytest.raises(TypeError, match=r"for sam_pass in optimizer\.passes\(\).*with sam_pass"), optimizer.passes():
        pass


def test_c33_zip_of_two_loops_needs_strict():
    v, w = parameter(3.0), parameter(4.0)
    a, b = (SAM(torch.optim.SGD([p], lr=0.1), rho=0.5) for p in (v, w))
    for strict in (False, True):
        for of_v, of_w in zip(a.passes(), b.passes(), strict=strict):
            with of_v, of_w:
                (v.square() + w.square()).sum().backward()
        a.step()
        if strict:
            b.step()
        else:
            with pytest.raises(RuntimeError, match=r"strict=True.*SAM\(\[base_a, base_b\]\)"):
                b.step()
    assert w.item() == pytest.approx(4.0 - 0.1 * 2 * 4.5)


# A list of losses.


@pytest.mark.parametrize("form", [list, tuple])
def test_c33_closure_that_returns_several_losses_raises(form):
    v, w = parameter(3.0), parameter(4.0)
    optimizer = SAM(torch.optim.SGD([v, w], lr=0.1), rho=0.5)
    with pytest.raises(RuntimeError, match="returned 2 losses.*return their sum"):
        optimizer.step(lambda: form([v.square().sum(), w.square().sum()]))
    assert (v.item(), w.item()) == (3.0, 4.0)


def test_c33_closure_may_return_more_than_the_loss():
    w = parameter(3.0)

    def with_terms():
        a, b = w.square().sum(), w.abs().sum()
        return a + b, a, b  # for a log

    def after_backward():
        w.grad = None
        losses = [w.square().sum(), w.abs().sum()]
        sum(losses).backward()
        return losses

    def with_logits():
        logits = 2 * w
        return logits.square().sum(), logits, logits.detach().sum(), "text"

    for closure in (with_terms, after_backward, with_logits, lambda: {"loss": w.sum(), "other": w.abs().sum()}):
        before = w.item()
        SAM(torch.optim.SGD([w], lr=0.01), rho=0.5).step(closure)
        assert w.item() != before


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_parameters_of_the_model_that_were_replaced_are_named_where_nothing_is_trained(device):
    model = torch.nn.Linear(3, 2, device=device)
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    model.load_state_dict(torch.nn.Linear(3, 2).state_dict(), assign=True)
    with pytest.warns(UserWarning, match=r"no longer those of the optimizer.*load_state_dict\(assign=True\)"):
        optimizer.step(lambda: model(torch.ones(2, 3)).sum())
