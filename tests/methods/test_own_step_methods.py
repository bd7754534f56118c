"""The contract, for each method with a step of its own: costs, checkpoints, copies, skipped steps, side effects."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from own_step_problem import forward_passes_per_step, state_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import steppe
from checks import resumes
from steppe._tensors import random as random_tensors
from steppe.methods.bsam import BSAM
from steppe.methods.c_flat import CFlat
from steppe.methods.gam import GAM
from steppe.methods.lookbehind_sam import Lookbehind
from steppe.methods.sampa import SAMPa
from steppe.methods.sassha import SASSHA
from steppe.methods.wsam import DecoupledWSAM
from support import (
    BASES,
    DRIVES,
    batch,
    bits,
    by_closure,
    by_passes,
    in_pairs,
    in_turn,
    model_bits,
    net,
    observed,
    rest_is_slow,
    train,
)

METHODS = {
    "decoupled_wsam": lambda base, m, rho=0.1: DecoupledWSAM(BASES[base](m.parameters()), rho, gamma=0.8, model=m),
    "lookbehind": lambda base, m, rho=0.1: Lookbehind(BASES[base](m.parameters()), rho, ascent_steps=3, model=m),
    "lookbehind-adaptive": lambda base, m, rho=0.1: Lookbehind(
        BASES[base](m.parameters()), rho, ascent_steps=2, alpha=None, model=m
    ),
    "gam": lambda base, m, rho=0.1: GAM(BASES[base](m.parameters()), rho, model=m),
    "c_flat": lambda base, m, rho=0.1: CFlat(BASES[base](m.parameters()), rho, model=m),
    "sampa": lambda base, m, rho=0.1: SAMPa(BASES[base](m.parameters()), rho, model=m),
    "bsam": lambda base, m, rho=0.1: BSAM(m.parameters(), 0.05, n_data=500, rho=rho, model=m),
    "sassha": lambda base, m, rho=0.1: SASSHA(m.parameters(), 0.02, rho=rho, interval=2, model=m),
}
COST = {"decoupled_wsam": 2, "lookbehind": 4, "lookbehind-adaptive": 3, "gam": 4, "c_flat": 4, "sampa": 2, "bsam": 2}
COST["sassha"] = 2
every_method = pytest.mark.parametrize("name", METHODS)


every_drive = pytest.mark.parametrize("drive", ["closure", "passes"])


@every_method
@every_drive
def test_step_costs_the_stated_number_of_passes(name, drive):
    model = net()
    assert forward_passes_per_step(model, METHODS[name]("sgd", model), drive, 6) == COST[name]


@pytest.mark.parametrize(
    ("name", "base", "drive"), rest_is_slow(in_pairs(METHODS, BASES, ["closure", "passes"]), in_turn(METHODS, BASES))
)
def test_resumed_run_has_the_same_bits(name, drive, base):
    for after in (1, 3):
        resumes(functools.partial(METHODS[name], base), drive, after=after, steps=6)


@every_method
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copy_takes_the_same_next_steps(name, copied):
    model = net(dropout=0.0)
    optimizer = METHODS[name]("momentum", model)
    train(model, optimizer, by_closure, 3)
    model2, optimizer2 = copied((model, optimizer))
    train(model, optimizer, by_closure, 3, start=3)
    assert model_bits(model2) != model_bits(model)
    train(model2, optimizer2, by_closure, 3, start=3)
    assert model_bits(model2) == model_bits(model)
    assert repr(optimizer2) == repr(optimizer)


@every_method
def test_closure_and_passes_give_the_same_bits(name):
    one, two = net(), net()
    for model, drive in ((one, by_closure), (two, by_passes)):
        torch.manual_seed(4)
        train(model, METHODS[name]("momentum", model), drive, 5)
    assert model_bits(one) == model_bits(two)


@every_method
@every_drive
def test_step_changes_buffers_and_generators_as_one_pass_does(name, drive):
    model, twin = net(), net()
    optimizer = METHODS[name]("sgd", model)
    optimizer.param_groups[0]["lr"] = 0.0
    plain = torch.optim.SGD(twin.parameters(), lr=0.0)
    afterwards = []
    for m, o, d in ((model, optimizer, DRIVES[drive]), (twin, plain, by_closure)):
        torch.manual_seed(5)
        train(m, o, d, 4)
        afterwards.append(torch.rand(3))
    assert torch.equal(*afterwards)
    for buffer, want in zip(model.buffers(), twin.buffers(), strict=True):
        if name == "bsam":  # its first pass is at w + n
            assert buffer.isfinite().all()
            assert buffer.dim() or torch.equal(buffer, want)
        else:
            assert torch.equal(buffer, want)


@every_method
def test_passes_of_a_step_have_the_same_dropout_masks(name):
    torch.manual_seed(0)
    dropout, w = torch.nn.Dropout(0.5), torch.nn.Parameter(torch.ones(40))
    model = torch.nn.Module()
    model.w = w
    optimizer = METHODS[name]("sgd", model)
    masks = []

    def loss():
        out = dropout(w)
        masks.append(tuple((out != 0).tolist()))
        return out.square().sum() / 100

    for _ in range(4):
        masks.clear()
        by_closure(optimizer, loss)
        assert len(masks) == COST[name]
        assert len(set(masks)) == 1
    before = set(masks)
    by_closure(optimizer, loss)
    assert set(masks[-COST[name] :]) != before


@pytest.mark.parametrize(("name", "bad", "value"), in_pairs(METHODS, [0, 1, -1], ["nan", "inf"]))
def test_gradient_that_is_not_finite_skips_one_step_and_enters_no_memory(name, bad, value):
    model = net(dropout=0.0)
    optimizer = METHODS[name]("momentum", model)
    train(model, optimizer, by_closure, 2)
    before, state = bits(model.parameters()), state_bits(optimizer)
    calls = []
    x, y = batch()
    bad %= COST[name]

    def loss():
        calls.append(1)
        out = F.cross_entropy(model(x), y)
        return out * float(value) if len(calls) == bad + 1 else out

    if name == "sampa" and bad == 1:  # this gradient updates the weights in the next step
        by_closure(optimizer, loss)
        assert optimizer.skipped_steps == 0
        before = bits(model.parameters())
    with pytest.warns(RuntimeWarning, match="skipped"):
        by_closure(optimizer, loss)
    assert optimizer.skipped_steps == 1
    assert bits(model.parameters()) == before
    if name != "sampa":
        assert state_bits(optimizer) == state
    train(model, optimizer, by_closure, 6)
    assert optimizer.skipped_steps == 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(
        torch.as_tensor(v).isfinite().all() for s in optimizer.state_dict()["state"].values() for v in s.values()
    )


@pytest.mark.parametrize(
    ("name", "drive", "error"), in_pairs(METHODS, ["closure", "passes"], [RuntimeError, KeyboardInterrupt])
)
def test_exception_in_any_pass_leaves_weights_and_state_unchanged(name, drive, error):
    for failing in range(COST[name]):
        model = net(dropout=0.0)
        optimizer = METHODS[name]("momentum", model)
        train(model, optimizer, DRIVES[drive], 2)
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
        before, state = bits(model.parameters()), state_bits(optimizer)
        stepped = []
        handle = optimizer.base.register_step_post_hook(lambda *_, m=model, s=stepped: s.append(bits(m.parameters())))
        x, y = batch()
        calls = []

        def loss(model=model, x=x, y=y, failing=failing, calls=calls):
            calls.append(1)
            out = F.cross_entropy(model(x), y)
            if len(calls) == failing + 1:
                raise error("in a pass")
            return out

        with pytest.raises(error):
            DRIVES[drive](optimizer, loss)
        if name == "sampa" and failing == 1:
            assert bits(model.parameters()) == stepped[-1], "the weights are not at x_{t+1}"
            assert state_bits(optimizer) != state
        else:
            assert not stepped
            assert bits(model.parameters()) == before
            assert state_bits(optimizer) == state
        handle.remove()
        train(model, optimizer, DRIVES[drive], 2, start=2)
        train(twin, twin_optimizer, DRIVES[drive], 2, start=2)
        same = bits(model.parameters()) == bits(twin.parameters())
        assert same == (name != "sampa" or failing == 0), "the failed step has changed the next ones"


@pytest.mark.parametrize(
    ("name", "dtype", "drive"), in_pairs(METHODS, [torch.float32, torch.bfloat16], ["closure", "passes"])
)
def test_with_a_learning_rate_of_zero_the_weights_keep_their_bits_and_storage(name, drive, dtype):
    model = net(dtype=dtype)
    optimizer = METHODS[name]("sgd", model, rho=0.7)
    optimizer.param_groups[0]["lr"] = 0.0
    before, storage = bits(model.parameters()), [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, DRIVES[drive], 4)
    assert bits(model.parameters()) == before
    assert [p.data_ptr() for p in model.parameters()] == storage


@every_method
def test_schedulers_work_on_wrapper_and_base_without_a_warning(name):
    for on in ("wrapper", "base"):
        model = net()
        optimizer = METHODS[name]("momentum", model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on == "wrapper" else optimizer.base, 1, 0.5)
        rate = optimizer.param_groups[0]["lr"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(3):
                train(model, optimizer, by_closure, 1, start=step)
                scheduler.step()
        assert optimizer.base.param_groups[0]["lr"] == pytest.approx(rate / 8)


@every_method
def test_state_and_groups_are_those_of_the_base_and_step_returns_the_loss(name):
    model = net()
    optimizer = METHODS[name]("momentum", model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    x, y = batch()
    losses = []
    got = by_closure(optimizer, lambda: (losses.append(F.cross_entropy(model(x), y)), losses[-1])[1])
    assert got is losses[0]


@every_method
def test_added_group_is_trained(name):
    model = net()
    optimizer = METHODS[name]("sgd", model)
    w = torch.nn.Parameter(torch.ones(2))
    train(model, optimizer, by_closure, 1)
    optimizer.add_param_group({"params": [w], "lr": 0.05, "sam_rho": 0.02})
    x, y = batch()
    for _ in range(2):
        by_closure(optimizer, lambda: F.cross_entropy(model(x), y) + w.square().sum())
    assert (w != 1).all()


@every_method
def test_complex_and_tied_parameters_equal_real_ones(name):
    z = torch.nn.Parameter(torch.tensor([3.0 + 4.0j, 1.0 - 2.0j]))
    model = torch.nn.Module()
    model.z = model.tied = z
    other = torch.nn.Module()
    other.z = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    made = METHODS[name]("sgd", model), METHODS[name]("sgd", other)
    if name == "bsam":
        for o in made:
            o.param_groups[0]["n_data"] = 1e30  # the noise of 2 x 2 numbers is not that of 2 x (2,)
    for o, p in zip(made, (z, other.z), strict=True):
        o.param_groups[0]["lr"] = 1e-3
        for _ in range(3):
            by_closure(o, lambda p=p: (torch.view_as_real(p) if p.is_complex() else p).pow(4).sum())
    torch.testing.assert_close(torch.view_as_real(z), other.z)


@every_method
def test_missing_gradients_leave_the_weights_finite(name):
    a, b, c = (torch.nn.Parameter(torch.tensor([v])) for v in (1.0, 2.0, 3.0))
    model = torch.nn.Module()
    model.a, model.b, model.c = a, b, c
    optimizer = METHODS[name]("momentum", model)
    calls = []

    def loss():
        calls.append(1)
        return (a * b).sum() if len(calls) % COST[name] else (a * c).sum()

    for _ in range(4):
        by_closure(optimizer, loss)
        by_closure(optimizer, lambda: a.detach().square().sum() + 0 * b.sum())
    assert all(p.isfinite().all() for p in (a, b, c))


@every_method
def test_step_reads_no_value_on_the_host(name, monkeypatch):
    monkeypatch.setattr(random_tensors, "generator", lambda device, key: None)  # fake tensors have no device
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3, device="meta"), torch.nn.LayerNorm(3, device="meta"))
        for layer in model:
            for key, p in layer.named_parameters():
                setattr(layer, key, torch.nn.Parameter(torch.empty(p.shape, device="cuda")))
        optimizer = METHODS[name]("momentum", model)

        def set_gradients():
            for p in model.parameters():
                p.grad = torch.ones_like(p)
                if name == "sassha":  # what its loss adds in the backward
                    optimizer._latest[p] = torch.ones_like(p)

        for _ in range(5):
            optimizer.step(set_gradients)
        assert optimizer._engine.steps == 5


@every_method
def test_classic_api_works_or_raises_with_the_reason(name):
    model = net()
    optimizer = METHODS[name]("sgd", model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    if name == "decoupled_wsam":
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        return
    before = bits(model.parameters())
    with pytest.raises(RuntimeError, match=r"first_step\(\) with .*Use "):
        optimizer.first_step()
    assert bits(model.parameters()) == before
    train(model, optimizer, by_closure, 1)


@every_method
def test_distributed_checkpoint_restores_the_state(name):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    straight, model = net(dropout=0.0), net(seed=5, dropout=0.0)
    optimizer = METHODS[name]("momentum", straight)
    train(straight, optimizer, by_closure, 2)
    model.load_state_dict(copy.deepcopy(straight.state_dict()))
    saved = copy.deepcopy(get_optimizer_state_dict(straight, optimizer))
    fresh = METHODS[name]("momentum", model)
    set_optimizer_state_dict(model, fresh, saved)
    train(straight, optimizer, by_closure, 3, start=2)
    train(model, fresh, by_closure, 3, start=2)
    assert model_bits(model) == model_bits(straight)


@every_method
def test_citation_names_the_paper_of_the_method(name):
    assert type(METHODS[name]("sgd", net())).paper.bibtex() in steppe.papers.citation(METHODS[name]("sgd", net()))


@every_method
@every_drive
def test_each_pass_in_an_open_autocast_region_runs_on_its_own_weights(name, drive):
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 1)
    optimizer = METHODS[name]("sgd", model, rho=0.5)
    losses = []

    def loss():
        losses.append((model(torch.ones(2, 4)).float() - 1.3).abs().pow(1.5).mean())
        return losses[-1]

    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            DRIVES[drive](optimizer, loss)
    # all gradients of this loss are parallel, so that C-Flat's e_1 is e_0
    assert len({value.item() for value in losses}) == 2 * (COST[name] - (name == "c_flat"))


def test_pass_at_a_sample_does_not_run_on_cached_casts_of_w():
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 1)
    optimizer = BSAM(model.parameters(), 0.0, n_data=1, model=model)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for sam_pass in optimizer.passes():
            out_at_w = model(x)  # leaves casts of w in the region's cache
            with sam_pass:
                out = model(x)
                assert sam_pass.is_perturbed or not torch.equal(out, out_at_w)
                out.sum().backward()


@pytest.mark.parametrize("name", ["sampa", "bsam"])
def test_interrupt_between_displacement_and_first_pass_restores_the_weights(name, monkeypatch):
    model = net(dropout=0.0)
    optimizer = METHODS[name]("sgd", model)
    train(model, optimizer, by_closure, 2)
    before = bits(model.parameters())
    sam_pass = next(optimizer.passes())
    monkeypatch.setattr(optimizer._engine.side_effects, "begin_first_pass", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), sam_pass:
        pass
    assert bits(model.parameters()) == before


@every_method
def test_aborted_step_does_not_change_the_next_ones(name):
    model = net(dropout=0.0)
    optimizer = METHODS[name]("momentum", model)
    train(model, optimizer, by_closure, 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    if name != "sampa":  # its base has stepped when the passes are over
        x, y = batch(7)
        criterion = observed(optimizer, F.cross_entropy)
        for sam_pass in optimizer.passes():
            with sam_pass:
                criterion(model(x), y).backward()
        optimizer.zero_grad(set_to_none=False)  # as after a step that a loss scaler skipped
        optimizer.restore()
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        x, y = batch(8)
        criterion = observed(o, F.cross_entropy)
        for sam_pass in o.passes(accumulate=name == "decoupled_wsam"):
            with sam_pass:
                criterion(m(x), y).backward()
        o.step()
    assert bits(model.parameters()) == bits(twin.parameters())


@every_method
def test_loss_scaler_works_or_raises_with_the_reason(name):
    model = net(dropout=0.0)
    optimizer = METHODS[name]("sgd", model)
    scaler = torch.amp.GradScaler("cpu")
    before = bits(model.parameters())
    x, y = batch()
    for sam_pass in optimizer.passes():
        with sam_pass:
            scaler.scale(F.cross_entropy(model(x), y)).backward()
    if name in ("decoupled_wsam", "gam", "c_flat"):
        scaler.step(optimizer)
        scaler.update()
        twin = net(dropout=0.0)
        by_closure(METHODS[name]("sgd", twin), lambda: F.cross_entropy(twin(x), y))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    elif name == "sampa":  # .grad is cleared: the scaler has nothing to unscale
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.step(optimizer)
    else:
        with pytest.raises(RuntimeError, match=r"scaler\.step\(optimizer\) with .*bfloat16"):
            scaler.step(optimizer)
        assert bits(model.parameters()) == before
