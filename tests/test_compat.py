"""The classic API: code for the well-known implementation runs after a change of one import."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from reference import sam_e, trajectory
from steppe import Adaptive, LInf, rho_schedule
from steppe.compat import SAM, disable_bn_stats, disable_running_stats, enable_bn_stats, enable_running_stats
from support import batch, by_classic, model_bits, net


def test_classic_loop_keeps_the_statistics_of_the_first_pass():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.0)
    for step in range(3):
        x, y = batch(step)
        enable_bn_stats(model)
        F.cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        disable_bn_stats(model)
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        F.cross_entropy(twin(x), y).backward()
    enable_bn_stats(model)
    assert model_bits(model) == model_bits(twin)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("adaptive", [False, True])
def test_classic_rules_match_the_reference(adaptive):
    L = lambda w: (w**3).sum() + w.prod()  # noqa: E731
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def perturb(w, g):  # the classic ASAM has no eta
        return w**2 * g * 0.5 / (w.abs() * g).norm() if adaptive else sam_e(w, g, 0.5)

    base = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)  # noqa: E731
    w = nn.Parameter(start.clone())
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, adaptive=adaptive, lr=1e-3, momentum=0.9)
    for _ in range(20):
        by_classic(optimizer, lambda: L(w))
    torch.testing.assert_close(w.detach(), trajectory(L, start, perturb, base, 20), rtol=1e-12, atol=1e-12)


def test_classic_constructor_arguments():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM([w], torch.optim.SGD, 0.1, False, lr=0.3)
    assert (optimizer.param_groups[0]["sam_rho"], optimizer.base_optimizer.param_groups[0]["lr"]) == (0.1, 0.3)
    assert SAM([w], base_optimizer=torch.optim.AdamW, lr=0.3).base_optimizer.defaults["lr"] == 0.3
    assert SAM([{"params": [w], "rho": 0.7}], torch.optim.SGD, lr=0.1).param_groups[0]["sam_rho"] == 0.7
    calls = []
    optimizer.step(lambda: (calls.append(1), optimizer.zero_grad(), w.square().sum().backward())[0])
    assert len(calls) == 2
    assert copy.deepcopy(optimizer).base_optimizer.defaults["lr"] == 0.3


def test_classic_step_calls_the_closure_for_the_second_pass_only():
    L = lambda w: (w**3).sum() + w.prod()  # noqa: E731
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    base = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)  # noqa: E731
    w = nn.Parameter(start.clone())
    optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=1e-3, momentum=0.9)
    calls, hooks = [], []
    optimizer.register_step_pre_hook(lambda *_: hooks.append(1))

    def closure():  # step() clears the gradient between the passes
        calls.append(1)
        loss = L(w)
        loss.backward()
        return loss

    for _ in range(20):
        L(w).backward()
        optimizer.step(closure)
        optimizer.zero_grad()
    want = trajectory(L, start, lambda w, g: sam_e(w, g, 0.5), base, 20)
    torch.testing.assert_close(w.detach(), want, rtol=1e-12, atol=1e-12)
    assert len(calls) == len(hooks) == 20
    before = w.detach().clone()
    L(w).backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.equal(w, before)
    optimizer.zero_grad()


def test_radius_written_into_the_group_takes_effect():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.0)
    optimizer.param_groups[0]["rho"] = 2.0
    w.square().sum().backward()
    optimizer.first_step(zero_grad=True)
    torch.testing.assert_close(w.detach(), torch.tensor([4.2, 5.6]))
    optimizer.restore()


NORMS = {"batch": nn.BatchNorm1d, "cumulative": lambda n: nn.BatchNorm1d(n, momentum=None), "sync": nn.SyncBatchNorm}


@pytest.mark.parametrize("norm", NORMS)
def test_disabled_statistics_stay_and_enabled_statistics_change(norm):
    layer, untouched = NORMS[norm](3), NORMS[norm](3)
    x = torch.randn(8, 3)
    before = model_bits(layer)
    disable_bn_stats(layer)
    disable_bn_stats(layer)
    torch.testing.assert_close(layer(x), untouched(x), msg="batch statistics are still used")
    assert model_bits(layer) == before
    assert model_bits(untouched) != before
    enable_bn_stats(layer)
    enable_bn_stats(layer)
    layer(x)
    assert model_bits(layer) == model_bits(untouched)
    disable_bn_stats(layer)
    layer.eval()
    torch.testing.assert_close(layer(x), untouched.eval()(x), msg="in eval mode the running statistics are used")


def test_layers_frozen_before_stay_frozen():
    stateless = nn.BatchNorm1d(3, track_running_stats=False)
    switched_off = nn.BatchNorm1d(3)
    switched_off.track_running_stats = False
    zero = nn.BatchNorm1d(3, momentum=0.0)
    model = nn.Sequential(stateless, switched_off, zero)
    disable_bn_stats(model)
    enable_bn_stats(model)
    assert [m.track_running_stats for m in model] == [False, False, True]
    assert zero.momentum == 0.0


def test_copy_made_while_disabled_can_be_enabled():
    layer = nn.BatchNorm1d(3)
    disable_running_stats(layer)
    other = copy.deepcopy(layer)
    enable_running_stats(layer)
    enable_running_stats(other)
    other(torch.randn(8, 3))
    assert layer.num_batches_tracked == 0
    assert other.num_batches_tracked == 1


def test_group_keys_of_the_classic_implementation_are_read_and_written():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.0)
    group = optimizer.param_groups[0]
    assert (group["rho"], group.get("rho"), group["adaptive"]) == (0.1, 0.1, False)
    assert (optimizer.defaults["rho"], optimizer.defaults["adaptive"]) == (0.1, False)
    for group in optimizer.param_groups:
        group["rho"] *= 5
    assert (optimizer.param_groups[0]["sam_rho"], optimizer.rho) == (0.5, 0.5)
    schedule = rho_schedule.LinearRho(optimizer, total_steps=2)
    schedule.step()
    assert group["rho"] == 0.25
    optimizer.rho = 2.0
    assert group["rho"] == 2.0
    with pytest.raises(KeyError):
        group["rho_"]


def test_radius_is_read_and_written_after_a_checkpoint_and_in_a_copy():
    optimizer = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    by_classic(optimizer, lambda: optimizer.param_groups[0]["params"][0].sum())
    other = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.7, adaptive=True, lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    assert [(g["rho"], g["adaptive"]) for g in other.param_groups] == [(0.1, False)]
    twin = copy.deepcopy(other)
    twin.param_groups[0]["rho"] = 0.3
    assert (twin.rho, other.rho) == (0.3, 0.1)
    other.base_optimizer.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["rho"] = 0.4
    assert other.base_optimizer.param_groups[0]["sam_rho"] == 0.4
    other.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": 0.2})
    other.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert [(g["rho"], g["adaptive"]) for g in other.param_groups[1:]] == [(0.2, True), (0.7, True)]


def test_norm_of_the_gradient_is_readable_under_its_name_in_the_classic_implementation():
    a, b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in ([3.0, -1.0], [2.0]))
    groups = [{"params": [a], "adaptive": True}, {"params": [b]}]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1)
    (0.5 * a.square().sum() + 3.0 * b.sum()).backward()
    assert optimizer._grad_norm().item() == pytest.approx((9.0**2 + 1.0**2 + 3.0**2) ** 0.5, rel=1e-12)


def test_adaptive_is_chosen_group_by_group():
    a, b = (nn.Parameter(torch.full((2,), 3.0, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [a], "adaptive": True}, {"params": [b], "adaptive": False}]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.5, lr=0.1)
    (a.sum() + b.sum()).backward()
    optimizer.first_step()
    norm = (2 * 9 + 2) ** 0.5
    assert a[0].item() == pytest.approx(3 + 0.5 * 9 / norm)
    assert b[0].item() == pytest.approx(3 + 0.5 / norm)
    optimizer.restore()
    for group in optimizer.param_groups:
        group["adaptive"] = True
    assert copy.deepcopy(optimizer).perturbation == Adaptive(eta=0.0)
    with pytest.raises(AttributeError, match="chosen by group"):
        optimizer.perturbation = LInf()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_old_weights_are_readable_between_the_two_steps(base):
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM([w], base, rho=1.0, lr=0.1)
    before = w.detach().clone()
    w.square().sum().div(2).backward()
    optimizer.first_step(zero_grad=True)
    torch.testing.assert_close(w - optimizer.state[w]["old_p"], torch.tensor([0.6, 0.8]))
    assert torch.equal(optimizer.state[w]["old_p"], before)
    w.square().sum().div(2).backward()
    optimizer.second_step(zero_grad=True)
    assert "old_p" not in optimizer.state[w]
    assert not any("old_p" in state for state in optimizer.state_dict()["state"].values())


def test_checkpoint_of_the_classic_implementation_loads():
    """It holds w in the place of the base's state, and the classic keys in the groups."""
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM([w], torch.optim.Adam, rho=0.05, lr=0.1)
    group = torch.optim.Adam([w], lr=0.2).state_dict()["param_groups"][0]
    classic = {
        "state": {0: {"old_p": torch.zeros(2)}},
        "param_groups": [{**group, "rho": 0.3, "adaptive": True}],
    }
    optimizer.load_state_dict(classic)
    loaded = optimizer.param_groups[0]
    assert (loaded["rho"], loaded["adaptive"], loaded["lr"]) == (0.3, True, 0.2)
    by_classic(optimizer, lambda: w.square().sum())
    assert "exp_avg" in optimizer.state[w]


def _zero_by_hand(optimizer, model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()


CLEARED = {
    "optimizer": lambda optimizer, model: optimizer.zero_grad(set_to_none=False),
    "model": lambda optimizer, model: model.zero_grad(set_to_none=False),
    "by hand": _zero_by_hand,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("clear", CLEARED)
def test_gradient_of_zeros_is_no_first_pass(clear, when):
    model = nn.Linear(3, 2).double()
    twin = copy.deepcopy(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    reference = steppe.SAM(torch.optim.SGD(twin.parameters(), lr=0.1), rho=0.5)
    x = torch.randn(4, 3).double()
    for _ in range(3):
        calls = []

        def closure():
            calls.append(1)  # noqa: B023
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        if when == "before":
            CLEARED[clear](optimizer, model)
        optimizer.step(closure)
        if when == "after":
            CLEARED[clear](optimizer, model)
        assert len(calls) == 2
        by_classic(reference, lambda: twin(x).square().sum())
    assert model_bits(model) == model_bits(twin)


def test_group_is_read_and_written_under_both_names_of_the_radius_in_every_way_of_a_dict():
    optimizer = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.05, lr=0.1)
    group = optimizer.param_groups[0]
    group.update(rho=5.0)
    assert (group["rho"], group["sam_rho"], optimizer.rho) == (5.0, 5.0, 5.0)
    group.update({"rho": 4.0}, lr=0.2)
    assert (group["sam_rho"], group["lr"]) == (4.0, 0.2)
    group |= {"rho": 3.0}
    assert group["sam_rho"] == 3.0
    assert group.pop("rho") == 3.0
    assert "sam_rho" not in group
    group["rho"] = 2.0
    del group["rho"]
    assert group.pop("rho", None) is None


def test_checkpoint_of_asam_does_not_load_as_sam():
    classic = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=2.0, adaptive=True, lr=0.1)
    plain = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=2.0, lr=0.1)
    optimizer = steppe.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(ValueError, match="of ASAM in the classic implementation"):
        optimizer.load_state_dict(classic.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.rho == 2.0


class HiddenRho(torch.optim.Adadelta):
    """Adadelta with a signature that does not name its options."""

    def __init__(self, params, **options) -> None:
        super().__init__(params, **options)


@pytest.mark.parametrize("sam", [SAM, steppe.SAM])
@pytest.mark.parametrize("base", [torch.optim.Adadelta, HiddenRho])
def test_base_with_a_rho_of_its_own_is_refused_also_if_its_signature_hides_it(sam, base):
    with pytest.raises(TypeError, match="has a 'rho' of its own"):
        sam(nn.Linear(2, 1).parameters(), base, rho=0.05, lr=1.0)
