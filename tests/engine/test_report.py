"""Contract C36: ``report()`` tells what SAM did, and gives a hint where that looks like a mistake."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import steppe
from fake_cuda import fake_parameters, step_with_ones
from steppe import SAM
from support import DRIVES, parameter

X = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(10, 3, generator=torch.Generator().manual_seed(1))).argmax(1)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3)).to(dtype)


def loss_of(model):
    return F.cross_entropy(model(X.to(next(model.parameters()).dtype)), Y)


def train(model, optimizer, steps=20):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer.report()


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("drive", DRIVES)
def test_c36_report_measures_length_cosine_and_losses(drive):
    model, reference = mlp(), mlp()
    optimizer = SAM(sgd(model.parameters()), rho=0.05, model=model)
    DRIVES[drive](optimizer, lambda: loss_of(model))
    at_w = loss_of(reference)
    g = torch.cat([part.flatten() for part in torch.autograd.grad(at_w, reference.parameters())])
    w = nn.utils.parameters_to_vector(reference.parameters()).detach()
    nn.utils.vector_to_parameters(w + 0.05 * g / g.norm(), reference.parameters())
    perturbed = loss_of(reference)
    g_s = torch.cat([part.flatten() for part in torch.autograd.grad(perturbed, reference.parameters())])
    report = optimizer.report()
    assert (report.steps, report.perturbed_steps, report.skipped_steps, report.measured_steps) == (1, 1, 0, 1)
    assert report.rho == pytest.approx(0.05)
    assert report.weight_norm == pytest.approx(float(w.norm()), rel=1e-5)
    assert report.perturbation_norm == pytest.approx(0.05, rel=1e-4)
    assert report.length_in_rho == pytest.approx(1.0, rel=1e-4)
    assert report.cosine == pytest.approx(float(F.cosine_similarity(g, g_s, dim=0)), abs=1e-5)
    assert report.gradient_difference == pytest.approx(float((g_s - g).norm() / g.norm()), rel=1e-4)
    if drive == "closure":
        assert report.loss == pytest.approx(at_w.item(), rel=1e-5)
        assert report.loss_difference == pytest.approx((perturbed - at_w).item(), rel=1e-3)
    else:
        assert report.loss_difference is None
    assert report.hints == ()
    assert "1 of them perturbed" in str(report)


def test_c36_losses_of_passes_can_be_recorded():
    w = parameter(3.0, 4.0)
    optimizer = SAM(sgd([w]), rho=0.5)
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss = w.square().sum()
            loss.backward()
            sam_pass.record_loss(loss)
    optimizer.step()
    assert optimizer.report().loss_difference == pytest.approx(5.5**2 - 25)


def test_c36_groups_share_the_length_of_one_perturbation():
    a, b = parameter(3.0), parameter(4.0)
    optimizer = SAM(sgd([{"params": [a]}, {"params": [b], "sam_rho": 0.1}]), rho=0.05)
    optimizer.step(lambda: (a.square() + b.square()).sum())
    report = optimizer.report()
    assert [group.rho for group in report.groups] == pytest.approx([0.05, 0.1])
    assert [group.length_in_rho for group in report.groups] == pytest.approx([0.6, 0.8], rel=1e-4)
    assert [group.weight_norm for group in report.groups] == pytest.approx([3, 4])
    assert report.length_in_rho == pytest.approx(1.0, rel=1e-4)
    assert report.rho is None


# Six mistakes that are made in practice, each with its hint.


def test_c36_usual_radius_gives_no_hint():
    model = mlp()
    report = train(model, SAM(sgd(model.parameters()), rho=0.05, model=model))
    assert report.hints == ()


@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.AdamW(p, lr=1e-2)], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("rho", "hint"), [(0.0005, "too small"), (5.0, "too large")])
def test_c36_radius_a_hundred_times_off_gives_a_hint(make, rho, hint):
    model = mlp()
    (found,) = train(model, SAM(make(model.parameters()), rho=rho, model=model)).hints
    assert f"rho may be {hint}" in found


def test_c36_optimizer_that_never_perturbs_gives_a_hint():
    model = mlp()
    late = SAM(sgd(model.parameters()), cadence=steppe.LatePhase(0.75, 100), model=model)
    assert any("never active: LatePhase" in hint for hint in train(model, late).hints)
    without = SAM(sgd(model.parameters()), rho=0.0, model=model)
    assert any("sam_rho is 0 in every group" in hint for hint in train(model, without).hints)


def test_c36_passes_without_gradients_give_a_hint_about_backward_and_not_about_the_cadence():
    optimizer = SAM(sgd(mlp().parameters()))
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss_of(mlp())  # no backward
    with pytest.warns(UserWarning, match="no pass of this step made a gradient"):
        optimizer.step()
    (found,) = optimizer.report().hints
    assert "never active: no pass made a gradient" in found


def test_c36_plain_steps_give_a_hint():
    model = mlp()
    optimizer = SAM(sgd(model.parameters()), model=model)
    loss_of(model).backward()
    with pytest.warns(UserWarning, match="plain step"):
        optimizer.step()
    optimizer.step()
    report = optimizer.report()
    assert (report.steps, report.perturbed_steps) == (2, 0)
    assert any("without passes" in hint for hint in report.hints)


@pytest.mark.parametrize("cause", ["its sam_rho is 0", "requires a gradient", "got a gradient"])
def test_c36_group_without_perturbation_gives_a_hint(cause):
    model, unused = mlp(), parameter(1.0)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    if "sam_rho" in cause:
        groups[1]["sam_rho"] = 0.0
    elif "requires" in cause:
        model[2].requires_grad_(False)
    else:
        groups[0]["params"] += groups[1]["params"]
        groups[1]["params"] = [unused]
    (hint,) = train(model, SAM(sgd(groups), rho=0.05, model=model)).hints
    assert hint.startswith("group 1")
    assert cause in hint


def test_group_without_parameters_gives_no_hint():
    model = mlp()
    groups = [{"params": list(model.parameters())}, {"params": []}]  # the Trainer makes such a group with LoRA
    assert train(model, SAM(sgd(groups), rho=0.05, model=model)).hints == ()


@pytest.mark.filterwarnings("ignore:only .* of the perturbation survives")
def test_c36_weights_in_half_precision_give_a_hint():
    model = mlp(torch.bfloat16)
    assert any("torch.bfloat16" in hint for hint in train(model, SAM(sgd(model.parameters()), model=model)).hints)
    model = mlp(torch.bfloat16)
    rounded = SAM(sgd(model.parameters()), model=model, stochastic_rounding=True)
    assert not any("torch.bfloat16" in hint for hint in train(model, rounded).hints)


def test_c36_model_in_evaluation_mode_gives_a_hint():
    model = mlp()
    optimizer = SAM(sgd(model.parameters()), model=model)
    train(model, optimizer, steps=3)
    model.eval()
    train(model, optimizer, steps=2)
    model.train()
    assert any("evaluation mode in 2 perturbed steps" in hint for hint in optimizer.report().hints)
    model.eval()
    listed = SAM(sgd(model.parameters()), model=list(model))
    assert any("evaluation mode in 2 perturbed steps" in hint for hint in train(model, listed, steps=2).hints)
    model.train()
    model[1].eval()  # one frozen layer is usual
    assert train(model, SAM(sgd(model.parameters()), rho=0.05, model=model)).hints == ()


# Cost, and what the report must not disturb.


def test_c36_few_steps_are_measured(monkeypatch):
    w = parameter(3.0, 4.0)
    optimizer = SAM(sgd([w]), rho=0.05)
    measured = []
    monkeypatch.setattr("steppe._engine.recorder._lengths", lambda *_: measured.append(1) or torch.zeros(2))
    for _ in range(640):
        optimizer.step(lambda: w.sum())
    assert len(measured) == 3 + 4
    assert optimizer.report().perturbed_steps == 640


def test_c36_measuring_does_not_synchronize_with_the_device():
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = fake_parameters()
        optimizer = SAM(sgd(params), rho=0.1)
        step_with_ones(optimizer, params, "passes")
        assert len(optimizer._engine.recorder.samples) == 1
        with pytest.raises(Exception, match="_local_scalar_dense|not linked|tolist"):
            optimizer.report()  # reading synchronizes, which raises within FakeTensorMode


def test_c36_report_does_not_change_the_steps():
    model, other = mlp(), mlp()
    optimizer, silent = (SAM(sgd(m.parameters()), rho=0.05, model=m) for m in (model, other))
    for _ in range(5):
        train(model, optimizer, steps=1)
    silent._engine.recorder._is_due = lambda: False
    assert train(other, silent, steps=5).measured_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_c36_step_that_is_not_finite_does_not_spoil_the_medians():
    w = parameter(3.0, 4.0)
    optimizer = SAM(sgd([w]), rho=0.05)
    optimizer.step(lambda: w.square().sum())
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step(lambda: (w * float("nan")).sum())
    optimizer.step(lambda: w.square().sum())
    report = optimizer.report()
    assert (report.steps, report.skipped_steps) == (2, 1)
    assert report.length_in_rho == pytest.approx(1.0, rel=1e-4)


def test_c36_aborted_step_is_not_counted():
    w = parameter(3.0, 4.0)
    optimizer = SAM(sgd([w]), rho=0.05)
    w.square().sum().backward()
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    report = optimizer.report()
    assert (report.steps, report.perturbed_steps, report.measured_steps) == (0, 0, 0)
    assert report.hints == ()


def test_c36_copy_begins_its_own_report():
    w = parameter(3.0, 4.0)
    optimizer = SAM(sgd([w]), rho=0.05)
    optimizer.step(lambda: w.square().sum())
    assert copy.deepcopy(optimizer).report().steps == 0
    assert optimizer.report().steps == 1


def test_c36_long_gradients_are_compared_by_some_of_their_entries(monkeypatch):
    model, reference = mlp(), mlp()
    exact = train(reference, SAM(sgd(reference.parameters()), rho=0.05, model=reference))
    monkeypatch.setattr("steppe._engine.recorder._PIECE", 50)
    report = train(model, SAM(sgd(model.parameters()), rho=0.05, model=model))
    assert report.length_in_rho == pytest.approx(1.0, rel=1e-4), "lengths are of all entries"
    assert report.cosine == pytest.approx(exact.cosine, abs=0.01)


@pytest.mark.parametrize("name", ["asam", "gsam", "friendly_sam", "lookbehind_sam", "wsam", "sampa", "rwp"])
def test_c36_methods_report(name):
    model = mlp()
    optimizer = getattr(steppe.variants, name)(sgd(model.parameters()), model=model)
    report = train(model, optimizer, steps=5)
    assert report.perturbed_steps == 5
    assert report.perturbation_norm > 0
    assert name in ("sampa", "rwp") or 0 < report.cosine <= 1
    assert str(report)
