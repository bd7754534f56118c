"""Lightning Fabric needs no integration: what fabric.setup() returns is SAM, in every form of its loop (C30)."""

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from support import batch, model_bits, net

fabric_package = pytest.importorskip("lightning.fabric")
from lightning.fabric.plugins import MixedPrecision  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GPU available.*"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*"),
]


def launch(precision="32-true", **options):
    return fabric_package.Fabric(accelerator="cpu", devices=1, precision=precision, **options)


def make(model, scaler=None, **options):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return steppe.SAM(base, rho=0.1, model=model, scaler=scaler, **options)


def by_passes(optimizer, loss, backward):
    for sam_pass in optimizer.passes():
        with sam_pass:
            backward(loss())
    optimizer.step()


def by_closure(optimizer, loss, backward):
    def closure():
        optimizer.zero_grad()
        value = loss()
        backward(value)
        return value

    optimizer.step(closure)


def by_classic(optimizer, loss, backward):
    optimizer.zero_grad()
    backward(loss())
    optimizer.first_step(zero_grad=True)
    backward(loss())
    optimizer.second_step(zero_grad=True)


FORMS = {"passes": by_passes, "closure": by_closure, "classic": by_classic}
every_form = pytest.mark.parametrize("form", FORMS)


def train(model, optimizer, form, backward, steps=range(4)):
    for step in steps:
        x, y = batch(step)
        torch.manual_seed(step)
        FORMS[form](optimizer, lambda x=x, y=y: F.cross_entropy(model(x).float(), y), backward)


@every_form
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_c30_fabric_takes_the_steps_of_a_plain_loop(precision, form):
    model, twin = net(), net()
    fabric = launch(precision)
    wrapped, optimizer = fabric.setup(model, make(model))
    train(wrapped, optimizer, form, fabric.backward)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        train(twin, make(twin), form, torch.Tensor.backward)
    assert model_bits(model) == model_bits(twin)


@pytest.mark.parametrize("form", ["passes", "classic"])
def test_c30_fabric_with_a_loss_scaler_takes_the_steps_of_a_plain_loop(form):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fabric = launch(None, plugins=MixedPrecision("16-mixed", device="cpu", scaler=scaler))
    wrapped, optimizer = fabric.setup(model, make(model, scaler))
    train(wrapped, optimizer, form, fabric.backward)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sam = make(twin, scaler)
    for step in range(4):
        x, y = batch(step)
        for sam_pass in sam.passes():
            with sam_pass, torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(twin(x).float(), y)
                scaler.scale(loss).backward()
        scaler.step(sam)
        scaler.update()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@every_form
def test_c30_fabric_follows_cadences_and_skips_steps_that_are_not_finite(form):
    model = net()
    fabric = launch()
    sam = steppe.variants.late_sam(
        torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, start=0.5, total_steps=6, model=model
    )
    wrapped, optimizer = fabric.setup(model, sam)
    passes = []
    for step in range(6):
        x, y = batch(step)
        calls = []

        def loss(x=x, y=y, calls=calls):
            calls.append(sam.current_pass)
            return F.cross_entropy(wrapped(x), y)

        FORMS[form](optimizer, loss, fabric.backward)
        passes.append(len(calls))
    assert passes == ([2] * 6 if form == "classic" else [1, 1, 1, 2, 2, 2])
    assert sam._engine.steps == 6
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FORMS[form](optimizer, lambda: wrapped(torch.full((4, 1, 8, 8), float("nan"))).sum(), fabric.backward)
    assert optimizer.skipped_steps == sam.skipped_steps == 1
    for p, w in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, w, rtol=0, atol=0)


def test_c30_fabric_accumulates_inside_each_pass():
    model, twin = net(dropout=0.0).eval(), net(dropout=0.0).eval()
    fabric = launch()
    wrapped, optimizer = fabric.setup(model, make(model))
    sam = make(twin)
    for step in range(3):
        x, y = batch(step)
        for sam_pass in optimizer.passes():
            with sam_pass:
                for i, (xs, ys) in enumerate(zip(x.chunk(3), y.chunk(3), strict=True)):
                    with fabric.no_backward_sync(wrapped, enabled=i < 2):
                        fabric.backward(F.cross_entropy(wrapped(xs), ys) / 3)
        fabric.clip_gradients(wrapped, optimizer, max_norm=0.5)
        optimizer.step()
        for sam_pass in sam.passes():
            with sam_pass:
                F.cross_entropy(twin(x), y).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        sam.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_c30_fabric_saves_and_loads_the_whole_state(tmp_path):
    def setup(model):
        fabric = launch()
        sam = make(model, perturbation=steppe.VarianceSuppressed(), cadence=steppe.Periodic(2))
        return fabric, *fabric.setup(model, sam)

    straight, model, again = net(), net(), net(1)
    fabric, wrapped, optimizer = setup(straight)
    train(wrapped, optimizer, "passes", fabric.backward, range(6))
    fabric, wrapped, optimizer = setup(model)
    train(wrapped, optimizer, "passes", fabric.backward, range(3))
    fabric.save(tmp_path / "state.pt", {"model": wrapped, "optimizer": optimizer})
    fabric, wrapped, optimizer = setup(again)
    fabric.load(tmp_path / "state.pt", {"model": wrapped, "optimizer": optimizer})
    train(wrapped, optimizer, "passes", fabric.backward, range(3, 6))
    assert model_bits(again) == model_bits(straight)


def train_half(fabric, form, folder):
    model = net(dropout=0.0).eval()
    wrapped, optimizer = fabric.setup(model, make(model))
    for step in range(3):
        x, y = (t.chunk(2)[fabric.global_rank] for t in batch(step))
        FORMS[form](optimizer, lambda x=x, y=y: F.cross_entropy(wrapped(x), y), fabric.backward)
    torch.save(model.state_dict(), folder / f"{fabric.global_rank}.pt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked: importing everything again is slow")
@every_form
def test_c30_two_fabric_processes_equal_one(form, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    fabric = fabric_package.Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(train_half, form, tmp_path)
    twin = net(dropout=0.0).eval()
    train(twin, make(twin), form, torch.Tensor.backward, range(3))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
