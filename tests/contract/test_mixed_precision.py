"""Contract C17: loss scaling and autocast change nothing but the precision, in each of the three APIs."""

import contextlib
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from named_methods import RULE_METHODS, build

import steppe
from support import BASES, DRIVES, batch, bits, each_in_turn, model_bits, net

every_method = pytest.mark.parametrize("name", RULE_METHODS)


def growing_scaler(**options) -> torch.amp.GradScaler:
    """Return a scaler whose scale doubles at every second step; powers of two round no gradient."""
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 2, **options})


def take_step(optimizer, scaler) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)


def make_optimizer(name, base, model, **more) -> steppe.SAM:
    return build(name, base, **more)(model)


def trained(name, base="momentum", drive="passes", *, scaler=None, pass_scaler=True, steps=7):
    model = net()
    optimizer = make_optimizer(name, base, model, scaler=scaler if pass_scaler else None)
    for t in range(steps):
        x, y = batch(t)
        scale = scaler.scale if scaler else lambda loss: loss
        if drive == "closure":

            def closure(x=x, y=y, scale=scale, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                scale(loss).backward()
                return loss

            optimizer.step(closure)
        elif drive == "passes":
            for sam_pass in optimizer.passes():
                with sam_pass:
                    scale(F.cross_entropy(model(x), y)).backward()
            take_step(optimizer, scaler)
        else:
            optimizer.zero_grad()
            scale(F.cross_entropy(model(x), y)).backward()
            optimizer.first_step(zero_grad=True)
            scale(F.cross_entropy(model(x), y)).backward()
            take_step(optimizer, scaler)
        if scaler:
            scaler.update()
    assert scaler is None or scaler.get_scale() == 2.0**13
    return model_bits(model)


@pytest.mark.parametrize(
    ("name", "drive"),
    each_in_turn(RULE_METHODS, ["passes", "closure"]),
)
def test_changing_loss_scale_changes_no_bit(name, drive):
    assert trained(name, scaler=growing_scaler(), drive=drive) == trained(name, drive=drive)


@pytest.mark.parametrize("name", ["sam", "asam", "gsam", "wsam", "looksam", "friendly_sam", "aesam"])
def test_changing_loss_scale_changes_no_bit_in_the_classic_api(name):
    assert trained(name, scaler=growing_scaler(), drive="classic") == trained(name, drive="classic")


def test_step_after_one_that_the_scaler_has_skipped_needs_no_zero_grad():
    """The shortest loop: the closure returns the loss, and the scaler begins with a scale that is too large."""
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.5, scaler=scaler)
    for factor in (1.0, math.inf, math.inf, 1.0):
        optimizer.step(lambda factor=factor: factor * w.sum())
        scaler.update()
    torch.testing.assert_close(w.detach(), torch.tensor([2.8, 3.8]))
    assert scaler.get_scale() == 2.0**8


@pytest.mark.parametrize("name", ["sam", "asam", "gsam", "zsharp", "looksam", "sam_on"])
def test_scale_free_rules_need_no_scaler_argument(name):
    assert trained(name, scaler=growing_scaler(), pass_scaler=False) == trained(name)


@pytest.mark.parametrize("name", ["friendly_sam", "vasso", "fisher_sam", "aesam", "unified_sam", "le_sam", "sagm"])
def test_rules_that_depend_on_the_gradient_size_raise_without_scaler_argument(name):
    with pytest.raises(RuntimeError, match=r"depends on the size of the gradients.*scaler=scaler"):
        trained(name, scaler=growing_scaler(), pass_scaler=False)


@every_method
def test_scale_free_attribute_is_true_exactly_for_scale_free_rules(name):
    """A rule has scale_free exactly if gradients times a power of two give the same perturbation."""
    torch.manual_seed(0)
    parameters = [torch.randn(4, 3), torch.randn(5)]
    optimizer = make_optimizer(name, "momentum", torch.nn.Sequential(torch.nn.LayerNorm(2)))
    rule = optimizer.perturbation
    rule = rule.rule if name == "sam_on" else rule
    state = [{"momentum_buffer": torch.ones_like(p)} for p in parameters]
    memories = {}, {}
    for t in range(3):
        g = [torch.randn_like(p) for p in parameters]
        perturbations = []
        for size, memory in zip((1.0, 2.0 ** (9 + t)), memories, strict=True):
            scaled = [size * part for part in g]
            point = steppe.Point(parameters, scaled, [0.1] * 2, state, step=t, memory=memory)
            direction, scale = rule(point)
            perturbations.append(torch.cat([torch.zeros(0) if d is None else (scale * d).flatten() for d in direction]))
            if name in ("stale_sam", "arwp", "mixed_arwp"):  # the combination keeps something for the next perturbation
                kept = scaled if getattr(optimizer.combination, "scale_free", False) else g  # as the engine gives it
                optimizer.combination(dataclasses.replace(point, gradients=kept), kept)
    same = torch.allclose(*perturbations, rtol=1e-6)
    assert same == getattr(rule, "scale_free", False)


class ClampedSum(steppe.methods.wsam.WeightedSharpness):
    """A combination that depends on the size of the gradients, and so is not scale-free."""

    scale_free = False

    def __call__(self, point, perturbed):
        return [g + s.clamp(max=0.01) for g, s in zip(point.gradients, perturbed, strict=True)]


def test_combination_that_depends_on_the_gradient_size_receives_unscaled_gradients():
    results = []
    for scaler in (None, growing_scaler()):
        model = net()
        base = BASES["momentum"](model.parameters())
        optimizer = steppe.SAM(base, rho=0.1, model=model, combination=ClampedSum(), scaler=scaler)
        for t in range(3):
            x, y = batch(t)
            for sam_pass in optimizer.passes():
                with sam_pass:
                    loss = F.cross_entropy(model(x), y)
                    (scaler.scale(loss) if scaler else loss).backward()
            take_step(optimizer, scaler)
            _ = scaler and scaler.update()
        results.append(model_bits(model))
    assert results[0] == results[1]


@pytest.mark.parametrize("base", BASES)
def test_accumulation_clipping_and_a_schedule_with_loss_scaler_change_no_bit(base):
    results = []
    for scaler in (None, growing_scaler()):
        model = net()
        optimizer = make_optimizer("sam", base, model, scaler=scaler)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for t in range(5):
            x, y = batch(t)
            for sam_pass in optimizer.passes():
                with sam_pass:
                    for a, b in zip(x.chunk(3), y.chunk(3), strict=True):
                        loss = F.cross_entropy(model(a), b) / 3
                        (scaler.scale(loss) if scaler else loss).backward()
            _ = scaler and scaler.unscale_(optimizer)
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
            take_step(optimizer, scaler)
            _ = scaler and scaler.update()
            schedule.step()
        results.append(model_bits(model))
    assert results[0] == results[1]


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_equals_a_hand_written_loop(dtype, drive):
    """The reference makes two passes under autocast and computes everything else in float32."""
    scaler = growing_scaler(enabled=dtype is torch.float16)
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer = make_optimizer("sam", "momentum", model, scaler=scaler)
    base = BASES["momentum"](twin.parameters())
    parameters = list(twin.parameters())

    def loss(network, x, y):
        with torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(network(x), y)

    for t in range(3):
        x, y = batch(t)
        if drive == "closure":

            def closure(x=x, y=y):
                optimizer.zero_grad()
                value = loss(model, x, y)
                scaler.scale(value).backward()
                return value

            optimizer.step(closure)
        else:
            DRIVES[drive](_Scaled(optimizer, scaler), lambda x=x, y=y: scaler.scale(loss(model, x, y)))
        scaler.update()

        scale = 2.0 ** (10 + t // 2) if scaler.is_enabled() else 1.0
        w = [p.detach().clone() for p in parameters]
        buffers = {k: b.clone() for k, b in twin.named_buffers()}
        g = [d / scale for d in torch.autograd.grad(loss(twin, x, y) * scale, parameters)]
        after = {k: b.clone() for k, b in twin.named_buffers()}
        length = torch.cat([d.double().flatten() for d in g]).norm()
        with torch.no_grad():
            for p, d in zip(parameters, g, strict=True):
                p.add_(d * (0.1 / length).float())
            for k, b in twin.named_buffers():
                b.copy_(buffers[k])
        g_s = torch.autograd.grad(loss(twin, x, y) * scale, parameters)
        with torch.no_grad():
            for p, value, d in zip(parameters, w, g_s, strict=True):
                p.copy_(value)
                p.grad = d / scale
            for k, b in twin.named_buffers():
                b.copy_(after[k])
        base.step()
    for (key, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


class _Scaled:
    """An optimizer whose step() is scaler.step(optimizer)."""

    def __init__(self, optimizer, scaler):
        self._optimizer, self._scaler = optimizer, scaler

    def __getattr__(self, name):
        return getattr(self._optimizer, name)

    def step(self):
        self._scaler.step(self._optimizer)

    second_step = step


@pytest.mark.parametrize("overflow", ["w", "w + e"])
@pytest.mark.parametrize("drive", ["passes", "closure"])
@pytest.mark.parametrize("name", ["sam", "gsam", "friendly_sam", "looksam"])
def test_overflow_in_either_pass_skips_the_step_and_halves_the_scale(name, drive, overflow):
    model = net()
    scaler = growing_scaler(growth_interval=100)
    optimizer = make_optimizer(name, "momentum", model, scaler=scaler, **({"interval": 1} if name == "looksam" else {}))
    calls = []

    def run(bad):
        calls.clear()
        x, y = batch(len(calls))

        def closure():
            optimizer.zero_grad()
            is_perturbed = optimizer.current_pass.is_perturbed
            calls.append(is_perturbed)
            overflows = bad and is_perturbed == (overflow == "w + e")
            loss = F.cross_entropy(model(x), y) * (float("inf") if overflows else 1.0)
            scaler.scale(loss).backward()
            return loss

        if drive == "closure":
            optimizer.step(closure)
        else:
            for sam_pass in optimizer.passes():
                with sam_pass:
                    closure()
            scaler.step(optimizer)
        scaler.update()

    run(bad=False)
    weights, state = bits(model.parameters()), str(optimizer.base.state_dict())
    run(bad=True)
    assert bits(model.parameters()) == weights
    assert str(optimizer.base.state_dict()) == state
    assert "nan" not in str(optimizer.state_dict()), "no rule memory holds it"
    assert "inf" not in str(optimizer.state_dict())
    assert scaler.get_scale() == 2.0**9
    run(bad=False)
    assert bits(model.parameters()) != weights
    assert calls == [False, True]
    assert scaler.get_scale() == 2.0**9


def test_hooks_fire_once_a_step_with_loss_scaler():
    model = net()
    scaler = growing_scaler()
    optimizer = make_optimizer("sam", "sgd", model, scaler=scaler)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.base.register_step_post_hook(lambda *_: calls.append("base"))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch()[0]), batch()[1])
        scaler.scale(loss).backward()
        return loss

    assert torch.isfinite(optimizer.step(closure))
    assert calls == ["before", "base", "after"]


def test_step_with_scaled_gradients_raises():
    model = net()
    scaler = growing_scaler()
    optimizer = make_optimizer("sam", "sgd", model, scaler=scaler)
    before = bits(model.parameters())
    for sam_pass in optimizer.passes():
        with sam_pass:
            scaler.scale(F.cross_entropy(model(batch()[0]), batch()[1])).backward()
    with pytest.raises(RuntimeError, match=r"still multiplied.*scaler\.step\(optimizer\)"):
        optimizer.step()
    assert bits(model.parameters()) == before
    scaler.step(optimizer)
    assert bits(model.parameters()) != before


@pytest.mark.parametrize("which", ["fraction", "selected", "micro_batches"])
def test_closures_that_choose_data_scale_their_losses(which):
    results = []
    for scaler in (None, growing_scaler()):
        model = net(dropout=0.0)
        optimizer = make_optimizer("friendly_sam", "momentum", model, scaler=scaler)
        reduction = "none" if which == "selected" else "mean"
        loss = lambda x, y, m=model, r=reduction: F.cross_entropy(m(x), y, reduction=r)  # noqa: E731
        for t in range(5):
            if which == "micro_batches":
                steppe.closures.micro_batches(optimizer, loss, batch(t), m=4)
            else:
                optimizer.step(getattr(steppe.closures, which)(optimizer, loss, batch(t)))
            _ = scaler and scaler.update()
        results.append(model_bits(model))
    assert results[0] == results[1]


def classic_step(optimizer, scaler, loss, *, proxy):
    scaler.scale(loss()).backward()
    scaler.unscale_(proxy)
    optimizer.first_step(zero_grad=True)


def loop_over_passes(optimizer, scaler, loss, *, proxy):
    for sam_pass in optimizer.passes():
        with sam_pass:
            scaler.scale(loss()).backward()
            if sam_pass.is_first:
                scaler.unscale_(proxy)


def loop_with_one_indentation_too_many(optimizer, scaler, loss, *, proxy):
    for sam_pass in optimizer.passes():
        with sam_pass:
            scaler.scale(loss()).backward()
        scaler.unscale_(proxy)


def micro_batches_unscaled_one_by_one(optimizer, scaler, loss, *, proxy):
    for _ in range(2):
        for sam_pass in optimizer.passes(accumulate=True):
            with sam_pass:
                scaler.scale(loss()).backward()
        scaler.unscale_(proxy)


def step_by_closure(optimizer, scaler, loss, *, proxy):
    def closure():
        optimizer.zero_grad()
        value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(proxy)
        return value

    optimizer.step(closure)


class Delegates:
    """Looks everything up in the optimizer, as Accelerate's wrapper does."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


@pytest.mark.parametrize("proxy", [lambda optimizer: optimizer, Delegates])
@pytest.mark.parametrize("with_scaler", [False, True])
@pytest.mark.parametrize(
    "drive",
    [
        classic_step,
        loop_over_passes,
        loop_with_one_indentation_too_many,
        micro_batches_unscaled_one_by_one,
        step_by_closure,
    ],
)
@pytest.mark.parametrize("kind", ["sam", "late_sam", "compat"])
def test_unscaling_before_the_last_pass_raises(kind, drive, with_scaler, proxy):
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    scaler = growing_scaler()
    options = {"scaler": scaler} if with_scaler else {}
    if kind == "compat":
        optimizer = steppe.compat.SAM([w], torch.optim.SGD, lr=0.1, **options)
    elif kind == "late_sam":  # a single pass in the first steps
        optimizer = steppe.variants.late_sam(torch.optim.SGD([w], lr=0.1), total_steps=100, **options)
    else:
        optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), **options)
    proxied = proxy(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(optimizer\) was called .*once a step.*after the last pass"):
        drive(optimizer, scaler, lambda: w.square().sum(), proxy=proxied)
    assert w.tolist() == [3.0, 4.0]
    with contextlib.suppress(AssertionError):  # where the call that was refused has not unscaled anything
        scaler.update()
    optimizer.zero_grad()
    for sam_pass in optimizer.passes():
        with sam_pass:
            scaler.scale(w.sum()).backward()
    scaler.unscale_(proxied)
    take_step(proxied, scaler)
    torch.testing.assert_close(w.detach(), torch.tensor([2.9, 3.9]))


def test_step_whose_gradients_were_unscaled_and_skipped_does_not_affect_the_next_one():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    scaler = growing_scaler()
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1))
    for _ in range(2):
        for sam_pass in optimizer.passes():
            with sam_pass:
                scaler.scale(w.sum()).backward()
        scaler.unscale_(optimizer)  # and no step
        scaler.update()
        optimizer.zero_grad()
    scaler.scale(w.sum()).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(w.sum()).backward()
    scaler.unscale_(optimizer)
    take_step(optimizer, scaler)
    torch.testing.assert_close(w.detach(), torch.tensor([2.9, 3.9]))
