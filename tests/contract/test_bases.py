"""Several bases as one, train() and eval() of a base, and bases whose checkpoints have another form (C31)."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from named_methods import RULE_METHODS, TOTAL_STEPS, WRAPPERS
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import steppe
from steppe import SAM
from steppe.methods.registry import CARDS, FUNCTIONS
from support import (
    BASES,
    DRIVES,
    batch,
    bits,
    by_closure,
    by_passes,
    every_drive,
    model_bits,
    net,
    parameter,
    saved_and_loaded,
    train,
)


def halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices and kernels, and the other parameters."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]


def two_bases(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = halves(model)
    return [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=0.01)]


def step_by_hand(model: nn.Module, bases: list[torch.optim.Optimizer], rho: float, loss) -> None:
    """SAM on all parameters together, in the notation of the paper."""
    parameters = list(model.parameters())
    model.zero_grad()
    loss().backward()
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(p.grad, alpha=float(rho / norm))
    model.zero_grad()
    loss().backward()
    with torch.no_grad():
        for p, w in zip(parameters, saved, strict=True):
            p.copy_(w)
    for base in bases:
        base.step()


@every_drive
def test_c31_several_bases_share_one_perturbation(drive):
    model, twin = (nn.Linear(6, 3).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizer, bases = SAM(two_bases(model), rho=0.3, model=model), two_bases(twin)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        x, y = torch.randn(16, 6, generator=g, dtype=torch.float64), torch.randint(3, (16,), generator=g)
        DRIVES[drive](optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        step_by_hand(twin, bases, 0.3, lambda x=x, y=y: F.cross_entropy(twin(x), y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


OWN_STEPS = [name for name in WRAPPERS if name not in RULE_METHODS]
IN_TURN = [(name, ("momentum", "adamw")[i % 2]) for i, name in enumerate(RULE_METHODS)]


@pytest.mark.parametrize(("name", "base"), [*itertools.product(OWN_STEPS, ["momentum", "adamw"]), *IN_TURN])
def test_c31_every_method_steps_two_bases_as_one_base_with_two_groups(name, base):
    given = {"rho": 0.1, **CARDS[name].short_arguments(total_steps=TOTAL_STEPS)}

    def one(model):
        return BASES[base]([{"params": half} for half in halves(model)])

    def two(model):
        return [BASES[base](half) for half in halves(model)]

    models = []
    for make in (one, two):
        model = net()
        optimizer = FUNCTIONS[name](make(model), **given, model=model)
        torch.manual_seed(1)
        train(model, optimizer, by_passes, 3)
        state = saved_and_loaded(optimizer.state_dict())
        optimizer = FUNCTIONS[name](make(model), **given, model=model)
        optimizer.load_state_dict(state)
        train(model, optimizer, by_passes, 3, start=3)
        models.append(model_bits(model))
    assert models[0] == models[1]


def test_c31_one_checkpoint_holds_several_bases_exactly():
    straight, model = net(), net()
    optimizer = SAM(two_bases(straight), rho=0.1, model=straight, perturbation=steppe.VarianceSuppressed())
    torch.manual_seed(5)
    train(straight, optimizer, by_closure, 6)
    first = SAM(two_bases(model), rho=0.1, model=model, perturbation=steppe.VarianceSuppressed())
    torch.manual_seed(5)
    train(model, first, by_closure, 3)
    second = SAM(two_bases(model), rho=0.7, model=model, perturbation=steppe.VarianceSuppressed())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.rho == 0.1
    train(model, second, by_closure, 3, start=3)
    assert model_bits(model) == model_bits(straight)
    for own, other in zip(second.base.optimizers, optimizer.base.optimizers, strict=True):
        for p, q in zip(own.state.values(), other.state.values(), strict=True):
            assert bits(map(torch.as_tensor, p.values())) == bits(map(torch.as_tensor, q.values()))


def test_c31_a_checkpoint_of_other_bases_changes_none_of_them():
    model = net()
    optimizer = SAM(two_bases(model), rho=0.1, model=model)
    train(model, optimizer, by_closure, 2)
    other = SAM(two_bases(model)[::-1], rho=0.1, model=model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="in the same order"):
        optimizer.load_state_dict(other.state_dict())
    torch.testing.assert_close(optimizer.state_dict(), before)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_c31_copies_of_several_bases_take_the_identical_step(through):
    model = net()
    optimizer = SAM(two_bases(model), rho=0.1, model=model)
    train(model, optimizer, by_closure, 2)
    twin, copied = through((model, optimizer))
    train(model, optimizer, by_closure, 2, start=2)
    torch.manual_seed(0)
    train(model, optimizer, by_closure, 1, start=4)
    train(twin, copied, by_closure, 2, start=2)
    torch.manual_seed(0)
    train(twin, copied, by_closure, 1, start=4)
    assert [len(o.state) for o in copied.base.optimizers] == [len(o.state) for o in optimizer.base.optimizers]
    assert bits(model.parameters()) != bits(net().parameters())


def test_c31_groups_states_and_schedules_of_several_bases_are_their_own():
    model = net()
    sgd, adamw = bases = two_bases(model)
    optimizer = SAM(bases, rho=0.1, model=model)
    assert [id(group) for group in optimizer.param_groups] == [id(g) for base in bases for g in base.param_groups]
    LambdaLR(adamw, lambda step: 0.5)
    together = LambdaLR(optimizer, lambda step: 0.1**step)
    train(model, optimizer, by_closure, 1)
    together.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.001])
    assert len(optimizer.state) == len(list(model.parameters()))
    for p in model.parameters():
        optimizer.state[p]["seen"] = torch.ones(())
        assert (sgd if p.ndim >= 2 else adamw).state[p]["seen"] == 1.0
    assert set(optimizer.defaults) == set(sgd.defaults) & set(adamw.defaults)
    with pytest.raises(ValueError, match="momentum"):
        OneCycleLR(optimizer, 0.1, total_steps=10)  # the groups have no option of this kind in common


def test_c31_hooks_of_each_base_and_of_sam_run_once_a_step():
    model, calls = net(), []
    bases = two_bases(model)
    optimizer = SAM(bases, rho=0.1, model=model)
    for name, each in (("sgd", bases[0]), ("adamw", bases[1]), ("sam", optimizer)):
        each.register_step_pre_hook(lambda *_, name=name: calls.append(name))
    train(model, optimizer, by_closure, 1)
    assert calls == ["sam", "sgd", "adamw"]


def test_c31_a_loss_scaler_skips_the_step_of_all_bases():
    model = net(dropout=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = SAM(two_bases(model), rho=0.1, model=model, scaler=scaler)
    before = bits(model.parameters())
    for factor in (float("inf"), 1.0):
        for sam_pass in optimizer.passes():
            with sam_pass:
                x, y = batch(0)
                scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (bits(model.parameters()) == before) == (factor != 1.0)


def test_c31_a_new_group_names_its_base():
    model, extra = net(), nn.Linear(2, 2)
    bases = two_bases(model)
    optimizer = SAM(bases, rho=0.1, model=model)
    with pytest.raises(ValueError, match="does not say which base"):
        optimizer.add_param_group({"params": [extra.weight]})
    optimizer.add_param_group({"params": extra.weight, "base": bases[0], "lr": 0.3})
    optimizer.add_param_group({"params": [extra.bias], "base": 1, "sam_rho": 0.4})
    assert [len(base.param_groups) for base in bases] == [2, 2]
    assert [group["sam_rho"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.4]
    assert "base" not in bases[0].param_groups[1]
    with pytest.raises(ValueError, match="belongs to two of the base optimizers"):
        optimizer.add_param_group({"params": [extra.bias], "base": 0})


def test_c31_wrong_lists_of_bases_are_refused():
    model = net()
    matrices, others = halves(model)
    with pytest.raises(ValueError, match="belongs to two of the base optimizers"):
        SAM([torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(model.parameters())], rho=0.1)
    with pytest.raises(TypeError, match="the class AdamW"):
        SAM([torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW], rho=0.1)
    with pytest.raises(TypeError, match="step needs a closure"):
        SAM([torch.optim.SGD(matrices, lr=0.1), torch.optim.LBFGS(others)], rho=0.1)
    with pytest.raises(TypeError, match="two passes already"):
        SAM([torch.optim.SGD(matrices, lr=0.1), SAM(torch.optim.SGD(others, lr=0.1))], rho=0.1)
    one = torch.optim.SGD(matrices, lr=0.1)
    assert SAM([one], rho=0.1).base is one


def test_c31_one_of_several_bases_stepped_past_sam_raises_an_error():
    model = net()
    bases = two_bases(model)
    optimizer = SAM(bases, rho=0.1, model=model)
    for sam_pass in optimizer.passes():
        with sam_pass:
            x, y = batch(0)
            F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="the base optimizer's step"):
        bases[1].step()
    optimizer.step()


def test_c31_adadelta_beside_another_base_keeps_its_own_rho():
    matrices, others = halves(net())
    adadelta, sgd = torch.optim.Adadelta(matrices, rho=0.8), torch.optim.SGD(others, lr=0.1)
    optimizer = SAM([adadelta, sgd], rho=0.1)
    assert (adadelta.param_groups[0]["rho"], optimizer.param_groups[0]["sam_rho"]) == (0.8, 0.1)
    sgd.param_groups[0]["rho"] = 0.3
    with pytest.raises(ValueError, match="group 1 has a 'rho', which has no effect"):
        next(optimizer.passes())


class Averaged(torch.optim.SGD):
    """A base in the manner of schedule-free ones: eval() moves the weights away, train() moves them back."""

    in_training = True

    def train(self) -> None:
        self._move(1.0) if not self.in_training else None
        self.in_training = True

    def eval(self) -> None:
        self._move(-1.0) if self.in_training else None
        self.in_training = False

    @torch.no_grad()
    def _move(self, by: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(by)


@pytest.mark.parametrize("several", [False, True])
def test_c31_train_and_eval_reach_a_base_that_has_them(several):
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    base = Averaged([w], lr=0.1)
    optimizer = SAM([base, torch.optim.SGD([v], lr=0.1)] if several else base, rho=0.1)
    optimizer.eval()
    assert (w == 0.0).all()
    assert (v == 1.0).all()
    assert not base.in_training
    optimizer.train()
    assert (w == 1.0).all()
    assert base.in_training


def test_c31_train_and_eval_are_absent_where_the_base_has_none():
    model = net()
    for base in (torch.optim.SGD(model.parameters(), lr=0.1), two_bases(model)):
        optimizer = SAM(base, rho=0.1)
        assert not hasattr(optimizer, "train")
        assert not hasattr(optimizer, "eval")


def test_c31_eval_in_the_middle_of_a_step_raises_an_error():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(Averaged([w], lr=0.1), rho=0.1)
    w.square().sum().backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"eval\(\) was called between first_step"):
        optimizer.eval()
    optimizer.restore()
    assert (w == 1.0).all()
    optimizer.eval()
    assert (w == 0.0).all()


def test_c31_train_in_a_pass_is_ignored_unless_eval_came_before():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(Averaged([w], lr=0.1), rho=0.1)
    for sam_pass in optimizer.passes():
        with sam_pass:
            optimizer.train()  # the Hugging Face Trainer does so
            w.square().sum().backward()
    optimizer.step()
    optimizer.eval()
    for sam_pass in optimizer.passes():
        with sam_pass, pytest.raises(RuntimeError, match=r"train\(\) was called inside a pass"):
            optimizer.train()
        break


class Lookahead(torch.optim.Optimizer):
    """A wrapper with slow weights of its own, whose checkpoint has another form than torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 2) -> None:
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.count += 1
        if self.count % self.k == 0:
            for slow, p in zip(self.slow, (p for g in self.param_groups for p in g["params"]), strict=True):
                p.copy_(slow.lerp_(p, 0.5))

    def state_dict(self):
        return {"fast": self.optimizer.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, state_dict):
        fast, slow, self.count = state_dict["fast"], state_dict["slow"], state_dict["count"]
        assert set(state_dict) == {"fast", "slow", "count"}, "entries of SAM must not reach it"
        self.slow = [s.clone() for s in slow]
        self.optimizer.load_state_dict(fast)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state


def test_c31_wrapper_with_a_checkpoint_of_another_form_resumes_bit_for_bit():
    def make(model, rho=0.1):
        base = Lookahead(torch.optim.AdamW(model.parameters(), lr=0.01))
        perturbation = steppe.VarianceSuppressed()
        return SAM(base, rho=rho, model=model, perturbation=perturbation, cadence=steppe.Periodic(2))

    straight, model = net(dropout=0.0), net(dropout=0.0)
    train(straight, make(straight), by_closure, 7)
    first = make(model)
    train(model, first, by_closure, 3)
    state = saved_and_loaded(first.state_dict())
    second = make(model, rho=0.7)
    second.load_state_dict(state)
    assert second.rho == 0.1
    train(model, second, by_closure, 4, start=3)
    assert model_bits(model) == model_bits(straight)


def test_c31_wrapper_loads_its_own_checkpoint_into_sam():
    model = net()
    base = Lookahead(torch.optim.AdamW(model.parameters(), lr=0.01))
    optimizer = SAM(Lookahead(torch.optim.AdamW(model.parameters(), lr=0.02)), rho=0.3)
    optimizer.load_state_dict(base.state_dict())
    assert [(group["lr"], group["sam_rho"]) for group in optimizer.param_groups] == [(0.01, 0.3)]


class NoCheckpoint(torch.optim.SGD):
    def state_dict(self):
        raise NotImplementedError("averaging has no checkpoint")


class CopiedGroups(torch.optim.SGD):
    @property
    def param_groups(self):
        return [dict(group) for group in self.groups]

    @param_groups.setter
    def param_groups(self, groups):
        self.groups = groups


class WithoutState(torch.optim.SGD):
    state = property(lambda self: self.no_such_thing, lambda self, value: None)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (NoCheckpoint, "averaging has no checkpoint"),
        (WithoutState, "it has no state"),
    ],
)
def test_c31_wrapper_without_what_sam_needs_is_refused_at_construction(base, reason):
    with pytest.raises(TypeError, match=reason):
        SAM(base([nn.Parameter(torch.ones(2))], lr=0.1), rho=0.1)


def test_c31_wrapper_whose_groups_are_copies_is_refused_at_construction():
    base = CopiedGroups.__new__(CopiedGroups)
    base.groups = []
    torch.optim.SGD.__init__(base, [nn.Parameter(torch.ones(2))], lr=0.1)
    inner = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    base.groups = inner.param_groups
    with pytest.raises(TypeError, match="param_groups are copies"):
        SAM(base, rho=0.1)


class KeepsPerSample(torch.optim.SGD):
    """A base that clears more than ``.grad``, with the signature of some wrappers."""

    cleared = 0

    def zero_grad(self):
        self.cleared += 1
        super().zero_grad()


@pytest.mark.parametrize("several", [False, True])
def test_c31_zero_grad_reaches_a_base_with_one_of_its_own(several):
    w, v = parameter(1.0), parameter(1.0)
    base = KeepsPerSample([w] if several else [w, v], lr=0.1)
    optimizer = SAM([base, torch.optim.SGD([v], lr=0.1)] if several else base, rho=0.1)
    by_closure(optimizer, lambda: (w * v).sum())
    assert base.cleared == 2, "once a pass, in the closure"
    optimizer.zero_grad()
    assert base.cleared == 3
    assert w.grad is None
    assert v.grad is None


class OfSecondOrder(torch.optim.Optimizer):
    """Differentiates the gradient in its step, as AdaHessian does."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        p = self.param_groups[0]["params"][0]
        with torch.enable_grad():
            torch.autograd.grad(p.grad.sum(), p)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_base_that_differentiates_the_gradient_names_the_method_that_has_the_hessian():
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = steppe.SAM(OfSecondOrder([w]), rho=0.1)
    for sam_pass in optimizer.passes():
        with sam_pass:
            w.pow(4).sum().backward(create_graph=True)
    with pytest.raises(RuntimeError, match=r"weights were restored.*steppe\.variants\.sassha"):
        optimizer.step()
    assert w.tolist() == [1.0, 2.0]
