"""The contract, C14 to C16 and C18 to C20: what the second pass leaves, non-finite gradients, accumulation."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from checks import build
from steppe import SAM, frozen_stats
from steppe._engine import side_effects as passes
from support import BASES, DRIVES, batch, bits, by_closure, by_passes, model_bits, net, plain, train

every_drive = pytest.mark.parametrize("drive", DRIVES)


class EvoNorm(nn.Module):
    """A norm that reads its running variance in training, and replaces the buffer instead of writing into it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("calls", None)

    def forward(self, x):
        variance = x.var(dim=(0, *range(2, x.dim())), unbiased=False)
        if self.training:
            self.running_var = (0.9 * self.running_var + 0.1 * variance).detach()
            self.calls = torch.ones(()) if self.calls is None else self.calls + 1
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.weight.view(shape) / self.running_var.view(shape).sqrt()


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "sync": lambda: nn.SyncBatchNorm(4),
    "instance": lambda: nn.InstanceNorm2d(4, track_running_stats=True, affine=True),
    "evo": lambda: EvoNorm(4),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    "lazy": lambda: nn.LazyBatchNorm2d(),
}


def normed(norm: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), NORMS[norm](), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    if norm == "lazy":
        model(batch()[0])
        model[1].reset_running_stats()
    return model


@every_drive
@pytest.mark.parametrize("norm", NORMS)
def test_c14_buffers_are_what_one_ordinary_pass_leaves(norm, drive):
    model, twin = normed(norm), normed(norm)
    # lr = 0, so that weights and therefore first passes are the same with and without SAM
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=2.0, model=model)
    train(model, optimizer, DRIVES[drive], 3)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.0), plain, 3)
    assert model_bits(model) == model_bits(twin)
    unprotected = normed(norm)
    train(unprotected, SAM(torch.optim.SGD(unprotected.parameters(), lr=0.0), rho=2.0), DRIVES[drive], 3)
    assert model_bits(unprotected) != model_bits(twin), "without model= the second pass must be seen in this test"


def test_c14_the_second_pass_evaluates_the_function_that_the_first_one_did():
    model = normed("evo")
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.0, model=model)
    x, y = batch()
    losses = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
    assert losses[0].item() == losses[1].item(), "same weights, same buffers, same loss"


def test_c14_modules_in_eval_mode_stay_untouched_and_modes_are_kept():
    model = net()
    model.layers[1].eval()
    frozen = copy.deepcopy(model.layers[1].state_dict())
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=1.0, model=model)
    modes = [m.training for m in model.modules()]
    train(model, optimizer, by_closure, 2)
    assert [m.training for m in model.modules()] == modes
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(model.layers[1].state_dict()[name], frozen[name])


def test_c14_nothing_is_switched_off_in_a_module_saved_midway():
    model = net(dropout=0.0)
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=1.0, model=model)
    x, y = batch()
    for sam_pass in optimizer.passes():
        with sam_pass:
            F.cross_entropy(model(x), y).backward()
            saved = copy.deepcopy(model)
    before = saved.layers[1].num_batches_tracked.item()
    saved(x)
    assert saved.layers[1].num_batches_tracked.item() == before + 1
    assert saved.layers[1].momentum == 0.1
    assert saved.layers[4].momentum is None


def test_c14_frozen_stats_protects_own_passes_also_on_an_exception():
    model = normed("batch")
    x, _ = batch()
    model(x)
    before = model_bits(model)
    with frozen_stats(model):
        model(x + 1)
        assert model_bits(model) != before
    assert model_bits(model) == before
    with pytest.raises(ZeroDivisionError), frozen_stats(model):
        model(x + 1)
        1 / 0  # noqa: B018
    assert model_bits(model) == before
    model(x)
    assert model_bits(model) != before


def test_c14_expanded_and_replaced_buffers():
    model = nn.Linear(2, 1)
    model.register_buffer("wide", torch.zeros(1).expand(5))
    model.register_buffer("count", torch.zeros(()))
    count = model.count
    with frozen_stats(model):
        model.count += 1
        model.register_buffer("new", torch.ones(1))
        del model.wide
    assert model.count is count
    assert count.item() == 0
    assert list(model._buffers) == ["wide", "count"]


@every_drive
def test_parameters_of_other_optimizers_get_one_ordinary_gradient(drive):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    mine, others = list(model.parameters())[:4], list(model.parameters())[4:]
    optimizer = SAM(torch.optim.SGD(mine, lr=0.0), rho=1.0, model=model)
    train(model, optimizer, DRIVES[drive], 1)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.0), plain, 1)
    for p, q in zip(others, list(twin.parameters())[4:], strict=True):
        assert bits([p.grad]) == bits([q.grad])


def test_an_interrupt_while_the_second_pass_is_prepared_leaves_what_the_first_one_left(monkeypatch):
    model, twin = net(), net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=1.0, model=model)
    train(model, optimizer, by_closure, 1)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.0), plain, 1)
    with monkeypatch.context() as patched:
        patched.setattr(passes.OtherGradients, "clear", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, by_closure, 1, start=1)
    x, _ = batch(1)
    twin(x)
    assert model_bits(model) == model_bits(twin)
    assert all(p.grad is not None for p in model.parameters())


# C17 in the explicit loop; the rest of it is to come.


@pytest.mark.parametrize("overflow", [None, 0, 1])
def test_c17_a_loss_scaler_in_the_explicit_loop(overflow):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer = SAM(BASES["momentum"](model.parameters()), rho=0.1, model=model)
    unscaled = SAM(BASES["momentum"](twin.parameters()), rho=0.1, model=twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        before = bits(model.parameters())
        x, y = batch(step)
        for sam_pass in optimizer.passes():
            with sam_pass:
                loss = F.cross_entropy(model(x), y)
                if step == 1 and overflow == int(sam_pass.is_perturbed):
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 1 and overflow is not None:
            assert bits(model.parameters()) == before
            assert scaler.get_scale() == 2.0**9
    for step in range(3):
        if overflow is None or step != 1:
            x, y = batch(step)
            for sam_pass in unscaled.passes():
                with sam_pass:
                    F.cross_entropy(twin(x), y).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            unscaled.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("enabled", [True, False])
def test_c17_a_scaler_that_calls_with_a_closure_is_refused_if_it_scales(enabled):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # which wraps step()
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)

    def closure():
        optimizer.zero_grad()
        loss = scaler.scale(w.square().sum())
        loss.backward()
        return loss

    closure()
    if not enabled:
        scaler.step(optimizer, closure)
        assert w.tolist() != [1.0, 2.0]
        return
    with pytest.raises(RuntimeError, match="multiplied by its scale"):
        scaler.step(optimizer, closure)
    assert w.tolist() == [1.0, 2.0]


@every_drive
def test_c15_the_second_pass_sees_the_same_masks(drive):
    masks = []
    for replay in (True, False):
        w = nn.Parameter(torch.ones(64))
        optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=0.1, replay_rng=replay)
        seen = []

        def loss(w=w, seen=seen):
            seen.append(F.dropout(torch.ones(64), 0.5))
            return (w * seen[-1]).sum()

        DRIVES[drive](optimizer, loss)
        masks.append(torch.equal(*seen))
    assert masks == [True, False]


@every_drive
def test_c15_all_generators_are_left_as_one_pass_would(drive):
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=0.1)
    seen = []

    def seed():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    seed()
    DRIVES[drive](optimizer, lambda: (seen.append(draw()), w.sum())[1])
    after = draw()
    seed()
    assert seen == [draw()] * 2
    assert after == draw()


@pytest.mark.parametrize("drive", ["closure", "passes", "classic"])
def test_c16_an_open_autocast_region_does_not_reuse_casts_of_w(drive):
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=1.0, model=model)
    x = torch.randn(4, 8)
    losses = []

    def loss():
        losses.append(model(x).float().square().mean())
        return losses[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        DRIVES[drive](optimizer, loss)
        loss()
    at_w, climbed, again = (v.item() for v in losses)
    assert climbed > at_w * 1.05, "the climb was not seen"
    assert again == at_w, "the way back was not seen"


# C18: not finite.


@every_drive
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, "both"])
@pytest.mark.parametrize("base", BASES)
def test_c18_a_gradient_that_is_not_finite_skips_the_step(base, which, bad, drive):
    model = net(dropout=0.0)
    optimizer = SAM(BASES[base](model.parameters()), rho=0.1, model=model)
    train(model, optimizer, DRIVES[drive], 2)
    weights, state = bits(model.parameters()), copy.deepcopy(optimizer.state_dict())
    x, y = batch(5)
    calls = []

    def loss():
        calls.append(1)
        factor = bad if which in (len(calls) - 1, "both") else 1.0
        return F.cross_entropy(model(x), y) * factor

    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        DRIVES[drive](optimizer, loss)
    assert bits(model.parameters()) == weights
    assert str(optimizer.state_dict()) == str(state)
    assert optimizer.skipped_steps == 1
    train(model, optimizer, DRIVES[drive], 1)
    assert optimizer.skipped_steps == 1
    assert bits(model.parameters()) != weights


@every_drive
def test_c18_no_rule_remembers_a_gradient_that_is_not_finite(drive):
    model = net(dropout=0.0)
    optimizer = build("sgd", model)  # a rule with a memory, at every second step
    x, y = batch()
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(model(x), y) * float("nan"))
    train(model, optimizer, DRIVES[drive], 3)
    assert optimizer.skipped_steps == 1
    memory = [value for name, value in optimizer.state_dict()["state"][0].items() if name.startswith("sam.")]
    assert memory
    assert all(value.isfinite().all() for value in memory)


def test_c18_a_loss_that_hides_the_nan_in_the_second_pass_is_still_skipped():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss = (w * float("inf")).sum() if not sam_pass.is_perturbed else w.nan_to_num(0.0).sum()
            loss.backward()
    assert not torch.isfinite(w.grad).all(), "a scaler looks at .grad: it must see what the first pass was"
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    assert w.tolist() == [1.0, 2.0]


# C19: accumulation.


def micro_batches(parts: int = 3):
    x, y = batch(n=12)
    return list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def linear(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_c19_micro_batches_in_both_passes_equal_one_big_batch(drive):
    whole, parts = linear(), linear()
    x, y = batch(n=12)
    optimizer = SAM(BASES["momentum"](whole.parameters()), rho=0.2)
    accumulating = SAM(BASES["momentum"](parts.parameters()), rho=0.2)

    def backward():
        for mx, my in micro_batches():
            (F.cross_entropy(parts(mx.double()), my) / 3).backward()

    for _ in range(4):
        by_closure(optimizer, lambda: F.cross_entropy(whole(x.double()), y))
        if drive == "passes":
            for sam_pass in accumulating.passes():
                with sam_pass:
                    backward()
            accumulating.step()
        else:
            accumulating.step(lambda: (accumulating.zero_grad(), backward())[0])
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_c19_a_perturbation_for_each_micro_batch_is_its_own_option():
    model, reference = linear(), linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.2)
    for index, (x, y) in enumerate(micro_batches()):
        for sam_pass in optimizer.passes(accumulate=index > 0):
            with sam_pass:
                (F.cross_entropy(model(x.double()), y) / 3).backward()
    optimizer.step()

    params = list(reference.parameters())
    total = [torch.zeros_like(p) for p in params]
    for x, y in micro_batches():
        g = torch.autograd.grad(F.cross_entropy(reference(x.double()), y), params)
        n = torch.cat([t.reshape(-1) for t in g]).norm()
        shifted = copy.deepcopy(reference)
        with torch.no_grad():
            for p, d in zip(shifted.parameters(), g, strict=True):
                p += 0.2 * d / n
        up = torch.autograd.grad(F.cross_entropy(shifted(x.double()), y), list(shifted.parameters()))
        total = [t + u / 3 for t, u in zip(total, up, strict=True)]
    for p, q, t in zip(model.parameters(), params, total, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * t, rtol=1e-12, atol=1e-12)


def test_c19_gradients_accumulated_before_the_closure_are_refused():
    model = linear()
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=0.2)
    (x0, y0), (x1, y1), _ = micro_batches()

    def closure():  # as a framework's: it does not clear what was accumulated
        loss = F.cross_entropy(model(x1.double()), y1)
        loss.backward()
        return loss

    for step in range(2):
        F.cross_entropy(model(x0.double()), y0).backward()
        before = bits(model.parameters())
        with pytest.raises(RuntimeError, match=r"accumulated before step\(closure\)"):
            optimizer.step(closure)
        assert bits(model.parameters()) == before
        optimizer.zero_grad()
        optimizer.step(closure)  # nothing accumulated: fine
        optimizer.step(closure)  # what our own step left does not count, and is cleared
        assert step in (0, 1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_c19_stale_gradients_that_the_closure_clears_are_fine(set_to_none):
    model, twin = linear(), linear()
    optimizer, other = (SAM(BASES["sgd"](m.parameters()), rho=0.2) for m in (model, twin))
    (x, y), (stale_x, stale_y), _ = micro_batches()
    F.cross_entropy(model(stale_x.double()), stale_y).backward()

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = F.cross_entropy(model(x.double()), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    by_closure(other, lambda: F.cross_entropy(twin(x.double()), y))
    assert bits(model.parameters()) == bits(twin.parameters())


# C20: clipping.


def test_c20_clipping_applies_to_what_goes_down_and_not_to_the_climb():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=1.0)
    seen = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            seen.append(w.detach().clone())
            w.square().sum().backward()
    nn.utils.clip_grad_norm_([w], 0.5)
    optimizer.step()
    torch.testing.assert_close(seen[1], torch.tensor([3.6, 4.8], dtype=torch.float64))
    torch.testing.assert_close(w.detach(), torch.tensor([3.0 - 0.3, 4.0 - 0.4], dtype=torch.float64), atol=1e-6, rtol=0)


def test_c20_clipping_by_norm_inside_the_closure_does_not_change_the_climb():
    seen = []
    for clip in (1e9, 0.5):
        w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=1.0)

        def closure(w=w, optimizer=optimizer, clip=clip):
            optimizer.zero_grad()
            seen.append(w.detach().clone())
            loss = w.square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_([w], clip)
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(seen[1], seen[3])


def test_a_combination_gets_both_gradients_and_zeros_where_one_is_missing():
    class Sum:
        needs_unperturbed_gradient = True

        def __call__(self, point, perturbed):
            if perturbed is None:
                return point.gradients
            return [g + 10 * g_s for g, g_s in zip(point.gradients, perturbed, strict=True)]

    a, b = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([3.0]))
    optimizer = SAM(torch.optim.SGD([a, b], lr=1.0), rho=0.0, combination=Sum(), cadence=steppe.Periodic(2))
    for sam_pass in optimizer.passes():
        with sam_pass:
            (a + b if not sam_pass.is_perturbed else a * 2).sum().backward()
    assert (a.grad.item(), b.grad.item()) == (21.0, 1.0)
    optimizer.step()
    by_passes(optimizer, lambda: (a + b).sum())
    assert (a.grad.item(), b.grad.item()) == (1.0, 1.0)


def test_warnings_point_at_the_users_own_line():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it wraps step() once more
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        w.grad = torch.ones(2)
        optimizer.step()
        optimizer.step(lambda: (optimizer.zero_grad(), (w * float("nan")).sum().backward())[0])
    assert [(c.category, c.filename) for c in caught] == [(UserWarning, __file__), (RuntimeWarning, __file__)]


def test_nothing_warns_in_an_ordinary_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = net()
        train(model, SAM(BASES["adamw"](model.parameters()), model=model), by_closure, 2)
