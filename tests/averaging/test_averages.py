"""The averages: what they are made of, by every way to drive a step, and what they refuse."""

import copy
import gc
import pickle
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from named_methods import WRAPPERS, build
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import steppe
from steppe.averaging import EMA, SWA, LastPart, from_name
from steppe.methods.bsam import BSAM
from steppe.methods.lookbehind_sam import Lookbehind
from steppe.methods.sampa import SAMPa
from steppe.methods.wsam import DecoupledWSAM
from support import (
    BASES,
    DRIVES,
    batch,
    bits,
    by_closure,
    by_passes,
    model_bits,
    net,
    parameter,
    plain,
    saved_and_loaded,
)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def sam(model, **options):
    return steppe.SAM(BASES["momentum"](model.parameters()), rho=0.5, model=model, **options)


def steps(model, optimizer, drive, numbers):
    """Train, and yield after each step."""
    for number in numbers:
        x, y = batch(number)
        yield drive(optimizer, lambda x=x, y=y: F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


# What is averaged.


@pytest.mark.parametrize("drive", [*DRIVES, "plain"])
def test_average_of_each_drive_has_the_bits_of_torchs_updated_by_hand_after_each_step(drive):
    run = {**DRIVES, "plain": plain}[drive]
    model = net()
    optimizer = sgd(model) if drive == "plain" else sam(model)
    ema = EMA(model, optimizer, 0.9, warmup=False)
    swa = SWA(model, optimizer)
    by_hand = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    mean_by_hand = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    for _ in steps(model, optimizer, run, range(4)):
        by_hand.update_parameters(model)
        mean_by_hand.update_parameters(model)
    assert bits(ema.module.parameters()) == bits(by_hand.module.parameters()) != bits(model.parameters())
    assert bits(swa.module.parameters()) == bits(mean_by_hand.module.parameters())
    assert int(ema.n_averaged) == int(by_hand.n_averaged) == 4


@pytest.mark.parametrize(
    "name", [*WRAPPERS, "lookbehind of 2", "sampa", "decoupled wsam", "bsam"], ids=lambda n: n.replace(" ", "-")
)
def test_each_method_is_averaged_once_a_step_at_the_weights_between_steps(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    made = {
        "lookbehind of 2": lambda: Lookbehind(sgd(model), 0.1, ascent_steps=2, model=model),
        "sampa": lambda: SAMPa(sgd(model), 0.1, model=model),
        "decoupled wsam": lambda: DecoupledWSAM(sgd(model), 0.1, gamma=0.8, model=model),
        "bsam": lambda: BSAM(model.parameters(), 0.05, n_data=500, rho=0.1, model=model),
    }
    optimizer = made[name]() if name in made else build(name, "momentum")(model)
    averaged = SWA(model, optimizer)
    seen, x = [], torch.linspace(-1, 1, 12).reshape(4, 3)
    for _ in range(4):
        by_closure(optimizer, lambda: (model(x) - x[:, :2]).square().mean())
        seen.append(weights(model))
    for mine, *theirs in zip(averaged.module.parameters(), *seen, strict=True):
        torch.testing.assert_close(mine.detach(), torch.stack(theirs).mean(0))
    assert int(averaged.n_averaged) == 4


def test_swa_averages_each_nth_step_after_its_start_and_follows_the_weights_before():
    w = parameter(0.0)
    model = nn.ParameterList([w])
    optimizer = torch.optim.SGD([w], lr=1.0)
    averaged = SWA(model, optimizer, start=2, every=2)
    found = []
    for _ in range(8):  # w is -1, -2, ..., -8
        w.grad = torch.ones(1)
        optimizer.step()
        found.append(averaged.module[0].item())
    assert found == [-1, -2, -3, -4, -4, -5, -5, -6]


def test_last_part_is_the_mean_over_the_share_of_the_last_steps():
    w = parameter(0.0)
    model = nn.ParameterList([w])
    optimizer = torch.optim.SGD([w], lr=1.0)
    averaged = LastPart(model, optimizer, total_steps=10, share=0.3)
    for _ in range(10):
        w.grad = torch.ones(1)
        optimizer.step()
    assert averaged.module[0].item() == -9.0  # of -8, -9, -10
    assert LastPart(model, optimizer, total_steps=2, share=0.01).start == 1  # at least the last step


def test_warmup_gives_the_first_weights_no_large_share():
    w = parameter(100.0)
    model = nn.ParameterList([w])
    optimizer = torch.optim.SGD([w], lr=1.0)
    slow, warm = EMA(model, optimizer, warmup=False), EMA(model, optimizer)
    expected = 99.0
    for n in range(50):
        w.grad = torch.ones(1) if n == 0 else (w.detach() > 1).float() * w.detach() / 2
        optimizer.step()
        expected += (w.item() - expected) * (1 - (1 + n) / (10 + n)) if n else 0.0
    assert warm.module[0].item() == pytest.approx(expected, rel=1e-4)
    assert warm.module[0].item() < 3 < 90 < slow.module[0].item()


def test_accumulated_micro_batches_are_one_step():
    model = net()
    optimizer = sam(model)
    averaged = SWA(model, optimizer)
    for number in range(2):
        for sam_pass in optimizer.passes():
            with sam_pass:
                for part in range(3):
                    x, y = batch(3 * number + part)
                    F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for accumulate in (False, True):
        x, y = batch(7)
        for sam_pass in optimizer.passes(accumulate=accumulate):
            with sam_pass:
                F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert int(averaged.n_averaged) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_average_of_weights_in_half_precision_is_in_float32(dtype):
    w = parameter(1.0, dtype=dtype)
    model = nn.ParameterList([w])
    optimizer = torch.optim.SGD([w], lr=1.0)
    averaged = EMA(model, optimizer, 0.999, warmup=False)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    w.data.fill_(1.125)
    for _ in range(100):
        optimizer.step()
    assert averaged.module[0].dtype == torch.float32
    assert averaged.module[0].item() == pytest.approx(1.125 - 0.125 * 0.999**100, abs=1e-6)
    with averaged.applied():
        assert w.dtype == dtype
        assert w.item() == pytest.approx(averaged.module[0].item(), rel=1e-2)


def test_parameters_of_several_types_and_complex_ones_are_averaged():
    model = nn.ParameterDict(
        {"a": parameter(1.0, dtype=torch.float64), "b": parameter(1.0), "c": nn.Parameter(torch.tensor([1.0 + 2.0j]))}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averaged = SWA(model, optimizer)
    for _ in range(3):
        for p in model.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert {name: p.item() for name, p in averaged.module.items()} == {"a": -1.0, "b": -1.0, "c": -1.0 + 2.0j}
    assert averaged.module["a"].dtype == torch.float64


def test_tied_parameters_are_averaged_once_and_stay_tied():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    seen = []
    for _ in range(3):
        plain(optimizer, lambda: model(torch.ones(1, 2)).square().sum())
        seen.append(model[0].weight.detach().clone())
    assert averaged.module[0].weight is averaged.module[1].weight
    torch.testing.assert_close(averaged.module[0].weight.detach(), torch.stack(seen).mean(0))


# Buffers.


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls = self.calls + 1
        if self.calls == 2:
            self.register_buffer("late", torch.ones(3))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, -torch.inf]))
        return self.norm(x)


def test_running_statistics_are_averaged_and_all_other_buffers_copied():
    model = WithBuffers()
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    means = []
    for number in range(3):
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(number))
        plain(optimizer, lambda x=x: model(x).square().sum())
        means.append(model.norm.running_mean.clone())
    module = averaged.module
    torch.testing.assert_close(module.norm.running_mean, torch.stack(means).mean(0))
    assert module.mask.tolist() == [0.0, -torch.inf, -torch.inf]  # a mean of -inf would be NaN
    assert module.late.tolist() == [1.0, 1.0, 1.0]
    assert int(module.calls) == int(module.norm.num_batches_tracked) == 3


# Steps that are none.


@pytest.mark.parametrize("drive", DRIVES)
def test_step_that_sam_skips_is_not_averaged(drive):
    w = parameter(1.0, 2.0)
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    averaged = SWA(nn.ParameterList([w]), optimizer)
    DRIVES[drive](optimizer, lambda: w.square().sum())
    with pytest.warns(RuntimeWarning, match="not finite"):
        DRIVES[drive](optimizer, lambda: w.square().sum() * float("nan"))
    assert int(averaged.n_steps) == int(averaged.n_averaged) == 1
    DRIVES[drive](optimizer, lambda: w.square().sum())
    assert int(averaged.n_averaged) == 2


@pytest.mark.parametrize("kind", ["plain", "fused", "passes", "closure"])
def test_step_that_a_loss_scaler_skips_is_not_averaged(kind):
    w = parameter(1.0, 2.0)
    model = nn.ParameterList([w])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    base = torch.optim.SGD([w], lr=0.1, fused=kind == "fused")
    if kind in ("plain", "fused"):
        optimizer = base
    else:
        optimizer = steppe.SAM(base, rho=0.1, scaler=scaler if kind == "closure" else None)
    averaged = SWA(model, optimizer)
    for factor in (1.0, float("inf"), 1.0):
        if kind == "closure":
            by_closure_with = lambda: scaler.scale(w.square().sum() * factor)  # noqa: B023, E731

            def closure(loss=by_closure_with):
                optimizer.zero_grad()
                loss().backward()

            optimizer.step(closure)
        elif kind == "passes":
            for sam_pass in optimizer.passes():
                with sam_pass:
                    scaler.scale(w.square().sum() * factor).backward()
            scaler.step(optimizer)
        else:
            optimizer.zero_grad()
            scaler.scale(w.square().sum() * factor).backward()
            scaler.step(optimizer)
        scaler.update()
    assert int(averaged.n_averaged) == 2


def test_step_without_learning_rate_is_not_averaged():
    w = parameter(1.0)
    optimizer = torch.optim.SGD([w], lr=torch.tensor(0.0))
    averaged = SWA(nn.ParameterList([w]), optimizer)
    w.grad = torch.ones(1)
    optimizer.step()
    assert int(averaged.n_steps) == 0
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert int(averaged.n_steps) == 1


def test_plain_step_of_sam_is_averaged():
    w = parameter(1.0)
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=1.0), rho=0.1)
    averaged = SWA(nn.ParameterList([w]), optimizer)
    w.grad = torch.ones(1)
    with pytest.warns(UserWarning, match="plain step"):
        optimizer.step()
    assert averaged.module[0].item() == 0.0
    assert int(averaged.n_averaged) == 1


# Interrupts, and calls in the middle of a step.


class Interrupt(BaseException):
    pass


SOURCE = str(Path(steppe.__file__).parent) + "/"
OF_AVERAGES = (SOURCE + "averaging/", SOURCE + "_engine/completed_steps.py")


def interrupted(step, at, source=OF_AVERAGES):
    """Take a step, raise at a line event (by its number); return the number of lines."""
    count = 0

    def local(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            if count - 1 == at:
                sys.settrace(None)
                raise Interrupt
        return local

    before = sys.gettrace()
    gc.disable()
    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename.startswith(source) else None)
    try:
        step()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
        gc.enable()
    return count


# an interrupt in a loop over passes() that Python is closing is printed, not raised
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("drive", DRIVES)
def test_interrupt_at_any_line_leaves_an_average_of_completed_steps(drive):
    x = torch.linspace(-1, 1, 12).reshape(4, 3) ** 3

    def problem():
        torch.manual_seed(0)
        nn.modules.module._global_forward_pre_hooks.clear()
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
        optimizer = steppe.SAM(sgd(model), rho=0.5, model=model)
        averaged = EMA(model, optimizer, 0.5, warmup=False)
        step = lambda: DRIVES[drive](optimizer, lambda: (model(x) - x[:, :2]).square().mean())  # noqa: E731
        step()
        return model, averaged, step

    model, averaged, step = problem()
    before, w_before = bits(averaged.module.parameters()), bits(model.parameters())
    lines = {source: interrupted(problem()[2], None, source) for source in (SOURCE, OF_AVERAGES)}
    step()
    after, w_after = bits(averaged.module.parameters()), bits(model.parameters())
    assert before != after
    tried = [(OF_AVERAGES, at) for at in range(lines[OF_AVERAGES])]
    tried += [(SOURCE, at) for at in range(0, lines[SOURCE], 23)]
    for source, at in tried:
        model, averaged, step = problem()
        interrupted(step, at, source)
        found = bits(averaged.module.parameters())
        assert found in (before, after), at
        if found == after:
            assert bits(model.parameters()) == w_after
        elif bits(model.parameters()) == w_before:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "passes.. was called again before step")
                step()
            assert bits(averaged.module.parameters()) == after, at


@pytest.mark.parametrize("stage", ["pass", "between", "classic"])
def test_average_in_the_middle_of_a_step_raises(stage):
    w = parameter(3.0, 4.0)
    model = nn.ParameterList([w])
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    averaged = SWA(model, optimizer)
    calls = {
        "update_parameters": averaged.update_parameters,
        "applied": lambda: averaged.applied().__enter__(),
        "SWA": lambda: SWA(model, optimizer),
    }

    def check():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"^{name}.* was called .* the weights may be w \+ e"):
                call()

    if stage == "classic":
        w.square().sum().backward()
        optimizer.first_step(zero_grad=True)
        check()
        w.square().sum().backward()
        optimizer.second_step()
    else:
        for sam_pass in optimizer.passes():
            with sam_pass:
                w.square().sum().backward()
                if stage == "pass":
                    check()
            if stage == "between":
                check()
        optimizer.step()
    assert bits(averaged.module.parameters()) == bits([w])
    averaged.update_parameters()
    assert int(averaged.n_averaged) == 2


def test_base_of_a_sam_is_refused_before_and_after_it_was_wrapped():
    w = parameter(1.0)
    model, base = nn.ParameterList([w]), torch.optim.SGD([w], lr=0.1)
    averaged = SWA(model, base)
    optimizer = steppe.SAM(base, rho=0.1)
    with pytest.raises(TypeError, match="give the average the SAM itself"):
        SWA(model, base)
    with pytest.raises(TypeError, match="give the average the SAM itself"):
        by_passes(optimizer, lambda: w.square().sum())
    assert w.item() == 1.0
    del averaged
    by_passes(optimizer, lambda: w.square().sum())
    assert w.item() != 1.0


# The averaged weights in the model.


def test_applied_gives_the_model_the_average_and_restores_it_to_the_bit():
    model = net()
    optimizer = sam(model)
    averaged = EMA(model, optimizer, 0.9)
    list(steps(model, optimizer, by_passes, range(3)))
    before, average = model_bits(model), model_bits(averaged.module)
    storage = [p.data_ptr() for p in model.parameters()]
    with averaged.applied() as applied:
        assert applied is model
        assert model_bits(model) == average != before
        assert [p.data_ptr() for p in model.parameters()] == storage
    assert model_bits(model) == before
    with pytest.raises(ZeroDivisionError), averaged.applied():
        model.double()
        raise ZeroDivisionError
    assert model_bits(model.float()) == before
    assert model_bits(averaged.module) == average


def test_training_within_applied_raises_and_the_step_is_not_taken():
    model = net()
    optimizer = sam(model)
    averaged = SWA(model, optimizer)
    list(steps(model, optimizer, by_passes, range(2)))
    before = model_bits(model)
    with averaged.applied():
        for call in (averaged.update_parameters, lambda: averaged.applied().__enter__()):
            with pytest.raises(RuntimeError, match=r"within applied\(\)"):
                call()
        with pytest.raises(RuntimeError, match=r"step\(\) was called within applied\(\)"):
            list(steps(model, optimizer, by_closure, range(1)))
    assert model_bits(model) == before
    assert int(averaged.n_steps) == 2
    list(steps(model, optimizer, by_closure, range(1)))
    assert int(averaged.n_steps) == 3


def test_interrupt_at_any_line_within_applied_restores_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    for scale in (1.0, 2.0):
        plain(optimizer, lambda scale=scale: model(scale * torch.eye(2)).square().sum() + model[0].weight.sum())
    before = model_bits(model)

    def evaluate():
        with averaged.applied():
            assert model_bits(model) != before

    lines = interrupted(evaluate, None)
    for at in range(lines):
        interrupted(evaluate, at)
        assert model_bits(model) == before, at
    assert lines > 50
    assert not averaged.is_applied
    evaluate()


def test_call_runs_the_averaged_module():
    model = net()
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    list(steps(model, optimizer, plain, range(2)))
    averaged.eval()
    model.eval()
    x, _ = batch(9)
    assert bits([averaged(x)]) == bits([averaged.module(x)]) != bits([model(x)])
    with averaged.applied():
        assert bits([model(x)]) == bits([averaged(x)])


# Checkpoints and copies.


@pytest.mark.parametrize("make", [EMA, lambda m, o: SWA(m, o, start=2, every=2)], ids=["ema", "swa"])
def test_checkpoint_resumes_to_the_same_bits(make):
    def parts(seed):
        model = net(seed)
        optimizer = sam(model)
        return model, optimizer, make(model, optimizer)

    whole = parts(0)
    torch.manual_seed(1)
    list(steps(whole[0], whole[1], by_passes, range(7)))
    first = parts(0)
    torch.manual_seed(1)
    list(steps(first[0], first[1], by_passes, range(3)))
    generator = torch.get_rng_state()
    resumed = parts(5)
    for part, state in zip(resumed, saved_and_loaded([part.state_dict() for part in first]), strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(generator)
    list(steps(resumed[0], resumed[1], by_passes, range(3, 7)))
    assert model_bits(resumed[2]) == model_bits(whole[2])
    assert int(resumed[2].n_steps) == 7


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda three: pickle.loads(pickle.dumps(three))], ids=["deep", "file"]
)
def test_copy_with_model_and_optimizer_averages_on(copied):
    model = net(dropout=0.0)
    optimizer = sam(model)
    three = (model, optimizer, EMA(model, optimizer))
    list(steps(model, optimizer, by_passes, range(2)))
    twins = copied(three)
    list(steps(model, optimizer, by_passes, range(2, 4)))
    list(steps(twins[0], twins[1], by_passes, range(2, 4)))
    assert model_bits(twins[2]) == model_bits(three[2])
    assert int(twins[2].n_steps) == 4


def test_discarded_average_is_updated_no_more():
    model = net()
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    alive = weakref.ref(averaged)
    del averaged
    gc.collect()
    assert alive() is None
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


# Models.


def test_compiled_model_is_averaged_without_recompilation_and_its_copy_is_not_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Linear(2, 1)
    compiled = torch.compile(model, backend=backend)
    optimizer = sgd(model)
    averaged = SWA(compiled, optimizer)
    for _ in range(2):
        plain(optimizer, lambda: compiled(torch.ones(3, 2)).square().mean())
        last = compiled(torch.ones(3, 2))
        with averaged.applied():
            output = compiled(torch.ones(3, 2))
            torch.testing.assert_close(output, averaged(torch.ones(3, 2)))
    assert len(graphs) == 1
    assert not torch.equal(output, last)
    assert type(averaged.module) is nn.Linear
    assert list(averaged.module.state_dict()) == ["weight", "bias"]


def test_average_is_not_updated_inside_of_a_compiled_step():
    model = nn.Linear(2, 1)
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 2)).square().mean().backward()
        step()
        seen.append(model.weight.detach().clone())
    assert int(averaged.n_averaged) == 3
    torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(seen).mean(0))


def test_models_that_cannot_be_copied_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="run one forward before"):
        SWA(nn.LazyLinear(2))
    model = nn.Sequential(nn.Linear(2, 2))
    inner = model[0].forward
    model[0].forward = lambda x: inner(x)
    with pytest.raises(ValueError, match="the forward of '0' was replaced by a function that holds the model itself"):
        SWA(model)
    model[0].forward = lambda x: x  # holds nothing
    SWA(model)


def test_changed_model_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    averaged = SWA(model)
    model.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model was changed after the average was made"):
        averaged.update_parameters()


def test_average_without_an_optimizer_is_updated_by_hand_also_from_another_model():
    model, other = nn.ParameterList([parameter(1.0)]), nn.ParameterList([parameter(4.0)])
    averaged = SWA(model)
    averaged.update_parameters()
    averaged.update_parameters(other)
    assert averaged.module[0].item() == 2.5


def test_counters_stay_on_the_host_when_the_average_moves():
    averaged = SWA(nn.Linear(2, 1)).to("meta")
    assert averaged.module.weight.device.type == "meta"
    assert averaged.n_averaged.device.type == averaged.n_steps.device.type == "cpu"


def test_model_and_optimizer_are_no_part_of_the_average():
    model = net()
    averaged = EMA(model, sgd(model))
    assert len(list(averaged.parameters())) == len(list(model.parameters()))
    assert {name.partition(".")[0] for name in averaged.state_dict()} == {"module", "n_averaged", "n_steps"}


def test_optimizer_whose_step_runs_no_hooks_is_refused():
    class Bare(torch.optim.Optimizer):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="whose step.. runs hooks, got Bare"):
        SWA(nn.Linear(2, 1), Bare())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: EMA(m, decay=1.5), "decay must be between 0 and 1, got 1.5"),
        (lambda m: SWA(m, start=-1), "start must be a whole number of steps, at least 0, got -1"),
        (lambda m: SWA(m, every=0), "every must be a whole number of steps, at least 1, got 0"),
        (lambda m: SWA(m, every=0.5), "every must be a whole number"),
        (lambda m: LastPart(m, total_steps=0), "total_steps must be a whole number, at least 1, got 0"),
        (lambda m: LastPart(m, total_steps=10, share=0.0), "share must be above 0 and at most 1, got 0.0"),
        (lambda m: from_name("polyak", m, total_steps=1), "there is no average 'polyak'"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(nn.Linear(2, 1))


def test_names_make_the_averages_with_their_options():
    model = nn.Linear(2, 1)
    ema = from_name("ema", model, total_steps=100, decay=0.9)
    swa = from_name("swa", model, total_steps=100, share=0.5)
    assert (type(ema), ema.decay) == (EMA, 0.9)
    assert (type(swa), swa.start) == (LastPart, 50)
