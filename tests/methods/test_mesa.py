"""MESA: whole trainings against the formula, its average, and uses that would be wrong without an error."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trajectory_problem import BETA, LAMBDA, START, TAU, data, distance, kl, model64, order, softmax

import steppe
from steppe import SAM
from steppe.methods.mesa import MESA
from support import DRIVES, batch, bits, model_bits, net


def run_mesa(model, optimizer, mesa, epochs, start=0):
    x, y = data()
    for epoch in range(start, epochs):
        for i in order(epoch):
            optimizer.zero_grad()
            logits = model(x[i])
            (F.cross_entropy(logits, y[i]) + mesa(logits, x[i], epoch=epoch)).backward()
            optimizer.step()


def reference_mesa(epochs, *, beta=BETA, start=START, swapped=False):
    model, (x, y) = model64(), data()
    average = copy.deepcopy(model)
    for epoch in range(epochs):
        for i in order(epoch):
            now, past = model(x[i]), average(x[i]).detach()
            loss = F.cross_entropy(now, y[i])
            if epoch >= start:
                for a, b in zip(past, now, strict=True):
                    p, q = softmax(a), softmax(b)
                    loss = loss + LAMBDA * TAU**2 * (kl(q, p) if swapped else kl(p, q)) / len(i)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, v, g in zip(model.parameters(), average.parameters(), gradients, strict=True):
                    p -= 0.5 * g
                    v.copy_(beta * v + (1 - beta) * p)
    return model, average


def trained_with_mesa(epochs=6):
    model = model64()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mesa = MESA(model, optimizer, lmbda=LAMBDA, tau=TAU, beta=BETA, start=START)
    run_mesa(model, optimizer, mesa, epochs)
    return model, mesa


def test_training_matches_the_formula():
    (model, mesa), (want, average) = trained_with_mesa(), reference_mesa(6)
    assert distance(model, want) < 1e-12
    assert distance(mesa.ema, average) < 1e-12
    assert mesa.updates == sum(len(order(e)) for e in range(6))


@pytest.mark.parametrize("mutant", [{"beta": 0.91}, {"start": START + 1}, {"start": 100}, {"swapped": True}])
def test_mutant_of_the_formula_is_killed(mutant):
    assert distance(trained_with_mesa()[0], reference_mesa(6, **mutant)[0]) > 1e-9


def test_resumed_training_has_the_same_bits(tmp_path):
    model, mesa = trained_with_mesa(4)
    torch.save({"model": model.state_dict(), "mesa": mesa.state_dict()}, tmp_path / "checkpoint.pt")
    want, averaged = trained_with_mesa(6)
    resumed = model64(7)
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.5)
    again = MESA(resumed, optimizer, lmbda=LAMBDA, tau=TAU, beta=BETA, start=START)
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(stored["model"])
    again.load_state_dict(stored["mesa"])
    run_mesa(resumed, optimizer, again, 6, start=4)
    assert model_bits(resumed) == model_bits(want)
    assert model_bits(again.ema) == model_bits(averaged.ema)
    assert again.updates == averaged.updates


@pytest.mark.parametrize("drive", DRIVES.values(), ids=DRIVES)
def test_average_around_sam_is_updated_once_per_step_at_w(drive):
    model = model64()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.5, model=model)
    mesa = MESA(model, optimizer, beta=BETA, start=0)
    want = [p.detach().clone() for p in model.parameters()]
    x, y = data()

    def loss():
        logits = model(x)
        return F.cross_entropy(logits, y) + mesa(logits, x, epoch=0)

    for _ in range(5):
        drive(optimizer, loss)
        want = [BETA * v + (1 - BETA) * p.detach() for v, p in zip(want, model.parameters(), strict=True)]
    for got, v in zip(mesa.ema.parameters(), want, strict=True):
        torch.testing.assert_close(got, v, rtol=1e-12, atol=1e-12)
    assert mesa.updates == 5


def test_buffers_are_averaged_and_the_forward_is_in_eval_mode():
    model = net()
    mesa = MESA(model, beta=BETA, start=0)
    mean = model.layers[1].running_mean.clone()
    for step in range(3):
        model(batch(step)[0])
        mesa.train().update()
        mean = BETA * mean + (1 - BETA) * model.layers[1].running_mean
    torch.testing.assert_close(mesa.ema.layers[1].running_mean, mean)
    assert int(mesa.ema.layers[1].num_batches_tracked) == 3
    assert not any(m.training for m in mesa.ema.modules())
    assert model.training
    x, _ = batch(5)
    logits = model(x)
    twin = copy.deepcopy(mesa.ema).eval()
    want = sum(0.8 * 25 * kl(softmax(a), softmax(b)) / len(x) for a, b in zip(twin(x), logits, strict=True))
    torch.testing.assert_close(mesa(logits, x, epoch=0), want, rtol=1e-4, atol=0)


class Careless(nn.Module):
    """Draws random numbers in every mode, a common mistake."""

    def forward(self, x):
        return F.dropout(x, 0.5)


def test_forward_of_the_average_changes_nothing_else():
    model = nn.Sequential(net(), Careless())
    mesa = MESA(model, beta=BETA, start=0)
    x, _ = batch()
    logits = model(x)
    before = model_bits(model), model_bits(mesa), bits([torch.get_rng_state()])
    mesa(logits, x, epoch=0).backward()
    assert (model_bits(model), model_bits(mesa), bits([torch.get_rng_state()])) == before
    assert all(p.grad is None for p in mesa.parameters())
    assert any(p.grad is not None for p in model.parameters())


def test_no_gradient_flows_through_the_average():
    model, (x, _) = model64(), data()
    mesa = MESA(model, start=0)
    assert not mesa(model(x).detach(), x.requires_grad_(), epoch=0).requires_grad


def test_trained_model_is_not_a_submodule():
    model = model64()
    mesa = MESA(model)
    assert all(name.startswith("ema.") for name, _ in mesa.named_parameters())
    assert not any(p.requires_grad for p in mesa.parameters())
    assert {p.data_ptr() for p in mesa.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


class Scale(nn.Module):
    """A weight, a statistic and a counter."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.w * x


def test_no_value_is_read_on_the_host(monkeypatch):
    monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: nullcontext())  # the device itself is not there
    monkeypatch.setattr(copy, "deepcopy", lambda model: Scale())  # and these tensors have no storage
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # reading a value raises
        model = Scale()
        mesa = MESA(model, start=0)
        x = torch.zeros(8, 3)
        term = mesa(model(x), x, epoch=0)
        mesa.update()
        assert term.device.type == "cuda"


def test_average_makes_no_forward_before_the_start():
    model = model64()
    mesa = MESA(model, start=2)
    mesa.ema.register_forward_hook(lambda *_: pytest.fail("a forward was made"))
    x, _ = data()
    term = mesa(model(x), x, epoch=1)
    assert term.item() == 0.0
    assert term.dtype == torch.float64


def test_forgotten_update_is_an_error():
    model, (x, _) = model64(), data()
    mesa = MESA(model, start=2)
    mesa(model(x), x, epoch=0)
    mesa.update()
    mesa(model(x), x, epoch=1)
    with pytest.raises(RuntimeError, match="not updated once in epoch 1"):
        mesa(model(x), x, epoch=2)


def test_update_by_hand_and_by_the_optimizer_is_an_error():
    model = model64()
    mesa = MESA(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="twice"):
        mesa.update()


def test_average_of_mostly_initial_weights_warns():
    model, (x, _) = model64(), data()
    mesa = MESA(model, start=1, beta=0.9)
    mesa(model(x), x, epoch=0)
    mesa.update()
    with pytest.warns(UserWarning, match="90% of MESA's average"):
        mesa(model(x), x, epoch=1)


def test_mesa_that_was_deleted_is_no_longer_updated():
    model = model64()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mesa = MESA(model, optimizer)
    ema = mesa.ema
    kept = model_bits(ema)
    model(data()[0]).sum().backward()
    del mesa
    optimizer.step()
    assert model_bits(ema) == kept


def test_module_inside_wrappers_is_averaged():
    model = model64()
    assert type(MESA(nn.DataParallel(model)).ema) is nn.Sequential
    assert type(MESA(torch.compile(model, backend="eager")).ema) is nn.Sequential


@pytest.mark.parametrize("change", [lambda m: m.append(nn.Linear(4, 4)), lambda m: m.float()])
def test_model_that_was_changed_is_an_error(change):
    model = model64()
    mesa = MESA(model)
    change(model)
    with pytest.raises(RuntimeError, match="differ from MESA's average"):
        mesa.update()


def test_outputs_of_another_shape_are_an_error():
    model, (x, _) = model64(), data()
    mesa = MESA(model, start=0)
    with pytest.raises(ValueError, match=r"returned \(12, 4\)"):
        mesa(model(x)[:3], x, epoch=0)
    tuples = nn.Sequential(nn.LSTM(3, 4)).double()
    with pytest.raises(ValueError, match="returned tuple"):
        MESA(tuples, start=0)(torch.zeros(12, 4), x, epoch=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MESA(model64(), tau=-1.0), "tau must be finite"),
        (lambda: MESA(model64(), beta=1.0), "beta must be at least 0"),
        (lambda: MESA(model64().bfloat16()), "half precision"),
        (lambda: MESA(nn.LazyLinear(3)), "run one forward"),
        (lambda: MESA(model64(), torch.optim.SGD(model64().parameters())), "none of the model's parameters"),
    ],
)
def test_hyperparameter_or_model_that_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_step_that_was_skipped_is_no_update():
    model = torch.nn.Linear(2, 3)
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    mesa = MESA(model, optimizer, start=0)
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        optimizer.step(lambda: model(torch.full((4, 2), float("inf"))).sum())
    assert mesa.updates == 0


def test_base_of_sam_is_an_error():
    """Lookbehind and others step their base several times a step."""
    model = torch.nn.Linear(2, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = steppe.variants.lookbehind_sam(base, model=model)
    with pytest.raises(TypeError, match="give the average the SAM itself"):
        MESA(model, base)
    del sam  # alive until here: the base of a SAM that is gone is an optimizer like any other
