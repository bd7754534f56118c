"""Methods for adapters on two processes: they equal one process on both batches, or raise an error."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ranks import start_ranks

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from tiny_peft import IGNORED_WARNINGS, adapted, closeness, sentences, trained

from steppe.integrations.peft import bar, flat_lora, merged_sam

pytestmark = IGNORED_WARNINGS
RHO, STEPS = 0.5, 4
METHODS = {
    "merged_sam": lambda base, model: merged_sam(base, RHO, model=model),
    "flat_lora": lambda base, model: flat_lora(base, RHO, total_steps=2 * STEPS, model=model),
    "bar": lambda base, model: bar(base, alpha=5.0, model=model),
}
EACH = pytest.mark.parametrize("method", METHODS)


def sgd(model):
    return torch.optim.SGD(trained(model), lr=0.1, momentum=0.9)


def take_steps(optimizer, losses):
    """Take the steps; ``losses(step)`` returns functions whose mean is the loss."""
    for step in range(STEPS):
        for sam_pass in optimizer.passes():
            with sam_pass:
                parts = losses(step)
                for loss in parts:
                    (loss() / len(parts)).backward()
        optimizer.step()


def on_ranks(method: str, given: str) -> list[torch.Tensor]:
    rank = torch.distributed.get_rank()
    model, batches = adapted(dropout=0.0), sentences(2 * STEPS)
    replica = DistributedDataParallel(model)
    optimizer = METHODS[method](sgd(model), replica if given == "replica" else model)
    take_steps(optimizer, lambda step: [lambda: replica(**batches[2 * step + rank]).loss])
    return [p.detach() for p in trained(model)]


def on_one_process(model, method, batches):
    take_steps(
        METHODS[method](sgd(model), model),
        lambda step: [lambda b=b: model(**b).loss for b in batches[2 * step : 2 * step + 2]],
    )


@pytest.mark.parametrize("given", ["replica", "module"])
@EACH
def test_two_replicas_equal_one_process(method, given):
    start = adapted(dropout=0.0)
    model, found, plain = (copy.deepcopy(start) for _ in range(3))
    one, two = start_ranks()(on_ranks, method, given)
    assert all(map(torch.equal, one, two)), "the replicas must have the same bits"
    with torch.no_grad():
        for p, value in zip(trained(found), one, strict=True):
            p.copy_(value)
    on_one_process(model, method, sentences(2 * STEPS))
    take_steps_of_base(plain, sentences(2 * STEPS))
    assert closeness(found, model, start) < 1e-9
    assert closeness(found, plain, start) > 1e-3, "the method must make a difference in this test"


def take_steps_of_base(model, batches):
    base = sgd(model)
    for step in range(STEPS):
        base.zero_grad()
        for batch in batches[2 * step : 2 * step + 2]:
            (model(**batch).loss / 2).backward()
        base.step()


class Branches(nn.Module):
    """Two linear layers, of which the second one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, *, both: bool):
        x = self.first(x)
        return (self.second(x) if both else x).square().mean()


def branches():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    return peft.get_peft_model(Branches().double(), config)


def inputs(rank: int):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def with_branches() -> list[torch.Tensor]:
    rank, model = torch.distributed.get_rank(), branches()
    replica = DistributedDataParallel(model, find_unused_parameters=True)
    take_steps(METHODS["merged_sam"](sgd(model), replica), lambda _: [lambda: replica(inputs(rank), both=rank == 0)])
    return [p.detach() for p in trained(model)]


def test_layer_that_one_rank_leaves_out_has_the_mean_gradient():
    model = branches()
    losses = [lambda: model(inputs(0), both=True), lambda: model(inputs(1), both=False)]
    take_steps(METHODS["merged_sam"](sgd(model), model), lambda _: losses)
    for found in start_ranks()(with_branches):
        for p, value in zip(trained(model), found, strict=True):
            torch.testing.assert_close(value, p.detach(), rtol=1e-9, atol=1e-12)


def without_replicas() -> str:
    model, (batch,) = adapted(dropout=0.0), sentences(1)
    optimizer = METHODS["merged_sam"](sgd(model), model)
    try:
        for sam_pass in optimizer.passes():
            with sam_pass:
                model(**batch).loss.backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_several_processes_without_replicas_raise():
    for message in start_ranks()(without_replicas):
        assert "no DistributedDataParallel has run" in message
        assert "the replicas would drift apart" in message


def sharded(method: str) -> list[torch.Tensor] | str:
    from torch.distributed.fsdp import fully_shard

    rank, model = torch.distributed.get_rank(), branches()
    fully_shard(model)
    try:
        optimizer = METHODS[method](sgd(model), model)
    except ValueError as error:
        return str(error)
    take_steps(optimizer, lambda _: [lambda: model(inputs(rank), both=True)])
    return [p.full_tensor().detach() for p in trained(model)]


@pytest.mark.parametrize("method", ["merged_sam", "flat_lora"])
def test_sharded_base_weights_raise(method):
    for message in start_ranks()(sharded, method):
        assert "has a sharded base weight" in message
        assert "DistributedDataParallel, or use steppe.SAM" in message


def test_bar_on_shards_equals_one_process():
    model = branches()
    losses = [lambda rank=rank: model(inputs(rank), both=True) for rank in range(2)]
    take_steps(METHODS["bar"](sgd(model), model), lambda _: losses)
    for found in start_ranks()(sharded, "bar"):
        for p, value in zip(trained(model), found, strict=True):
            torch.testing.assert_close(value, p.detach(), rtol=1e-9, atol=1e-12)
