import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import CPU, batches_of, dataset, make_task, recipe, train_run, untimed
from torch import Tensor, nn

from steppe.experiments.config import methods
from steppe.experiments.config.methods import METHODS
from steppe.experiments.config.recipe import Run
from steppe.experiments.tasks.batches import Batch
from steppe.experiments.training.forward import Forward
from steppe.experiments.world import World
from steppe.methods._step_function import StepFunction


class Forgetful(StepFunction):
    def step(self, forward: Forward, batch: Batch) -> Tensor:
        return torch.zeros(())


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = dataclasses.replace(METHODS["sgd"], label="Forgetful", step_function=Forgetful)
    monkeypatch.setattr(methods, "METHODS", {**METHODS, "forgetful": mine})


def make_run(method: str, **fields: object) -> Run:
    return next(recipe(methods=(method,), **fields).runs())


def test_second_pass_on_a_fraction_costs_a_fraction(tmp_path: Path) -> None:
    records = train_run(make_run("fraction_sam:fraction=0.5", eval_every=1, batch_size=12), tmp_path)
    assert records[0].gradient_evaluations == 12 * 1.5 * 4
    assert [r.passes for r in records] == pytest.approx([1.5] * 4)


def test_fraction_one_is_sam(tmp_path: Path) -> None:
    whole = train_run(make_run("fraction_sam:fraction=1.0"), tmp_path / "fraction")
    assert untimed(whole) == untimed(train_run(make_run("sam"), tmp_path / "sam"))


def test_a_pass_without_backward_counts_a_third(tmp_path: Path) -> None:
    records = train_run(make_run("esam", eval_every=1, batch_size=12), tmp_path)
    assert [r.passes for r in records] == pytest.approx([1 + 1 / 3 + 1 / 2] * 4)
    assert all(r.standardized_epoch * 72 <= r.gradient_evaluations < r.standardized_epoch * 72 + 22 for r in records)


PAST = "saf:epochs_ago=1,start=1,lmbda={}"


AVERAGE = "mesa:beta=0.5,start=1,lmbda={}"


@pytest.mark.parametrize("method", [PAST, AVERAGE])
def test_the_term_in_the_loss_changes_the_run(method: str, tmp_path: Path) -> None:
    with_it, without = (
        train_run(make_run(method.format(2)), tmp_path / "a"),
        train_run(make_run(method.format(0)), tmp_path / "b"),
    )
    assert with_it[-1]["train_loss"] != without[-1]["train_loss"]
    if method == PAST:
        plain = untimed(train_run(make_run("sgd"), tmp_path / "c"))
        assert untimed(without) == [pytest.approx(r, rel=1e-4) for r in plain]
    else:  # the averaged weights' passes, from epoch 1 on
        assert [r.gradient_evaluations for r in with_it] == pytest.approx(
            [72 + (72 * r.epoch - 72) * 4 / 3 for r in with_it]
        )


def test_micro_batches_cost_as_much_as_whole_batches(tmp_path: Path) -> None:
    whole, parts = (
        train_run(make_run("micro_batch_sam:m=16"), tmp_path / "a"),
        train_run(make_run("micro_batch_sam:m=5"), tmp_path / "b"),
    )
    assert [r.passes for r in parts] == [2.0, 2.0]
    assert whole[-1]["train_loss"] == pytest.approx(
        train_run(make_run("sam"), tmp_path / "c")[-1]["train_loss"], rel=1e-4
    )
    assert whole[-1]["train_loss"] != parts[-1]["train_loss"]


def test_a_step_function_that_bypasses_forward_raises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Forgetful took a step without .* never end"):
        train_run(make_run("forgetful"), tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3])
@torch.no_grad()
def test_the_shares_of_a_batch_add_up_to_its_mean(size: int) -> None:
    """What processes average is the mean over the whole batch, by each of the three ways to a loss."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    train, task = dataset().train, make_task()(recipe())
    means = {"call": 0.0, "losses": 0.0, "mean": 0.0, "first": 0.0}
    for rank in range(size):
        world = dataclasses.replace(CPU, rank=rank, size=size)
        batch = next(batches_of(train, 16, world=world))
        forward = Forward(task, model, batch, world, nullcontext)
        means["call"] += float(forward(*batch.tensors)) / size
        means["losses"] += float(forward.losses(*batch.tensors).mean()) / size
        logits = forward.logits(batch.inputs)
        means["mean"] += float(forward.mean(F.cross_entropy(logits, batch.targets, reduction="none"))) / size
        # the same image again and again: a part that a process takes stands for its whole share
        means["first"] += float(forward(*(t[:1].repeat(3, *[1] * (t.dim() - 1)) for t in batch.tensors))) / size
    whole = next(batches_of(train, 16))
    losses = F.cross_entropy(model(whole.inputs), whole.targets, reduction="none")
    for way in ("call", "losses", "mean"):
        assert means[way] == pytest.approx(float(losses.mean()), rel=1e-5)
    shares = [World(CPU.device, rank, size).share(whole.size) for rank in range(size)]
    stands_for = sum(float(losses[share][0]) * (share.stop - share.start) / whole.size for share in shares)
    assert means["first"] == pytest.approx(stands_for, rel=1e-5)
