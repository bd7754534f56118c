"""Functional SAM: the derivative of the loss at w, the Jacobian at w + e, against the formula; and its errors."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steppe
from steppe import SAM, closures
from support import BASES, batch, bits, by_closure, by_passes, each_in_turn, model_bits, net, plain

RHO = 0.3
DRIVES = [by_closure, by_passes]
x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(2))


class Network(nn.Module):
    """Logits of three classes, as a function of 24 weights in one vector."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(24, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return f(self.w, x)


def f(w: Tensor, x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ w[:12].reshape(4, 3)) ** 2
    return hidden @ w[12:21].reshape(3, 3) + w[21:].sin()


def J(w: Tensor, x: Tensor) -> Tensor:
    """df/dw, of shape (samples, classes, weights)."""
    return torch.autograd.functional.jacobian(lambda w: f(w, x), w)


def dL_df(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(softmax(f) - onehot(y)) / n, that of the mean cross-entropy."""
    return (f(w, x).softmax(1) - F.one_hot(y, 3)) / len(x)


def g(at: Tensor, derivative_at: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
    return torch.einsum("ncw,nc->w", J(at, x), dL_df(derivative_at, x, y))


def perturbed(w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
    gradient = g(w, w, x, y)
    return w + RHO * gradient / gradient.norm()


def reference(base, update, steps: int = 20) -> Tensor:
    """w after some steps of the base with update(w) for a gradient."""
    w = Network().w
    optimizer = base([w])
    for _ in range(steps):
        w.grad = update(w.detach())
        optimizer.step()
    return w.detach()


def built(base=BASES["sgd"], **options):
    model = Network()
    optimizer = SAM(base(model.parameters()), RHO, model=model, **options)
    return model, optimizer, closures.functional(optimizer, F.cross_entropy)


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@functools.cache
def of_functional_sam(base: str) -> Tensor:
    return reference(BASES[base], lambda w: g(perturbed(w), w))


@functools.cache
def of_sam(base: str) -> Tensor:
    return reference(BASES[base], lambda w: g(perturbed(w), perturbed(w)))


@pytest.mark.parametrize(("base", "drive"), each_in_turn(BASES, DRIVES))
def test_update_is_the_derivative_at_w_times_the_jacobian_at_the_perturbed_weights(base, drive):
    model, optimizer, criterion = built(BASES[base])
    for _ in range(20):
        drive(optimizer, lambda: criterion(model(x), y))
    want, sam = of_functional_sam(base), of_sam(base)
    assert_close(model.w.detach(), want)
    assert (want - sam).norm() > 1e-3 * sam.norm()


def test_network_that_is_linear_in_its_weights_is_trained_by_the_base():
    def trained(make, drive):
        model = nn.Linear(4, 3, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(x[:3])
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1))
        criterion = F.cross_entropy if drive is plain else closures.functional(optimizer, F.cross_entropy)
        for _ in range(20):
            drive(optimizer, lambda: criterion(model(x), y))
        return model.weight.detach()

    torch.manual_seed(0)
    ours = trained(lambda base: SAM(base, RHO), by_closure)
    torch.manual_seed(0)
    assert_close(ours, trained(lambda base: base, plain))


@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base_to_the_bit(base):
    def trained(wrap, drive):
        model = net()
        optimizer = wrap(BASES[base](model.parameters()), model)
        loss = F.cross_entropy if drive is plain else closures.functional(optimizer, F.cross_entropy)
        torch.manual_seed(5)
        for t in range(3):
            inputs, targets = batch(t)
            drive(optimizer, lambda inputs=inputs, targets=targets: loss(model(inputs), targets))
        return model_bits(model), bits([torch.get_rng_state()])

    ours = trained(lambda base, model: SAM(base, 0.0, model=model), by_closure)
    assert ours == trained(lambda base, model: base, plain)


def test_buffers_and_generators_are_those_of_one_pass():
    model, twin = net(), net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, model=model)
    criterion = closures.functional(optimizer, F.cross_entropy)
    inputs, targets = batch()
    torch.manual_seed(5)
    optimizer.step(lambda: criterion(model(inputs), targets))
    after = torch.rand(3)
    torch.manual_seed(5)
    twin(inputs)
    assert torch.equal(after, torch.rand(3))
    assert bits(model.buffers()) == bits(twin.buffers())


def test_value_is_the_loss_at_the_weights_of_each_pass():
    model, optimizer, criterion = built()
    w, values = model.w.detach().clone(), []

    def closure():
        values.append(criterion(model(x), y))
        return values[-1]

    loss_at_w = optimizer.step(closure)
    want = [F.cross_entropy(f(at, x), y) for at in (w, perturbed(w))]
    assert_close(torch.stack(values).detach(), torch.stack(want))
    assert_close(loss_at_w, want[0])


def test_outside_of_a_pass_and_without_a_graph_it_is_the_loss():
    model, optimizer, criterion = built()
    want = F.cross_entropy(model(x), y)
    want.backward()
    gradient, model.w.grad = model.w.grad, None
    value = criterion(model(x), y)
    value.backward()
    assert torch.equal(value, want)
    assert torch.equal(model.w.grad, gradient)
    model.w.grad = None

    def closure():
        logits = model(x)
        with torch.no_grad():
            assert torch.equal(criterion(logits, y), F.cross_entropy(logits, y))  # a measurement within the closure
        return criterion(logits, y)

    optimizer.step(closure)
    assert_close(model.w.detach(), reference(BASES["sgd"], lambda w: g(perturbed(w), w), steps=1))


def test_arguments_reach_the_loss_and_outputs_may_have_logits():
    model, optimizer, criterion = built()
    outputs = lambda: types.SimpleNamespace(logits=model(x))  # noqa: E731
    optimizer.step(lambda: criterion(outputs(), y, label_smoothing=0.2))
    other, twin, smooth = built()
    smooth = closures.functional(twin, nn.CrossEntropyLoss(label_smoothing=0.2))
    twin.step(lambda: smooth(other(x), y))
    assert torch.equal(model.w, other.w)
    assert not torch.equal(model.w, reference(BASES["sgd"], lambda w: g(perturbed(w), w), steps=1))


# Several micro-batches, several ascent steps, other rules, and a loss scaler.


def test_micro_batches_inside_each_pass_are_the_whole_batch():
    model, optimizer, criterion = built()
    for _ in range(20):
        for sam_pass in optimizer.passes():
            with sam_pass:
                for begin, end in ((0, 4), (4, 9), (9, 12)):
                    share = (end - begin) / len(x)
                    (criterion(model(x[begin:end]), y[begin:end]) * share).backward()
        optimizer.step()
    assert_close(model.w.detach(), of_functional_sam("sgd"))


def test_each_micro_batch_can_have_its_own_perturbation():
    model, optimizer, criterion = built()
    for _ in range(20):
        closures.micro_batches(optimizer, lambda x, y: criterion(model(x), y), (x, y), m=5)

    def update(w):
        parts = [(x[i : i + 5], y[i : i + 5]) for i in (0, 5, 10)]
        return sum(g(perturbed(w, *part), w, *part) * len(part[0]) / len(x) for part in parts)

    assert_close(model.w.detach(), reference(BASES["sgd"], update))


def test_further_ascent_steps_use_the_whole_gradient():
    model, optimizer, criterion = built(perturbation=steppe.AscentSteps(steppe.L2(), 2))
    twin, sam, _ = built(perturbation=steppe.AscentSteps(steppe.L2(), 2))
    found = {}
    for name, network, opt, loss in (("ours", model, optimizer, criterion), ("sam", twin, sam, F.cross_entropy)):
        found[name] = []

        def closure(name=name, network=network, loss=loss):
            found[name].append(network.w.detach().clone())
            return loss(network(x), y)

        opt.step(closure)
    assert bits(found["ours"]) == bits(found["sam"])
    w, _, furthest = found["ours"]
    assert_close(model.w.detach(), w - 0.1 * g(furthest, w))


def test_combination_gets_it_for_the_perturbed_gradient():
    model, optimizer, criterion = built(combination=steppe.PenalizedNorm(alpha=0.3))
    for _ in range(20):
        optimizer.step(lambda: criterion(model(x), y))
    assert_close(model.w.detach(), reference(BASES["sgd"], lambda w: 0.7 * g(w, w) + 0.3 * g(perturbed(w), w)))


def test_steps_that_are_not_perturbed_are_those_of_the_base():
    model, optimizer, criterion = built(cadence=steppe.Periodic(2))
    counted = []
    for _ in range(4):
        optimizer.step(lambda: counted.append(1) or criterion(model(x), y))
    assert len(counted) == 6

    steps = iter(range(4))
    want = reference(BASES["sgd"], lambda w: g(w, w) if next(steps) % 2 else g(perturbed(w), w), steps=4)
    assert_close(model.w.detach(), want)


def test_small_derivatives_of_half_precision_logits_survive_with_a_loss_scaler():
    model = nn.Linear(4, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=1e6), RHO, model=model, scaler=scaler)
    criterion = closures.functional(optimizer, lambda logits: (logits.float() * 1e-9).sum())  # 1e-9 is 0 in float16
    before = model.weight.detach().clone()
    optimizer.step(lambda: criterion(model(x.float()).half()))
    want = before - 1e6 * 1e-9 * x.float().sum(0)
    torch.testing.assert_close(model.weight.detach(), want.expand_as(before), rtol=1e-2, atol=1e-6)


def test_gradient_is_that_of_a_step_without_a_loss_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, optimizer, criterion = built(scaler=scaler)
    for _ in range(20):
        optimizer.step(lambda: criterion(model(x), y))
        scaler.update()
    assert_close(model.w.detach(), of_functional_sam("sgd"))


def test_a_term_outside_has_its_gradient_at_the_perturbed_weights():
    model, optimizer, criterion = built()
    optimizer.step(lambda: criterion(model(x), y) + 0.1 * model.w.pow(4).sum())
    w = Network().w.detach()
    e = g(w, w) + 0.4 * w**3
    at = w + RHO * e / e.norm()
    assert_close(model.w.detach(), w - 0.1 * (g(at, w) + 0.4 * at**3))


@pytest.mark.parametrize("at_perturbed_weights", [False, True])
def test_stopped_step_leaves_nothing_for_the_next_one(at_perturbed_weights):
    model, optimizer, criterion = built()
    w = model.w.detach().clone()

    def stop():
        loss = criterion(model(x), y)
        if optimizer.current_pass.is_perturbed == at_perturbed_weights:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(stop)
    assert torch.equal(model.w, w)
    for _ in range(2):
        optimizer.step(lambda: criterion(model(x), y))
    assert_close(model.w.detach(), reference(BASES["sgd"], lambda w: g(perturbed(w), w), steps=2))


# Errors.


def raises(kind, message, optimizer, closure, w):
    before = w.detach().clone()
    with pytest.raises(kind, match=message):
        optimizer.step(closure)
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (lambda z, w: F.cross_entropy(z, y, reduction="none"), ValueError, r"shape \(12,\).*return the mean"),
        (lambda z, w: z.sum().item(), ValueError, "returned float"),
        (lambda z, w: torch.ones(()), ValueError, "does not depend on the logits"),
        (lambda z, w: F.cross_entropy(z.detach(), y), ValueError, "does not depend on the logits"),
        (lambda z, w: F.cross_entropy(z, y) + w.square().sum(), ValueError, r"shape \(24,\) that is trained"),
        (lambda z, w: F.mse_loss(z, z.detach() * w[0]), ValueError, "its gradient would be lost"),
    ],
)
def test_loss_whose_derivative_would_be_wrong_is_an_error(loss, kind, message):
    model, optimizer, _ = built()
    criterion = closures.functional(optimizer, loss)
    raises(kind, message, optimizer, lambda: criterion(model(x), model.w), model.w)


def test_outputs_without_logits_are_an_error():
    model, optimizer, criterion = built()
    raises(TypeError, "is tuple, without logits", optimizer, lambda: criterion((model(x), x), y), model.w)


def test_other_samples_at_the_perturbed_weights_are_an_error():
    model, optimizer, criterion = built()
    closure = closures.fraction(optimizer, lambda x, y: criterion(model(x), y), (x, y), fraction=0.25)
    raises(ValueError, r"shape \(12, 3\), and those at w had \(3, 3\)", optimizer, closure, model.w)

    def twice():
        loss = criterion(model(x), y)
        return loss + criterion(model(x), y) if optimizer.current_pass.is_perturbed else loss

    raises(RuntimeError, "as often at w", optimizer, twice, model.w)


@pytest.mark.parametrize(
    "make",
    [
        lambda base: SAM(base, RHO, perturbation=steppe.Momentum()),
        lambda base: SAM(base, RHO, perturbation=steppe.GaussianNoise()),
        steppe.variants.sampa,
        steppe.variants.lookbehind_sam,
    ],
)
def test_method_without_one_derivative_at_w_is_an_error(make):
    model = Network()
    optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    criterion = closures.functional(optimizer, F.cross_entropy)
    with pytest.raises(RuntimeError, match="no derivative of the loss at w"):
        for _ in range(2):  # momentum begins with the second step
            optimizer.step(lambda: criterion(model(x), y))


def test_classic_api_is_an_error():
    model, optimizer, criterion = built()
    w = model.w.detach().clone()
    criterion(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"Use step\(closure\) or a loop over passes\(\)"):
        criterion(model(x), y)
    optimizer.restore()
    assert torch.equal(model.w, w)
