"""The contract, C1 to C13: SAM as an optimizer."""

import copy
import functools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

import steppe
from checks import build, restores_exactly, resumes
from steppe import SAM
from support import BASES, DRIVES, batch, bits, by_closure, by_passes, model_bits, net, plain, train

every_drive = pytest.mark.parametrize("drive", DRIVES)
every_base = pytest.mark.parametrize("base", BASES)


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


# C1: a real optimizer; groups and state are the base's, always.


@every_base
def test_c1_groups_and_state_are_the_bases_also_after_a_load(base):
    model = net()
    optimizer = SAM(BASES[base](model.parameters()), model=model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, by_closure, 2)
    for loader in (optimizer, optimizer.base):
        loader.load_state_dict(loader.state_dict())
        assert optimizer.param_groups is optimizer.base.param_groups
        assert optimizer.state is optimizer.base.state
        assert optimizer.defaults is optimizer.base.defaults
        optimizer.param_groups[0]["lr"] = 0.0
        before = bits(model.parameters())
        train(model, optimizer, by_closure, 1)
        assert bits(model.parameters()) == before, "a learning rate set through the wrapper must reach the base"


def test_c1_groups_can_be_added_and_replaced_through_the_wrapper():
    a, b = parameter(1.0), parameter(2.0)
    optimizer = SAM(torch.optim.SGD([a], lr=0.1), rho=0.3)
    optimizer.add_param_group({"params": [b], "sam_rho": 0.7, "lr": 0.5})
    assert [g["sam_rho"] for g in optimizer.base.param_groups] == [0.3, 0.7]
    by_passes(optimizer, lambda: a.square().sum() + b.square().sum())
    assert b.item() == pytest.approx(2.0 - 0.5 * 2 * (2 + 0.7 * 4 / math.sqrt(20)), rel=1e-6)
    groups, state = optimizer.param_groups, optimizer.state
    optimizer.param_groups, optimizer.state = groups, state
    assert optimizer.base.param_groups is groups
    assert optimizer.base.state is state


# C2: checkpoints.


@every_drive
@every_base
def test_c2_a_checkpoint_resumes_bit_exactly(base, drive):
    resumes(functools.partial(build, base), drive, after=3)


@every_base
def test_c2_base_and_sam_load_each_other(base):
    model = net()
    optimizer = build(base, model)
    train(model, optimizer, by_closure, 3)
    plain_base = BASES[base](model.parameters())
    plain_base.load_state_dict(optimizer.state_dict())  # SAM switched off ...
    train(model, plain_base, plain, 1)
    again = SAM(BASES[base](model.parameters()), rho=0.25, model=model)
    again.load_state_dict(plain_base.state_dict())  # ... and on again
    train(model, again, by_closure, 1)
    fresh = BASES[base](model.parameters())
    never_wrapped = fresh.state_dict()
    again.load_state_dict(never_wrapped)
    assert again.param_groups[0]["sam_rho"] in (0.1, 0.25), "a plain checkpoint leaves the radius as it is"


def test_c2_a_plain_checkpoint_keeps_each_groups_radius():
    a, b = parameter(1.0), parameter(2.0)
    groups = [{"params": [a], "sam_rho": 0.3}, {"params": [b]}]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.05)
    bare = torch.optim.SGD([{"params": [parameter(1.0)]}, {"params": [parameter(2.0)]}], lr=0.7)
    optimizer.load_state_dict(bare.state_dict())
    assert [(g["sam_rho"], g["lr"]) for g in optimizer.param_groups] == [(0.3, 0.7), (0.05, 0.7)]


def test_c2_wrapping_a_base_that_loaded_our_checkpoint_goes_on():
    straight, model = net(dropout=0.0), net(dropout=0.0)
    optimizer = build("momentum", straight)
    train(straight, optimizer, by_closure, 6)
    first = build("momentum", model)
    train(model, first, by_closure, 3)
    base = BASES["momentum"](model.parameters())
    base.load_state_dict(first.state_dict())
    second = SAM(
        base, rho=0.1, model=model, perturbation=first.perturbation, cadence=first.cadence
    )  # the memory and the step counter came with the base
    train(model, second, by_closure, 3, start=3)
    assert model_bits(model) == model_bits(straight)
    assert all(not str(k).startswith("sam.") for s in base.state.values() for k in s)


def test_c2_torch_distributed_checkpoint_keeps_memory_and_step(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    straight = net(dropout=0.0)
    optimizer = build("momentum", straight)
    train(straight, optimizer, by_closure, 3)
    weights = copy.deepcopy(straight.state_dict())
    saved = {"optimizer": get_optimizer_state_dict(straight, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcp warns that there is one process only
        dcp.save(saved, checkpoint_id=tmp_path)
        train(straight, optimizer, by_closure, 3, start=3)
        model = net(seed=5, dropout=0.0)
        model.load_state_dict(weights)
        fresh = build("momentum", model)
        train(model, fresh, by_closure, 1)  # so that there is a state to load into
        model.load_state_dict(weights)
        target = {"optimizer": get_optimizer_state_dict(model, fresh)}
        dcp.load(target, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, fresh, target["optimizer"])
    train(model, fresh, by_closure, 3, start=3)
    assert model_bits(model) == model_bits(straight)


def test_c2_a_distributed_checkpoint_of_a_plain_base_loads(tmp_path):
    """SAM is switched on in the middle of a run."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = net(dropout=0.0)
    base = BASES["momentum"](model.parameters())
    train(model, base, plain, 3)
    other = net(5, dropout=0.0)
    optimizer = SAM(BASES["momentum"](other.parameters()), rho=0.1, model=other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcp warns that there is one process only
        dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, base), strict=True)), checkpoint_id=tmp_path)
        parts = dict(zip(("model", "optimizer"), get_state_dict(other, optimizer), strict=True))
        dcp.load(parts, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(other, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    train(model, SAM(base, rho=0.1, model=model), by_closure, 3, start=3)
    train(other, optimizer, by_closure, 3, start=3)
    assert model_bits(other) == model_bits(model)


def test_c2_asking_torch_distributed_for_a_checkpoint_neither_warns_nor_counts_as_a_step():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = net()
    optimizer = SAM(BASES["sgd"](model.parameters()), model=model)
    before = bits(model.parameters())
    get_optimizer_state_dict(model, optimizer)  # steps with lr = 0 to have a state; warnings are errors here
    assert optimizer._engine.steps == 0
    assert bits(model.parameters()) == before


class Nested(torch.optim.SGD):
    """A base that keeps of a checkpoint what it knows, as one does that has another one inside."""

    def load_state_dict(self, state_dict):
        state = {i: {k: v for k, v in own.items() if k == "momentum_buffer"} for i, own in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})


@pytest.mark.parametrize("rule", [steppe.Friendly(), steppe.VarianceSuppressed()], ids=str)
def test_c2_the_memory_does_not_depend_on_what_the_base_keeps(rule):
    def made(seed):
        model = net(seed, dropout=0.0)
        return model, SAM(Nested(model.parameters(), lr=0.1, momentum=0.9), rho=0.1, model=model, perturbation=rule)

    model, optimizer = made(0)
    train(model, optimizer, DRIVES["passes"], 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, DRIVES["passes"], 3, start=3)
    other, its_optimizer = made(7)
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    train(other, its_optimizer, DRIVES["passes"], 3, start=3)
    assert model_bits(other) == model_bits(model)


def test_c2_hooks_of_state_dict_fire():
    optimizer = SAM(torch.optim.SGD([parameter(1.0)], lr=0.1))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append(s.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", 1, "post"]


# C3: copies.


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@every_base
def test_c3_a_copy_takes_the_identical_next_step(base, how):
    model = net(dropout=0.0)
    optimizer = build(base, model)
    train(model, optimizer, by_closure, 3)
    model2, optimizer2 = how((model, optimizer))
    assert type(optimizer2.base) is type(optimizer.base)
    assert next(model2.parameters()) is optimizer2.param_groups[0]["params"][0]
    train(model, optimizer, by_closure, 3, start=3)
    assert model_bits(model2) != model_bits(model)
    train(model2, optimizer2, by_closure, 3, start=3)
    assert model_bits(model2) == model_bits(model)


# C4: hooks and schedulers.


@every_drive
def test_c4_step_hooks_fire_once_on_wrapper_and_base(drive):
    model = net()
    optimizer = SAM(BASES["sgd"](model.parameters()), model=model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("sam pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("sam post"))
    optimizer.base.register_step_pre_hook(lambda *_: seen.append("base pre"))
    optimizer.base.register_step_post_hook(lambda *_: seen.append("base post"))
    train(model, optimizer, DRIVES[drive], 1)
    assert seen == ["sam pre", "base pre", "base post", "sam post"]


@pytest.mark.parametrize("on", ["wrapper", "base"])
@every_drive
def test_c4_schedulers_work_without_a_warning(drive, on):
    model = net()
    optimizer = SAM(BASES["momentum"](model.parameters()), model=model)
    target = optimizer if on == "wrapper" else optimizer.base
    scheduler = torch.optim.lr_scheduler.OneCycleLR(target, max_lr=0.5, total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = []
        for step in range(6):
            train(model, optimizer, DRIVES[drive], 1, start=step)
            scheduler.step()
            rates.append(optimizer.base.param_groups[0]["lr"])
    assert len(set(rates)) == 6
    assert max(rates) == pytest.approx(0.5, rel=0.1)


# C5: names.


def test_c5_adadelta_keeps_its_rho():
    model = net()
    base = torch.optim.Adadelta(model.parameters(), rho=0.77)
    optimizer = SAM(base, rho=0.05, model=model)
    train(model, optimizer, by_closure, 1)
    assert base.param_groups[0]["rho"] == 0.77
    assert base.param_groups[0]["sam_rho"] == 0.05
    with pytest.raises(TypeError, match="'rho' of its own"):
        SAM(model.parameters(), torch.optim.Adadelta, rho=0.05)


def test_c5_own_names_meet_no_torch_optimizer():
    import inspect

    ours = {"sam_rho", "sam_step", "model", "perturbation", "combination", "cadence", "replay_rng"}
    for name in torch.optim.__all__:
        cls = getattr(torch.optim, name)
        if inspect.isclass(cls):
            assert ours.isdisjoint(inspect.signature(cls).parameters), name


def test_c5_a_radius_under_a_name_without_effect_is_an_error():
    with pytest.raises(ValueError, match="has no effect: the radius of a group is 'sam_rho'"):
        SAM(torch.optim.SGD([{"params": [parameter(1.0)], "rho": 0.1}], lr=0.1))
    w = parameter(1.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1))
    optimizer.param_groups[0]["rho"] = 0.2
    with pytest.raises(ValueError, match="has no effect"):
        by_passes(optimizer, lambda: w.square().sum())


def test_c5_wrapping_a_base_again_takes_the_new_radius():
    base = torch.optim.SGD([parameter(1.0)], lr=0.1)
    SAM(base, rho=0.05)
    assert SAM(base, rho=0.2).param_groups[0]["sam_rho"] == 0.2


# C6, C7: the way back.


@every_drive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_c6_weights_come_back_bit_for_bit_in_place(drive, dtype):
    restores_exactly(drive, dtype)


def test_c6_special_values_come_back():
    w = parameter(-0.0, 1e-45, -1e-40, 3.4e38)
    optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=1e3)
    before = bits([w])
    for sam_pass in optimizer.passes():
        with sam_pass:
            (w * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
            assert (bits([w]) != before) == sam_pass.is_perturbed
    optimizer.step()
    assert bits([w]) == before


@every_drive
def test_c7_a_gradient_in_one_pass_only(drive):
    a, b, c = parameter(1.0), parameter(2.0), parameter(3.0)
    optimizer = SAM(torch.optim.SGD([a, b, c], lr=0.1, weight_decay=0.1), rho=0.5)
    calls = []

    def loss():
        calls.append((a.item(), b.item(), c.item()))
        return (a * b).sum() if len(calls) == 1 else (a * c).sum()

    DRIVES[drive](optimizer, loss)
    climbed = calls[1]
    assert climbed[0] != 1.0
    assert climbed[1] != 2.0
    assert climbed[2] == 3.0
    assert b.item() == 2.0, "no gradient in the second pass: restored, and not stepped"
    assert a.item() == pytest.approx(1.0 - 0.1 * (3.0 + 0.1 * 1.0))
    assert c.item() == pytest.approx(3.0 - 0.1 * (climbed[0] + 0.1 * 3.0))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_c7_any_exception_in_the_second_pass_restores(drive, error):
    model = net()
    optimizer = SAM(BASES["momentum"](model.parameters()), rho=0.5, model=model)
    train(model, optimizer, DRIVES[drive], 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    before = bits(model.parameters())
    x, y = batch(2)
    calls = []

    def loss():
        calls.append(1)
        value = F.cross_entropy(model(x), y)
        if len(calls) == 2:
            assert bits(model.parameters()) != before
            raise error("in the second pass")
        return value

    rng = torch.get_rng_state()
    with pytest.raises(error) as raised:
        DRIVES[drive](optimizer, loss)
    assert bits(model.parameters()) == before
    assert raised.value is not None  # still holding the traceback, as an except block does
    torch.set_rng_state(rng)
    model.load_state_dict(twin.state_dict())  # the first pass's running statistics aside, nothing is left
    train(model, optimizer, DRIVES[drive], 1, start=2)
    torch.set_rng_state(rng)
    train(twin, twin_optimizer, DRIVES[drive], 1, start=2)
    assert model_bits(model) == model_bits(twin)


def test_c7_an_interrupt_between_the_climb_and_the_second_pass_restores(monkeypatch):
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    sam_passes = optimizer.passes()
    with next(sam_passes):
        w.square().sum().backward()
    second = next(sam_passes)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), second:
        pass
    assert w.item() == 3.0
    assert second.ascent_steps


def test_c7_an_exception_in_the_rule_restores():
    def rule(point):
        return steppe.ScaledDirection([point.gradients[0], torch.ones(7)], 1.0)  # the second has a wrong shape

    a, b = parameter(1.0), parameter(2.0)
    optimizer = SAM(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1), rho=0.5, perturbation=rule)
    with pytest.raises(RuntimeError):
        by_passes(optimizer, lambda: (a * b).sum())
    assert (a.item(), b.item()) == (1.0, 2.0)


def test_c7_restore_gives_up_a_pending_first_step():
    model = net()
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=0.5, model=model)
    before = bits(model.parameters())
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    after_pass = model_bits(model)
    optimizer.first_step(zero_grad=True)
    assert bits(model.parameters()) != before
    optimizer.restore()
    assert model_bits(model) == after_pass
    train(model, optimizer, DRIVES["classic"], 1)


# C8: what step() means.


def test_c8_step_calls_the_closure_once_a_pass_and_returns_the_loss_at_w():
    w = parameter(3.0, 4.0)
    for every, want in ((1, [2, 2, 2]), (2, [2, 1, 2])):
        optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=1.0, cadence=steppe.Periodic(every))
        counts = []
        for _ in range(3):
            losses = []

            def closure(losses=losses, optimizer=optimizer):
                optimizer.zero_grad()
                loss = w.square().sum()
                loss.backward()
                losses.append(loss.item())
                return loss

            assert optimizer.step(closure).item() == pytest.approx(25.0)
            counts.append(len(losses))
            assert losses[1:] == [pytest.approx(36.0)] * (len(losses) - 1), "|w + e| = 5 + rho"
        assert counts == want


@pytest.mark.parametrize("how", ["passes", "first_step"])
@pytest.mark.parametrize("argument", [[], [lambda: 1 / 0], [None]])
def test_c8_step_after_the_passes_takes_the_base_step_whatever_it_is_given(how, argument):
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    if how == "passes":
        for sam_pass in optimizer.passes():
            with sam_pass:
                w.square().sum().backward()
    else:
        w.square().sum().backward()
        optimizer.first_step(zero_grad=True)
        w.square().sum().backward()
    optimizer.step(*argument)
    want = torch.tensor([3.0, 4.0]) - 0.1 * 2 * torch.tensor([3.6, 4.8])
    torch.testing.assert_close(w.detach(), want)


def test_c8_a_bare_step_is_the_bases_and_says_so_once():
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    w.grad = torch.tensor([1.0])
    with pytest.warns(UserWarning, match="a plain step of SGD"):
        optimizer.step()
    assert w.item() == pytest.approx(2.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_c8_a_bare_step_of_a_base_without_a_learning_rate_says_so_too():
    class Fixed(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p -= 0.1 * p.grad

    w = parameter(3.0)
    optimizer = SAM(Fixed([w]), rho=1.0)
    w.grad = torch.tensor([1.0])
    with pytest.warns(UserWarning, match="a plain step of Fixed"):
        optimizer.step()


def test_c8_a_step_that_a_scaler_skipped_leaves_nothing_behind():
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    for sam_pass in optimizer.passes():
        with sam_pass:
            w.square().sum().backward()
    optimizer.zero_grad()  # the scaler did not call step()
    calls = []
    by_closure(optimizer, lambda: (calls.append(1), w.square().sum())[1])
    assert len(calls) == 2


# C9: wrong order, wrong arguments.


def test_c9_wrong_order_says_what_to_call():
    w = parameter(1.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(RuntimeError, match=r"second_step\(\) was called before first_step\(\)"):
        optimizer.second_step()
    w.square().sum().backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"first_step\(\) was called between first_step\(\) and second_step\(\)"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"passes\(\) was called between"):
        next(optimizer.passes())
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) was called between"):
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    with pytest.raises(RuntimeError, match="was not entered"):
        for _ in optimizer.passes():
            w.square().sum().backward()
    for sam_pass in optimizer.passes():
        with sam_pass:
            with pytest.raises(RuntimeError, match="inside a walk"):
                optimizer.step()
            with pytest.raises(RuntimeError, match="inside a walk"):
                next(optimizer.passes())
            w.square().sum().backward()
        with pytest.raises(RuntimeError, match="inside the loop over passes"):
            optimizer.step()  # one indentation too many
        with pytest.raises(RuntimeError, match="has been walked"), sam_pass:
            pass
        break
    with pytest.raises(RuntimeError, match=r"restore\(\) gives the step up"):
        optimizer.step()
    optimizer.restore()
    by_passes(optimizer, lambda: w.square().sum())


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_c9_a_wrong_radius_is_refused(rho):
    w = parameter(1.0)
    with pytest.raises(ValueError, match="rho must be finite and at least 0"):
        SAM(torch.optim.SGD([w], lr=0.1), rho=rho)
    with pytest.raises(ValueError, match="rho must be finite and at least 0"):
        SAM([w], torch.optim.SGD, rho=rho, lr=0.1)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1))
    optimizer.param_groups[0]["sam_rho"] = rho
    with pytest.raises(ValueError, match="rho must be finite and at least 0"):
        by_passes(optimizer, lambda: w.square().sum())


def test_c9_wrong_arguments_are_refused():
    w = parameter(1.0)
    sgd = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match="LBFGS cannot be the base"):
        SAM(torch.optim.LBFGS([w]))
    with pytest.raises(TypeError, match="is the class SGD, not an instance"):
        SAM(torch.optim.SGD)
    with pytest.raises(TypeError, match="needs a base optimizer"):
        SAM([w])
    with pytest.raises(TypeError, match="lr: options of the base go to the base"):
        SAM(sgd, lr=0.1)
    with pytest.raises(TypeError, match="rho must be a number"):
        SAM(sgd, torch.optim.SGD)
    with pytest.raises(TypeError, match="makes two passes already"):
        SAM(SAM(sgd))
    with pytest.raises(ValueError, match="empty"):
        SAM([], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="no parameters"):
        SAM(torch.optim.SGD([{"params": []}], lr=0.1))
    with pytest.raises(TypeError, match="put it into a list"):
        SAM(w, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="holds none of the optimizer's parameters"):
        SAM(sgd, model=net())
    with pytest.raises(ValueError, match="0-dim"):
        SAM(sgd, rho=torch.ones(2))


def test_c9_a_group_without_a_radius_is_an_error_that_says_how_to_mend_it():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = SAM(torch.optim.SGD([a], lr=0.1))
    optimizer.base.add_param_group({"params": [b]})
    with pytest.raises(ValueError, match=r"group 1 has no 'sam_rho'.*add_param_group"):
        by_passes(optimizer, lambda: (a * b).sum())
    optimizer.param_groups[1]["sam_rho"] = 0.1
    by_passes(optimizer, lambda: (a * b).sum())


# C10: rho = 0.


@every_drive
@every_base
def test_c10_rho_zero_is_the_base_bit_for_bit(base, drive):
    model, twin = net(), net()
    optimizer = SAM(BASES[base](model.parameters()), rho=0.0, model=model)
    twin_optimizer = BASES[base](twin.parameters())
    torch.manual_seed(7)
    train(model, optimizer, DRIVES[drive], 6)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    train(twin, twin_optimizer, plain, 6)
    assert model_bits(model) == model_bits(twin)
    assert torch.equal(torch.get_rng_state(), after)


# C11: directions and sizes.


@every_drive
def test_c11_maximize_flips_the_climb(drive):
    w, v = parameter(3.0, 4.0), parameter(3.0, 4.0)
    down = SAM(torch.optim.SGD([w], lr=1e-3), rho=0.5)
    up = SAM(torch.optim.SGD([v], lr=1e-3, maximize=True), rho=0.5)
    for _ in range(5):
        DRIVES[drive](down, lambda: w.pow(4).sum())
        DRIVES[drive](up, lambda: -v.pow(4).sum())
    assert bits([w]) == bits([v])


@every_drive
def test_c11_zero_missing_and_huge_gradients_stay_finite(drive):
    for scale in (0.0, 1e-44, 1e-30, 1e30, 3e38):
        w = parameter(1.0, 1.0)
        optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=0.5)
        seen = []
        DRIVES[drive](optimizer, lambda w=w, s=scale, seen=seen: (seen.append(w.detach().clone()), (w * s).sum())[1])
        length = float((seen[1] - 1).norm())
        assert length == pytest.approx(0.5 if 1e-31 < scale < 1e38 else length, rel=1e-5)
        assert math.isfinite(length)
        assert length <= 0.5001
    for rule in (steppe.L2(), steppe.Adaptive()):
        a, b = parameter(1.0), parameter(1.0)
        optimizer = SAM(torch.optim.SGD([a, b], lr=0.1), rho=0.5, perturbation=rule)
        other = parameter(2.0)
        DRIVES[drive](optimizer, lambda other=other: other.square().sum())  # no gradient at all
        assert (a.item(), b.item()) == (1.0, 1.0)


# C12: complex, sparse, tied.


@every_drive
def test_c12_complex_parameters_are_pairs_of_reals(drive):
    z = torch.nn.Parameter(torch.tensor([3.0 + 4.0j, 1.0 - 2.0j]))
    r = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    for rule in (steppe.L2(), steppe.Adaptive()):
        a = SAM(torch.optim.SGD([z], lr=1e-3, momentum=0.9), rho=0.5, perturbation=rule)
        b = SAM(torch.optim.SGD([r], lr=1e-3, momentum=0.9), rho=0.5, perturbation=rule)
        for _ in range(3):
            DRIVES[drive](a, lambda: torch.view_as_real(z).pow(4).sum())
            DRIVES[drive](b, lambda: r.pow(4).sum())
        torch.testing.assert_close(torch.view_as_real(z), r)


@every_drive
def test_c12_sparse_gradients_are_refused_before_anything_moves(drive):
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SAM(torch.optim.SGD(table.parameters(), lr=0.1))
    before = bits(table.parameters())
    with pytest.raises(RuntimeError, match=r"sparse gradient.*sparse=False"):
        DRIVES[drive](optimizer, lambda: table(torch.tensor([1, 2])).square().sum())
    assert bits(table.parameters()) == before


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@every_drive
def test_c12_tied_parameters_move_once(drive):
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w, w], lr=0.0), rho=0.5)
    seen = []
    DRIVES[drive](optimizer, lambda: (seen.append(w.detach().clone()), w.square().sum())[1])
    torch.testing.assert_close(seen[1], torch.tensor([3.3, 4.4]))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    tied = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    before = bits(model.parameters())
    DRIVES[drive](tied, lambda: model(torch.ones(3, 2)).square().sum())
    assert bits(model.parameters()) == before


# C13: both forms.


def test_c13_the_class_form_is_the_instance_form():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    a = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2, model=model)
    b = SAM(twin.parameters(), torch.optim.SGD, rho=0.2, model=twin, lr=0.1, momentum=0.9)
    train(model, a, by_closure, 3)
    train(twin, b, by_closure, 3)
    assert model_bits(model) == model_bits(twin)


def test_c13_the_class_form_as_hugging_face_and_skorch_call_it():
    model = net()
    decay, rest = list(model.parameters())[:2], list(model.parameters())[2:]
    groups = [{"params": decay, "weight_decay": 0.1, "rho": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = SAM(groups, base_class=torch.optim.AdamW, rho=0.1, lr=1e-3)
    assert [g["sam_rho"] for g in optimizer.param_groups] == [0.3, 0.1]
    assert "rho" in groups[0], "the caller's groups are left alone"
    optimizer = SAM(params=net().named_parameters(), base_class=torch.optim.SGD, lr=0.1)
    assert optimizer.param_groups[0]["param_names"][0] == "layers.0.weight"


def test_repr_names_the_rules_and_the_base():
    text = repr(SAM(torch.optim.SGD([parameter(1.0)], lr=0.1)))
    assert "L2()" in text
    assert "Periodic(interval=1)" in text
    assert "SGD" in text
