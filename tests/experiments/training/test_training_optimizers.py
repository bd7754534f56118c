"""The optimizer of a run: schedules against torch's stepped by hand, clipping, other bases, the task's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from own_tasks import classifier, data, run_of
from tiny import CPU
from torch import nn
from torch.optim import SGD, lr_scheduler

from steppe import SAM
from steppe.experiments.config.methods import BASES
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.run import Training, train

STEPS = 16  # four epochs of four batches


def rates(task: Task | None = None, method: str = "base", **options: Any) -> list[float]:
    """The learning rate of each step of a run."""
    task, found = task or classifier(), list[float]()
    training = Training(run_of(task, method, epochs=4, **options), task, CPU)
    training.optimizer.register_step_pre_hook(lambda optimizer, *_: found.append(optimizer.param_groups[0]["lr"]))
    while not training.finished:
        for batch in training.rest_of_epoch():
            training.step(batch)
            if training.finished:
                break
    return found


def by_hand(make: Any, steps: int = STEPS) -> list[float]:
    optimizer, found = SGD([nn.Parameter(torch.zeros(1))], lr=0.1), []
    scheduler = make(optimizer)
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # of SequentialLR itself, on torch 2.6
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
        ({"schedule": "linear"}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS)),
        (
            {"schedule": "one-cycle"},
            lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS, cycle_momentum=False),
        ),
        ({"warmup": 0.25}, lambda o: lr_scheduler.LinearLR(o, 0.01, 1.0, 4)),
        (
            {"schedule": "cosine", "warmup": 0.25},
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, 0.01, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 12)], [4]
            ),
        ),
    ],
)
def test_schedule_is_that_of_torch_over_the_planned_steps(options: dict[str, Any], wanted: Any) -> None:
    task = classifier(optimizer=lambda model: SGD(model.parameters(), lr=0.1))
    steps = STEPS - 1 if options.get("schedule") == "one-cycle" else STEPS  # which raises in its last step
    assert rates(task, **options)[:steps] == by_hand(wanted, steps)


def test_schedule_of_sam_ends_after_half_the_steps() -> None:
    found = rates(method="sam", schedule="linear")
    assert found == by_hand(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS // 2), STEPS // 2)


def test_schedule_of_the_task_is_a_function_of_the_optimizer_and_the_planned_steps() -> None:
    task = classifier(schedule=lambda optimizer, steps: lr_scheduler.PolynomialLR(optimizer, steps, power=2))
    assert rates(task, schedule="own") == by_hand(lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=2))


@pytest.mark.parametrize(
    ("made", "wanted"), [(None, "the task has no schedule="), (lambda *_: 3, "schedule= returned int")]
)
def test_wrong_schedule_raises(made: Any, wanted: str) -> None:
    task = classifier(schedule=made)
    with pytest.raises(ExperimentError, match=wanted):
        Training(run_of(task, schedule="own"), task, CPU)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["base", "sam"])
def test_every_base_takes_the_place_of_the_task_s_own(base: str, method: str, tmp_path: Path) -> None:
    task = classifier()
    training = Training(run_of(task, method, base=base, lr=0.01, weight_decay=0.001), task, CPU)
    inner = training.optimizer.base if isinstance(training.optimizer, SAM) else training.optimizer
    assert type(inner).__name__.lower() == base
    assert (inner.param_groups[0]["lr"], inner.param_groups[0]["weight_decay"]) == (0.01, 0.001)
    training.step(next(training.rest_of_epoch()))


def test_nesterov_and_momentum_reach_sgd() -> None:
    task = classifier()
    training = Training(run_of(task, "base", base="sgd", lr=0.1, momentum=0.8, nesterov=True), task, CPU)
    group = training.optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.8, True)


def test_lr_and_weight_decay_replace_those_of_the_task_s_own_optimizer() -> None:
    task = classifier()
    for method in ("base", "sam"):
        group = Training(run_of(task, method, lr=0.3, weight_decay=0.2), task, CPU).optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.3, 0.2, 0.9)


def test_another_base_without_a_learning_rate_raises() -> None:
    task = classifier()
    with pytest.raises(ExperimentError, match="base=adamw in the place of the task's own optimizer needs a learning"):
        Training(run_of(task, base="adamw"), task, CPU)


@pytest.mark.parametrize("method", ["base", "sam"])
def test_clipping_limits_the_update_gradient(method: str) -> None:
    def moved(clip: float | None) -> float:
        task = classifier(optimizer=lambda model: SGD(model.parameters(), lr=1.0))
        training = Training(run_of(task, method, clip=clip), task, CPU)
        before = [p.detach().clone() for p in training.network.parameters()]
        training.step(next(training.rest_of_epoch()))
        change = [p.detach() - w for p, w in zip(training.network.parameters(), before, strict=True)]
        return float(torch.cat([c.flatten() for c in change]).norm())

    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved(None) == pytest.approx(moved(1e6))
    assert moved(None) > 0.1


def test_diverged_run_of_a_task_says_so(tmp_path: Path) -> None:
    inputs, labels = data()
    task = classifier(train=(inputs, labels), optimizer=lambda model: SGD(model.parameters(), lr=1e30))
    with pytest.raises(ExperimentError, match="diverged in epoch"):
        train(run_of(task, "base", epochs=6), tmp_path, task, CPU)
