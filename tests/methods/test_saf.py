"""SAF: whole trainings against the formula, its memory, and uses that would be wrong without an error."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from trajectory_problem import LAMBDA, START, TAU, E, N, data, distance, kl, model64, order, softmax

from ranks import start_ranks
from steppe import SAM
from steppe.methods.saf import SAF
from support import DRIVES, bits, model_bits


def saf64(**other):
    given = {"lmbda": LAMBDA, "tau": TAU, "epochs_ago": E, "start": START, "dtype": torch.float64}
    return SAF(N, 4, **(given | other))


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


def trained_with_saf(epochs=8, **other):
    model = model64()
    run_saf(model, torch.optim.SGD(model.parameters(), lr=0.5), saf64(**other), epochs)
    return model


def test_training_matches_the_formula():
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
def test_mutant_of_the_formula_is_killed(mutant):
    assert distance(trained_with_saf(), reference_saf(8, **mutant)) > 1e-9


@pytest.mark.parametrize("other", [{"epochs_ago": E + 1}, {"tau": 1.0}, {"lmbda": 0.29}, {"start": START + 1}])
def test_each_hyperparameter_changes_the_training(other):
    assert distance(trained_with_saf(**other), reference_saf(8)) > 1e-9


@pytest.mark.parametrize("epochs", [1, 4, 5])
def test_resumed_training_has_the_same_bits(epochs, tmp_path):
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


def test_training_resumed_without_the_memory_warns():
    model = model64()
    with pytest.warns(UserWarning, match="without stored outputs"):
        run_saf(model, torch.optim.SGD(model.parameters(), lr=0.5), saf64(), 5, start=4)


@pytest.mark.parametrize("first", [0, 1])
def test_epochs_can_start_from_0_or_1(first):
    saf, i = saf64(), torch.arange(N)
    for epoch in range(first, 6):
        saf(torch.randn(N, 4), i, epoch=epoch)


def test_memory_has_the_documented_shape_and_dtype():
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
def test_term_has_the_wider_dtype_of_logits_and_float32(logits, memory, term):
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


def test_positions_are_averaged_as_in_cross_entropy():
    torch.manual_seed(0)
    before, now = torch.randn(2, N, 4, 5, 2, dtype=torch.float64)
    dense, flat = (SAF(n, s, epochs_ago=1, start=0, dtype=torch.float64) for n, s in ((N, (4, 5, 2)), (N * 10, 4)))
    pixels = [y.permute(0, 2, 3, 1).reshape(-1, 4) for y in (before, now)]
    for epoch, (y, pixel) in enumerate(zip((before, now), pixels, strict=True)):
        got = dense(y, torch.arange(N), epoch=epoch)
        want = flat(pixel, torch.arange(N * 10), epoch=epoch)
    assert got > 0
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_sample_without_past_outputs_has_no_term_and_counts_in_the_mean():
    saf = SAF(N, 4, epochs_ago=1, start=0, dtype=torch.float64)
    torch.manual_seed(0)
    before, now = torch.randn(2, N, 4, dtype=torch.float64)
    now.requires_grad_()
    first = torch.tensor([1, 3, 4, 6, 8, 9])
    saf(before[first], first, epoch=0)
    got = saf(now, torch.arange(N), epoch=1)
    got.backward()
    want = sum(0.3 * 25 * kl(softmax(before[i]), softmax(now[i].detach())) / N for i in first)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert (now.grad.abs().sum(1) > 0).tolist() == [i in first for i in range(N)]


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e6])
def test_logits_not_finite_in_the_dtype_of_the_memory_are_not_stored(bad):
    saf = SAF(2, 3, epochs_ago=1, start=0, dtype=torch.float16)
    saf(torch.tensor([[bad, 0.0, 0.0], [1.0, 2.0, 3.0]]), torch.arange(2), epoch=0)
    assert saf.epochs[0].tolist() == [-1, 0]
    now = torch.zeros(2, 3, requires_grad=True)
    saf(now, torch.arange(2), epoch=1).backward()
    assert now.grad.isfinite().all()
    assert now.grad.abs().sum(1).gt(0).tolist() == [False, True]


def saf_gradients(w, x, y, past):
    """Outputs and gradients at w; past has None for a sample without past outputs."""
    w = [v.detach().requires_grad_() for v in w]
    now = torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]
    loss = F.cross_entropy(now, y)
    for p, q in zip(past, now, strict=True):
        if p is not None:
            loss = loss + LAMBDA * TAU**2 * kl(softmax(p), softmax(q)) / len(x)
    return now.detach(), torch.autograd.grad(loss, w)


@pytest.mark.parametrize("drive", DRIVES.values(), ids=DRIVES)
def test_second_pass_of_sam_has_the_term_and_stores_no_output(drive):
    model, saf = model64(), saf64()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.5, model=[model, saf])
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


def test_nothing_is_stored_in_eval_mode_or_without_record():
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
def test_batch_that_does_not_fit_the_memory_is_an_error(logits, indices, epoch, error, message):
    saf = saf64()
    kept = bits([saf.outputs, saf.epochs])
    with pytest.raises(error, match=message):
        saf(logits, indices, epoch=epoch)
    assert bits([saf.outputs, saf.epochs]) == kept


@pytest.mark.parametrize("wrong", [0, 3, 10])
def test_epochs_that_are_not_consecutive_are_an_error(wrong):
    saf = saf64()
    for epoch in (0, 1):
        saf(torch.zeros(N, 4), torch.arange(N), epoch=epoch)
    with pytest.raises(ValueError, match=f"epoch went from 1 to {wrong}"):
        saf(torch.zeros(N, 4), torch.arange(N), epoch=wrong)


def test_steps_counted_as_epochs_warn_once():
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
    ],
)
def test_hyperparameter_out_of_range_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def term_with_outputs_of_another_rank():
    rank = torch.distributed.get_rank()
    saf = SAF(4, 3, epochs_ago=1, start=0, dtype=torch.float64)
    torch.manual_seed(0)
    before, now = torch.randn(2, 4, 3, dtype=torch.float64)
    mine, others = torch.tensor([[0, 1], [2, 3]])[[rank, 1 - rank]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saf(before[mine], mine, epoch=0)
        got = saf(now[others], others, epoch=1)
    want = sum(0.3 * 25 * kl(softmax(before[i]), softmax(now[i])) / 2 for i in others)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_processes_store_the_outputs_of_all():
    start_ranks()(term_with_outputs_of_another_rank)


def test_no_value_is_read_on_the_host():
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # reading a value raises
        saf = SAF(N, 4, epochs_ago=1, start=0)
        for epoch in range(3):
            term = saf(torch.zeros(N, 4, dtype=torch.bfloat16), torch.arange(N), epoch=epoch)
        assert term.device.type == "cuda"
