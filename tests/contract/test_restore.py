"""Contract C6 and C7: the weights are restored bit for bit, also after an exception."""

import copy

import pytest
import torch
import torch.nn.functional as F

import steppe
from checks import restores_exactly
from steppe import SAM
from steppe._engine.gradients import Gradients
from support import BASES, DRIVES, batch, bits, by_passes, every_drive, model_bits, net, parameter, train


@every_drive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_c6_weights_are_restored_bit_for_bit_in_the_same_storage(drive, dtype):
    restores_exactly(drive, dtype)


def test_c6_negative_zero_subnormal_and_largest_weights_are_restored():
    w = parameter(-0.0, 1e-45, -1e-40, 3.4e38)
    optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=1e3)
    before = bits([w])
    for sam_pass in optimizer.passes():
        with sam_pass:
            (w * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
            assert (bits([w]) != before) == sam_pass.is_perturbed
    optimizer.step()
    assert bits([w]) == before


@every_drive
def test_c7_parameters_with_a_gradient_in_one_pass_only_are_restored(drive):
    a, b, c = parameter(1.0), parameter(2.0), parameter(3.0)
    optimizer = SAM(torch.optim.SGD([a, b, c], lr=0.1, weight_decay=0.1), rho=0.5)
    calls = []

    def loss():
        calls.append((a.item(), b.item(), c.item()))
        return (a * b).sum() if len(calls) == 1 else (a * c).sum()

    DRIVES[drive](optimizer, loss)
    perturbed = calls[1]
    assert perturbed[0] != 1.0
    assert perturbed[1] != 2.0
    assert perturbed[2] == 3.0
    assert b.item() == 2.0, "without a gradient in the second pass, b is restored and not stepped"
    assert a.item() == pytest.approx(1.0 - 0.1 * (3.0 + 0.1 * 1.0))
    assert c.item() == pytest.approx(3.0 - 0.1 * (perturbed[0] + 0.1 * 3.0))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_c7_exception_in_second_pass_restores_weights(drive, error):
    model = net()
    optimizer = SAM(BASES["momentum"](model.parameters()), rho=0.5, model=model)
    train(model, optimizer, DRIVES[drive], 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    before = bits(model.parameters())
    x, y = batch(2)
    calls = []

    def loss():
        calls.append(1)
        value = F.cross_entropy(model(x), y)
        if len(calls) == 2:
            assert bits(model.parameters()) != before
            raise error("in the second pass")
        return value

    rng = torch.get_rng_state()
    with pytest.raises(error) as raised:
        DRIVES[drive](optimizer, loss)
    assert bits(model.parameters()) == before
    assert raised.value is not None  # keeps the traceback, and with it the frames, alive as an except block does
    torch.set_rng_state(rng)
    model.load_state_dict(twin.state_dict())  # undo the running statistics of the first pass, the only change left
    train(model, optimizer, DRIVES[drive], 1, start=2)
    torch.set_rng_state(rng)
    train(twin, twin_optimizer, DRIVES[drive], 1, start=2)
    assert model_bits(model) == model_bits(twin)


@pytest.mark.parametrize("fail_in", [1, 2])
@pytest.mark.parametrize("calls_backward", [False, True])
def test_c7_step_after_a_backward_that_failed_half_way_is_as_if_there_had_been_none(calls_backward, fail_in):
    """The guard that many loops have: a batch that does not fit into the memory is left out."""
    model, twin = net(dropout=0.0), net(dropout=0.0)
    backwards = []

    def fail(gradient):
        backwards.append(1)
        if len(backwards) == fail_in:
            raise torch.OutOfMemoryError("in the middle of a backward")

    def step(model, optimizer, number):
        x, y = batch(number)

        def closure():
            loss = F.cross_entropy(model(x), y)
            if calls_backward:
                loss.backward()
            return loss

        optimizer.step(closure)

    optimizer, other = (SAM(BASES["momentum"](m.parameters()), rho=0.5, model=m) for m in (model, twin))
    next(iter(model.parameters())).register_hook(fail)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    with pytest.raises(torch.OutOfMemoryError):
        step(model, optimizer, 0)
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    for number in (1, 2):
        step(model, optimizer, number)
        step(twin, other, number)
    assert model_bits(model) == model_bits(twin)


def test_c7_closure_after_a_loop_over_the_passes_that_was_left_needs_no_zero_grad():
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    for sam_pass in optimizer.passes():
        with sam_pass:
            w.square().sum().backward()
        break
    optimizer.step(lambda: w.square().sum())
    assert w.item() == pytest.approx(3.0 - 0.1 * 2 * 3.5)


def test_c7_closure_after_steps_without_sam_needs_no_zero_grad():
    w = parameter(3.0)
    base = torch.optim.SGD([w], lr=0.1)
    w.sum().backward()
    base.step()
    optimizer = SAM(base, rho=0.5)
    optimizer.step(lambda: w.sum())
    w.grad = torch.ones(1)
    base.step()
    optimizer.step(lambda: w.sum())
    assert w.item() == pytest.approx(3.0 - 4 * 0.1)


def test_c7_interrupt_between_perturbation_and_second_pass_restores_weights(monkeypatch):
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    sam_passes = optimizer.passes()
    with next(sam_passes):
        w.square().sum().backward()
    second = next(sam_passes)
    monkeypatch.setattr(Gradients, "clear", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), second:
        pass
    assert w.item() == 3.0
    assert second.is_perturbed


def test_c7_exception_in_the_rule_restores_weights():
    def rule(point):
        return steppe.ScaledDirection([point.gradients[0], torch.ones(7)], 1.0)  # the second has a wrong shape

    a, b = parameter(1.0), parameter(2.0)
    optimizer = SAM(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1), rho=0.5, perturbation=rule)
    with pytest.raises(RuntimeError):
        by_passes(optimizer, lambda: (a * b).sum())
    assert (a.item(), b.item()) == (1.0, 2.0)


def test_c7_restore_aborts_a_pending_first_step():
    model = net()
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=0.5, model=model)
    before = bits(model.parameters())
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    after_pass = model_bits(model)
    optimizer.first_step(zero_grad=True)
    assert bits(model.parameters()) != before
    optimizer.restore()
    assert model_bits(model) == after_pass
    train(model, optimizer, DRIVES["classic"], 1)


def test_c7_closure_that_fails_leaves_no_hooks_on_the_parameters():
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)

    def closure():
        w.square().sum().backward()
        raise MemoryError

    for _ in range(3):
        w.grad = torch.ones(1)  # accumulated before the closure, and observed through it
        with pytest.raises(MemoryError):
            optimizer.step(closure)
    assert not w._backward_hooks
