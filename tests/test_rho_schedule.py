"""Schedules of rho: compared with torch's schedules of the learning rate, and resumed from checkpoints."""

import pytest
import torch
from torch.optim import lr_scheduler

import steppe
from steppe import rho_schedule
from steppe.rho_schedule import CosineRho, LinearRho, ProportionalRho, WarmupRho
from support import by_closure, model_bits, net, saved_and_loaded, train

STEPS = 8


def sgd(lr=0.5):
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=lr)


def wrapped(rho=0.5, lr=0.5):
    return steppe.SAM(sgd(lr), rho=rho)


def radii(optimizer):
    return [group["sam_rho"] for group in optimizer.param_groups]


# A schedule of rho, and the schedule of torch that gives a learning rate of 0.5 the same course.
PAIRS = {
    "linear": (
        lambda o: LinearRho(o, STEPS, end=0.1),
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=STEPS),
    ),
    "cosine": (
        lambda o: CosineRho(o, STEPS, end=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.1),
    ),
    "warmup": (
        lambda o: WarmupRho(o, STEPS, start=0.1),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, end_factor=1.0, total_iters=STEPS),
    ),
}


def courses(name):
    ours, theirs = PAIRS[name]
    sam, other = wrapped(), sgd()
    schedule, reference = ours(sam), theirs(other)
    for _ in range(STEPS + 1):
        yield radii(sam)[0], other.param_groups[0]["lr"]
        other.step()
        reference.step()
        schedule.step()


@pytest.mark.parametrize("name", PAIRS)
def test_rho_follows_the_course_of_torchs_learning_rate_schedule(name):
    for ours, theirs in courses(name):
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shift", [-1, 1])
def test_mutant_off_by_one_step_is_killed(monkeypatch, name, shift):
    for kind in (LinearRho, CosineRho, WarmupRho):
        right = kind.rho_at
        monkeypatch.setattr(
            kind, "rho_at", lambda self, step, *rest, right=right: right(self, max(step + shift, 0), *rest)
        )
    with pytest.raises(AssertionError):
        test_rho_follows_the_course_of_torchs_learning_rate_schedule(name)


@pytest.mark.parametrize("name", PAIRS)
def test_rho_is_constant_after_the_last_step(name):
    sam = wrapped()
    schedule = PAIRS[name][0](sam)
    for _ in range(STEPS):
        schedule.step()
    last = radii(sam)
    for _ in range(3):
        schedule.step()
        assert radii(sam) == schedule.get_last_rho() == last


def test_proportional_rho_follows_the_learning_rate():
    sam = wrapped(lr=0.5)
    learning = lr_scheduler.CosineAnnealingLR(sam, T_max=STEPS, eta_min=0.1)
    schedule = ProportionalRho(sam, rho_max=0.9, rho_min=0.3, lr_max=0.5, lr_min=0.1)
    same = wrapped(rho=0.9)
    cosine = CosineRho(same, STEPS, end=0.3)  # proportional to a cosine is a cosine
    for _ in range(STEPS + 1):
        lr, rho = sam.param_groups[0]["lr"], radii(sam)[0]
        assert (rho - 0.3) / (0.9 - 0.3) == pytest.approx((lr - 0.1) / (0.5 - 0.1), abs=1e-12)
        assert rho == pytest.approx(radii(same)[0], rel=1e-12)
        sam._opt_called = True  # set by a step; torch warns without it
        learning.step()
        schedule.step()
        cosine.step()
    assert radii(sam)[0] < 0.5


@pytest.mark.parametrize(("lr", "rho"), [(0.0, 0.3), (0.05, 0.3), (0.3, 0.6), (9.0, 0.9)])
@pytest.mark.parametrize("tensor", [False, True])
def test_proportional_rho_stays_in_its_range(lr, rho, tensor):
    sam = wrapped(lr=torch.tensor(lr, dtype=torch.float64) if tensor else lr)
    ProportionalRho(sam, rho_max=0.9, rho_min=0.3, lr_max=0.5, lr_min=0.1)
    assert float(radii(sam)[0]) == pytest.approx(rho, rel=1e-12)


def test_perturbation_has_the_scheduled_norm():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    sam = steppe.SAM(torch.optim.SGD([w], lr=0.0), rho=0.4)
    schedule = WarmupRho(sam, 4)
    visited = []

    def closure():
        sam.zero_grad()
        visited.append(w.detach().clone())
        loss = w.square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        sam.step(closure)
        schedule.step()
    norms = [float((b - a).norm()) for a, b in zip(visited[::2], visited[1::2], strict=True)]
    assert norms == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=1e-12)


def test_groups_keep_their_own_radii_and_added_groups_are_scheduled():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    base = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:2], "sam_rho": 0.2}], lr=0.1)
    sam = steppe.SAM(base, rho=0.4)
    schedule = LinearRho(sam, 4)
    schedule.step()
    assert radii(sam) == pytest.approx([0.3, 0.15])
    sam.add_param_group({"params": parameters[2:], "sam_rho": 1.0})
    schedule.step()
    assert radii(sam) == pytest.approx([0.2, 0.1, 0.5])
    assert radii(sam.base) == radii(sam)


def test_tensor_radius_is_changed_in_place():
    rho = torch.tensor(0.5)
    sam = wrapped(rho=rho)
    radius = radii(sam)[0]
    for make in (lambda: LinearRho(sam, 2), lambda: ProportionalRho(sam, 0.9, 0.1, lr_max=1.0)):
        schedule = make()
        schedule.step()
        assert radii(sam)[0] is radius
    assert float(radius) == pytest.approx(0.5)


def test_one_tensor_as_the_radius_of_several_groups_is_scheduled_group_by_group():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 0.5, 0.25), strict=True)]
    sam = steppe.SAM(torch.optim.SGD(groups[:2]), rho=torch.tensor(0.4))
    before = sam.state_dict()
    schedule = ProportionalRho(sam, 0.8, 0.0, lr_max=1.0)
    assert radii(sam) == pytest.approx([0.8, 0.4])
    sam.load_state_dict(before)
    schedule.step()
    assert radii(sam) == pytest.approx([0.8, 0.4])
    sam.load_state_dict(before)
    schedule.load_state_dict(schedule.state_dict())
    assert radii(sam) == pytest.approx([0.8, 0.4])
    sam.add_param_group(groups[2])
    schedule.step()
    assert radii(sam) == pytest.approx([0.8, 0.4, 0.2])


def test_schedule_of_a_group_that_was_removed_raises_until_its_radius_is_deleted():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    base = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "sam_rho": 0.2}], lr=0.1)
    sam = steppe.SAM(base, rho=0.4)
    schedule = LinearRho(sam, 4)
    del sam.param_groups[0]
    with pytest.raises(RuntimeError, match=r"a group was removed.*schedule\.initial_rhos"):
        schedule.step()
    del schedule.initial_rhos[0]
    schedule.step()
    assert radii(sam) == pytest.approx([0.15])


# Checkpoints.

ALL = {**{name: ours for name, (ours, _) in PAIRS.items()}, "proportional": lambda o: ProportionalRho(o, 0.9, 0.3, 0.5)}


def build(model, name, tensor):
    base = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    sam = steppe.SAM(base, rho=torch.tensor(0.5) if tensor else 0.5, model=model)
    # The schedule of rho steps before that of the learning rate, so that rho cannot be derived from the loaded rate.
    return sam, ALL[name](sam), lr_scheduler.ExponentialLR(sam, gamma=0.8)


def train_with_schedules(model, sam, schedule, learning, first, last):
    for step in range(first, last):
        train(model, sam, by_closure, 1, start=step)
        schedule.step()
        learning.step()


@pytest.mark.parametrize("schedule_first", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_schedule_resumes_bit_for_bit(name, tensor, schedule_first):
    straight = net(dropout=0.0)
    train_with_schedules(straight, *build(straight, name, tensor), 0, 6)
    model = net(dropout=0.0)
    parts = build(model, name, tensor)
    train_with_schedules(model, *parts, 0, 3)
    saved_model, *saved = saved_and_loaded([model.state_dict(), *(part.state_dict() for part in parts)])
    fresh = net(seed=9, dropout=0.0)
    fresh.load_state_dict(saved_model)
    new_parts = build(fresh, name, tensor)
    pairs = list(zip(new_parts, saved, strict=True))
    for part, state in reversed(pairs) if schedule_first else pairs:
        part.load_state_dict(state)
    assert radii(new_parts[0]) == radii(parts[0])
    train_with_schedules(fresh, *new_parts, 3, 6)
    assert model_bits(fresh) == model_bits(straight)


@pytest.mark.parametrize("lost", ["last_step", "initial_rhos"])
def test_mutant_incomplete_checkpoint_is_killed(monkeypatch, lost):
    right = rho_schedule.RhoSchedule.state_dict
    original = wrapped()
    fresh_value = right(LinearRho(original, STEPS, end=0.1))[lost]
    if lost == "initial_rhos":
        fresh_value = [0.4]
    monkeypatch.setattr(rho_schedule.RhoSchedule, "state_dict", lambda self: {**right(self), lost: fresh_value})
    with pytest.raises(AssertionError):
        test_schedule_resumes_bit_for_bit("linear", False, False)


def test_state_dict_holds_copies():
    sam = wrapped(rho=torch.tensor(0.5))
    schedule = LinearRho(sam, 2)
    state = schedule.state_dict()
    schedule.step()
    assert float(state["_last_rho"][0]) == 0.5
    schedule.load_state_dict(state)
    schedule.step()
    assert float(state["_last_rho"][0]) == 0.5


def test_checkpoint_of_another_schedule_or_optimizer_raises():
    unnamed = LinearRho(wrapped(), 3).state_dict()
    del unnamed["schedule"]  # a checkpoint of version 0.2
    LinearRho(wrapped(), 3).load_state_dict(unnamed)
    with pytest.raises(ValueError, match="it is of another schedule"):
        WarmupRho(wrapped(), 3).load_state_dict(unnamed)
    with pytest.raises(ValueError, match="this checkpoint is of LinearRho, and cannot be loaded into CosineRho"):
        CosineRho(wrapped(), 3).load_state_dict(LinearRho(wrapped(), 3).state_dict())
    two = steppe.SAM(torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=0.1))
    with pytest.raises(ValueError, match="radii of 1 groups, and the optimizer has 2 groups"):
        LinearRho(two, 3).load_state_dict(LinearRho(wrapped(), 3).state_dict())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearRho(sgd(), 3), ValueError, "wrap the optimizer in steppe.SAM first"),
        (lambda: CosineRho("sam", 3), TypeError, "needs an optimizer, got str"),
        (lambda: ProportionalRho(None, 1, 0, 1), TypeError, "needs an optimizer, got NoneType"),
        (lambda: LinearRho(wrapped(), 0), ValueError, "total_steps must be 1 or more"),
        (lambda: WarmupRho(wrapped(), 2.5), ValueError, "total_steps must be a whole number"),
        (lambda: LinearRho(wrapped(), 3, end=-0.1), ValueError, "end must be finite and not negative"),
        (lambda: CosineRho(wrapped(), 3, end=float("nan")), ValueError, "end must be finite and not negative"),
        (lambda: WarmupRho(wrapped(), 3, start=-1.0), ValueError, "start must be finite and not negative"),
        (lambda: ProportionalRho(wrapped(), -1, 0, 1), ValueError, "rho_max must be finite and not negative"),
        (lambda: ProportionalRho(wrapped(), 0.1, 0.2, 1), ValueError, "rho_min must not exceed rho_max"),
        (lambda: ProportionalRho(wrapped(), 1, 0, 0.1, 0.1), ValueError, "0 <= lr_min < lr_max"),
    ],
)
def test_wrong_schedule_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_schedule_with_wrong_arguments_leaves_the_radius_unchanged():
    sam = wrapped(rho=0.5)
    with pytest.raises(ValueError, match="end must be"):
        LinearRho(sam, 3, end=-1.0)
    assert radii(sam) == [0.5]
