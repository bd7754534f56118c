"""SAF and MESA: whole trainings against the formulas, and what a user would get silently wrong."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from steppe import SAM
from steppe.methods.mesa import MESA
from steppe.methods.saf import SAF
from support import DRIVES, batch, bits, model_bits, net

LAMBDA, TAU, E, START, BETA = 0.3, 5.0, 2, 3, 0.9
N, BATCH = 12, 4


def model64(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, dtype=torch.float64, generator=g), torch.randint(4, (N,), generator=g)


def order(epoch):
    """What each step of an epoch sees; sample 0 is missing in epoch 2, and sample 5 in epoch 4."""
    g = torch.Generator().manual_seed(100 + epoch)
    kept = [i for i in torch.randperm(N, generator=g).tolist() if (epoch, i) not in ((2, 0), (4, 5))]
    return [torch.tensor(kept[i : i + BATCH]) for i in range(0, len(kept), BATCH)]


def saf64(**other):
    given = {"lmbda": LAMBDA, "tau": TAU, "epochs_ago": E, "start": START, "dtype": torch.float64}
    return SAF(N, 4, **(given | other))


def softmax(y):
    return (y / TAU).exp() / (y / TAU).exp().sum()


def kl(p, q):
    return (p * (p.log() - q.log())).sum()


def run_saf(model, optimizer, saf, epochs, start=0):
    x, y = data()
    for epoch in range(start, epochs):
        for i in order(epoch):
            optimizer.zero_grad()
            logits = model(x[i])
            (F.cross_entropy(logits, y[i]) + saf(logits, i, epoch=epoch)).backward()
            optimizer.step()


def reference_saf(epochs, *, ago=E, start=START, tau=TAU, direction="past first"):
    """Algorithm 1 of the paper, with a dictionary for a memory and a loop over the samples."""
    model, (x, y) = model64(), data()
    past = {}
    for epoch in range(epochs):
        for batch_indices in order(epoch):
            outputs = {i: model(x[i]) for i in batch_indices.tolist()}
            loss = sum(-(o.log_softmax(0)[y[i]]) for i, o in outputs.items()) / len(outputs)
            for i, o in outputs.items():
                before = past.get((epoch - ago, i))
                if epoch >= start and before is not None:
                    p, q = (((z / tau).exp() / (z / tau).exp().sum()) for z in (before, o))
                    if direction != "past first":
                        p, q = q, p
                    loss = loss + LAMBDA * TAU**2 * kl(p, q) / len(outputs)
                past[epoch, i] = o.detach()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= 0.5 * g
    return model


def distance(model, other):
    return max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def trained_with_saf(epochs=8, **other):
    model = model64()
    run_saf(model, torch.optim.SGD(model.parameters(), lr=0.5), saf64(**other), epochs)
    return model


def test_saf_trains_as_the_formula():
    assert distance(trained_with_saf(), reference_saf(8)) < 1e-12


@pytest.mark.parametrize(
    "mutant",
    [
        {"ago": E - 1},
        {"ago": E + 1},
        {"start": START + 1},
        {"tau": 1.0},
        {"direction": "present first"},
        {"start": 100},
    ],
)
def test_a_mutant_of_the_formula_is_noticed(mutant):
    assert distance(trained_with_saf(), reference_saf(8, **mutant)) > 1e-9


@pytest.mark.parametrize("other", [{"epochs_ago": E + 1}, {"tau": 1.0}, {"lmbda": 0.29}, {"start": START + 1}])
def test_every_hyperparameter_counts(other):
    assert distance(trained_with_saf(**other), reference_saf(8)) > 1e-9


@pytest.mark.parametrize("epochs", [1, 4, 5])
def test_saf_resumes_bit_for_bit(epochs, tmp_path):
    model, saf = model64(), saf64()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run_saf(model, optimizer, saf, epochs)
    torch.save({"model": model.state_dict(), "saf": saf.state_dict()}, tmp_path / "checkpoint.pt")
    run_saf(model, optimizer, saf, 8, start=epochs)

    resumed, again = model64(7), saf64()
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(stored["model"])
    again.load_state_dict(stored["saf"])
    run_saf(resumed, torch.optim.SGD(resumed.parameters(), lr=0.5), again, 8, start=epochs)
    assert model_bits(resumed) == model_bits(model)
    assert bits([again.outputs, again.epochs]) == bits([saf.outputs, saf.epochs])


def test_saf_resumed_without_its_memory_says_so():
    model = model64()
    with pytest.warns(UserWarning, match="remembers no outputs"):
        run_saf(model, torch.optim.SGD(model.parameters(), lr=0.5), saf64(), 5, start=4)


@pytest.mark.parametrize("first", [0, 1])
def test_epochs_may_be_counted_from_0_or_1(first):
    saf, i = saf64(), torch.arange(N)
    for epoch in range(first, 6):
        saf(torch.randn(N, 4), i, epoch=epoch)


def test_the_memory_is_what_the_docstring_says():
    saf = SAF(100, 7, epochs_ago=3, dtype=torch.float16)
    assert saf.outputs.shape == (4, 100, 7)
    assert saf.outputs.dtype == torch.float16
    assert saf.epochs.shape == (4, 100)
    assert not list(saf.parameters())
    assert set(saf.state_dict()) == {"outputs", "epochs", "_extra_state"}
    assert "samples=100, classes=(7,)" in repr(saf)
    assert SAF(100, (7, 2, 3)).outputs.shape == (4, 100, 7, 2, 3)


@pytest.mark.parametrize(
    ("logits", "memory", "term"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_dtypes(logits, memory, term):
    saf = SAF(N, 4, epochs_ago=1, start=0, dtype=memory)
    torch.manual_seed(0)
    before, now = torch.randn(N, 4, dtype=logits), torch.randn(N, 4, dtype=logits, requires_grad=True)
    assert saf(before, torch.arange(N), epoch=0).dtype == term
    got = saf(now, torch.arange(N), epoch=1)
    got.backward()
    assert got.dtype == term
    assert now.grad.dtype == logits
    past = before.to(memory).double()
    want = sum(0.3 * 25 * kl(softmax(a), softmax(b)) / N for a, b in zip(past, now.double(), strict=True))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


def test_autocast_computes_the_divergence_in_float32():
    saf = SAF(N, 4, epochs_ago=1, start=0)
    torch.manual_seed(0)
    before, now = torch.randn(2, N, 4)
    with torch.autocast("cpu", torch.bfloat16):
        saf(before, torch.arange(N), epoch=0)
        got = saf(now, torch.arange(N), epoch=1)
    want = sum(0.3 * 25 * kl(softmax(a), softmax(b)) / N for a, b in zip(before.double(), now.double(), strict=True))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


def test_positions_are_averaged_as_by_cross_entropy():
    torch.manual_seed(0)
    before, now = torch.randn(2, N, 4, 5, 2, dtype=torch.float64)
    dense, flat = (SAF(n, s, epochs_ago=1, start=0, dtype=torch.float64) for n, s in ((N, (4, 5, 2)), (N * 10, 4)))
    pixels = [y.permute(0, 2, 3, 1).reshape(-1, 4) for y in (before, now)]
    for epoch, (y, pixel) in enumerate(zip((before, now), pixels, strict=True)):
        got = dense(y, torch.arange(N), epoch=epoch)
        want = flat(pixel, torch.arange(N * 10), epoch=epoch)
    assert got > 0
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_a_sample_without_a_past_has_no_term_and_counts_in_the_mean():
    saf = SAF(N, 4, epochs_ago=1, start=0, dtype=torch.float64)
    torch.manual_seed(0)
    before, now = torch.randn(2, N, 4, dtype=torch.float64)
    now.requires_grad_()
    seen = torch.tensor([1, 3, 4, 6, 8, 9])
    saf(before[seen], seen, epoch=0)
    got = saf(now, torch.arange(N), epoch=1)
    got.backward()
    want = sum(0.3 * 25 * kl(softmax(before[i]), softmax(now[i].detach())) / N for i in seen)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert (now.grad.abs().sum(1) > 0).tolist() == [i in seen for i in range(N)]


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e6])
def test_logits_that_are_not_finite_in_the_memory_are_not_remembered(bad):
    saf = SAF(2, 3, epochs_ago=1, start=0, dtype=torch.float16)
    saf(torch.tensor([[bad, 0.0, 0.0], [1.0, 2.0, 3.0]]), torch.arange(2), epoch=0)
    assert saf.epochs[0].tolist() == [-1, 0]
    now = torch.zeros(2, 3, requires_grad=True)
    saf(now, torch.arange(2), epoch=1).backward()
    assert now.grad.isfinite().all()
    assert now.grad.abs().sum(1).gt(0).tolist() == [False, True]


def saf_gradients(w, x, y, past):
    """Outputs and gradients at w; past has None where there is none."""
    w = [v.detach().requires_grad_() for v in w]
    now = torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]
    loss = F.cross_entropy(now, y)
    for p, q in zip(past, now, strict=True):
        if p is not None:
            loss = loss + LAMBDA * TAU**2 * kl(softmax(p), softmax(q)) / len(x)
    return now.detach(), torch.autograd.grad(loss, w)


@pytest.mark.parametrize("drive", DRIVES.values(), ids=DRIVES)
def test_sams_second_pass_has_the_term_and_leaves_no_output(drive):
    model, saf = model64(), saf64()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.5, model=model)
    (x, y), w, memory = data(), [p.detach().clone() for p in model.parameters()], {}

    for epoch in range(6):
        for i in order(epoch):
            past = [memory.get((epoch - E, int(k))) if epoch >= START else None for k in i]
            now, g = saf_gradients(w, x[i], y[i], past)
            memory.update({(epoch, int(k)): o for k, o in zip(i, now, strict=True)})
            norm = torch.stack([d.norm() for d in g]).norm()
            _, g_s = saf_gradients([v + 0.5 * d / norm for v, d in zip(w, g, strict=True)], x[i], y[i], past)
            w = [v - 0.5 * d for v, d in zip(w, g_s, strict=True)]

            def loss(i=i, epoch=epoch):
                logits = model(x[i])
                return F.cross_entropy(logits, y[i]) + saf(logits, i, epoch=epoch)

            drive(optimizer, loss)
    for p, want in zip(model.parameters(), w, strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-12, atol=1e-12)


def test_nothing_is_remembered_in_eval_mode_or_when_told_not_to():
    saf, i = saf64(), torch.arange(N)
    saf(torch.randn(N, 4), i, epoch=0)
    kept = bits([saf.outputs, saf.epochs])
    saf(torch.randn(N, 4), i, epoch=1, record=False)
    saf.eval()(torch.randn(N, 4), i, epoch=1)
    assert bits([saf.outputs, saf.epochs]) == kept


@pytest.mark.parametrize(
    ("logits", "indices", "epoch", "error", "message"),
    [
        (torch.zeros(2, 4), torch.tensor([0, N]), 0, IndexError, "data set of 12 samples"),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), 0, IndexError, "indices from -1"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), 0, ValueError, r"memory of \(n, 4\)"),
        (torch.zeros(2, 4).long(), torch.tensor([0, 1]), 0, ValueError, "raw outputs"),
        (torch.zeros(2, 4), torch.tensor([0, 1, 2]), 0, ValueError, "one integer each"),
        (torch.zeros(2, 4), torch.tensor([True, False]), 0, ValueError, "one integer each"),
        (torch.zeros(2, 4), torch.tensor([0.0, 1.0]), 0, ValueError, "one integer each"),
        (torch.zeros(2, 4, device="meta"), torch.tensor([0, 1]), 0, RuntimeError, "Move it once"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), -1, ValueError, "epoch must be an integer"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), torch.tensor(0), ValueError, "epoch must be an integer"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), True, ValueError, "epoch must be an integer"),
    ],
)
def test_what_does_not_fit_the_memory_is_refused(logits, indices, epoch, error, message):
    saf = saf64()
    kept = bits([saf.outputs, saf.epochs])
    with pytest.raises(error, match=message):
        saf(logits, indices, epoch=epoch)
    assert bits([saf.outputs, saf.epochs]) == kept


@pytest.mark.parametrize("wrong", [0, 3, 10])
def test_epochs_that_do_not_follow_one_another_are_refused(wrong):
    saf = saf64()
    for epoch in (0, 1):
        saf(torch.zeros(N, 4), torch.arange(N), epoch=epoch)
    with pytest.raises(ValueError, match=f"epoch went from 1 to {wrong}"):
        saf(torch.zeros(N, 4), torch.arange(N), epoch=wrong)


def test_steps_in_place_of_epochs_are_noticed_once():
    saf = saf64()
    saf(torch.zeros(2, 4), torch.tensor([0, 1]), epoch=0)
    with pytest.warns(UserWarning, match="2 of 12 samples"):
        saf(torch.zeros(2, 4), torch.tensor([2, 3]), epoch=1)
    saf(torch.zeros(2, 4), torch.tensor([4, 5]), epoch=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SAF(0, 4), "samples=0"),
        (lambda: SAF(4, ()), "the whole shape"),
        (lambda: SAF(4, (3, 0)), "the whole shape"),
        (lambda: SAF(4, 3, epochs_ago=0), "epochs_ago must be 1 or more"),
        (lambda: SAF(4, 3, dtype=torch.long), "dtype must be a floating"),
        (lambda: SAF(4, 3, lmbda=-0.1), "lmbda must be finite"),
        (lambda: SAF(4, 3, tau=0.0), "tau must be finite"),
        (lambda: SAF(4, 3, start=-1), "start must be 0 or more"),
        (lambda: MESA(model64(), tau=-1.0), "tau must be finite"),
        (lambda: MESA(model64(), beta=1.0), "beta must be at least 0"),
        (lambda: MESA(model64().bfloat16()), "half precision"),
        (lambda: MESA(nn.LazyLinear(3)), "run one forward"),
        (lambda: MESA(model64(), torch.optim.SGD(model64().parameters())), "none of the model's parameters"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _two_processes(rank, path):
    warnings.simplefilter("error")
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    saf = SAF(4, 3, epochs_ago=1, start=0, dtype=torch.float64)
    torch.manual_seed(0)
    before, now = torch.randn(2, 4, 3, dtype=torch.float64)
    mine, others = torch.tensor([[0, 1], [2, 3]])[[rank, 1 - rank]]
    saf(before[mine], mine, epoch=0)
    got = saf(now[others], others, epoch=1)
    want = sum(0.3 * 25 * kl(softmax(before[i]), softmax(now[i])) / 2 for i in others)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.distributed.destroy_process_group()


def test_processes_remember_what_the_others_saw(tmp_path):
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path / "meeting"),), nprocs=2)


def test_on_an_accelerator_nothing_waits_for_the_device():
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # which refuses to read a value
        saf = SAF(N, 4, epochs_ago=1, start=0)
        for epoch in range(3):
            term = saf(torch.zeros(N, 4, dtype=torch.bfloat16), torch.arange(N), epoch=epoch)
        assert term.device.type == "cuda"


# MESA.


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


def test_mesa_trains_as_the_formula():
    (model, mesa), (want, average) = trained_with_mesa(), reference_mesa(6)
    assert distance(model, want) < 1e-12
    assert distance(mesa.ema, average) < 1e-12
    assert mesa.updates == sum(len(order(e)) for e in range(6))


@pytest.mark.parametrize("mutant", [{"beta": 0.91}, {"start": START + 1}, {"start": 100}, {"swapped": True}])
def test_a_mutant_of_mesa_is_noticed(mutant):
    assert distance(trained_with_mesa()[0], reference_mesa(6, **mutant)[0]) > 1e-9


def test_mesa_resumes_bit_for_bit(tmp_path):
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
def test_around_sam_the_average_is_taken_once_a_step_at_w(drive):
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


def test_the_average_of_buffers_and_the_mode_of_its_forward():
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
    """Draws in every mode, as many a model's code does by mistake."""

    def forward(self, x):
        return F.dropout(x, 0.5)


def test_the_forward_of_the_average_leaves_no_trace():
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


def test_the_trained_model_is_no_part_of_mesa():
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


def test_mesa_on_an_accelerator_does_not_wait_for_the_device(monkeypatch):
    monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: nullcontext())  # the device itself is not there
    monkeypatch.setattr(copy, "deepcopy", lambda model: Scale())  # and these tensors have no storage
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # which refuses to read a value
        model = Scale()
        mesa = MESA(model, start=0)
        x = torch.zeros(8, 3)
        term = mesa(model(x), x, epoch=0)
        mesa.update()
        assert term.device.type == "cuda"


def test_before_the_start_the_average_makes_no_forward():
    model = model64()
    mesa = MESA(model, start=2)
    mesa.ema.register_forward_hook(lambda *_: pytest.fail("a forward was made"))
    x, _ = data()
    term = mesa(model(x), x, epoch=1)
    assert term.item() == 0.0
    assert term.dtype == torch.float64


def test_a_forgotten_update_is_noticed():
    model, (x, _) = model64(), data()
    mesa = MESA(model, start=2)
    mesa(model(x), x, epoch=0)
    mesa.update()
    mesa(model(x), x, epoch=1)
    with pytest.raises(RuntimeError, match="not updated once in epoch 1"):
        mesa(model(x), x, epoch=2)


def test_an_update_by_hand_and_by_the_optimizer_is_refused():
    model = model64()
    mesa = MESA(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="twice"):
        mesa.update()


def test_an_average_of_initial_weights_is_noticed():
    model, (x, _) = model64(), data()
    mesa = MESA(model, start=1, beta=0.9)
    mesa(model(x), x, epoch=0)
    mesa.update()
    with pytest.warns(UserWarning, match="90% of MESA's average"):
        mesa(model(x), x, epoch=1)


def test_a_mesa_that_is_given_up_is_no_longer_updated():
    model = model64()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mesa = MESA(model, optimizer)
    ema = mesa.ema
    kept = model_bits(ema)
    model(data()[0]).sum().backward()
    del mesa
    optimizer.step()
    assert model_bits(ema) == kept


def test_wrappers_are_taken_off():
    model = model64()
    assert type(MESA(nn.DataParallel(model)).ema) is nn.Sequential
    assert type(MESA(torch.compile(model, backend="eager")).ema) is nn.Sequential


@pytest.mark.parametrize("change", [lambda m: m.append(nn.Linear(4, 4)), lambda m: m.float()])
def test_a_model_that_changed_is_refused(change):
    model = model64()
    mesa = MESA(model)
    change(model)
    with pytest.raises(RuntimeError, match="differ from MESA's average"):
        mesa.update()


def test_outputs_that_cannot_be_compared_are_refused():
    model, (x, _) = model64(), data()
    mesa = MESA(model, start=0)
    with pytest.raises(ValueError, match=r"returned \(12, 4\)"):
        mesa(model(x)[:3], x, epoch=0)
    tuples = nn.Sequential(nn.LSTM(3, 4)).double()
    with pytest.raises(ValueError, match="returned tuple"):
        MESA(tuples, start=0)(torch.zeros(12, 4), x, epoch=0)
