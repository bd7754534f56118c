"""Quantized optimizers as bases under FSDP2: torchao's work on shards, those of bitsandbytes raise, with SAM or not."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

import steppe
from layouts import fully_shard, own_share, weights
from ranks import start_ranks
from support import saved_and_loaded

RHO = 0.3
TORCHAO = ["AdamW8bit", "AdamW4bit", "AdamWFp8"]


@pytest.fixture(scope="module", autouse=True)
def processes():
    """Start the processes, and import what they need, before the first test: this takes seconds."""
    start_ranks()(import_bases)


def import_bases():
    for package in ("torchao.optim", "bitsandbytes.optim"):
        pytest.importorskip(package)


def network() -> nn.Module:
    """Return a network whose shards have whole blocks of quantization: else they differ from those of one process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 2048), nn.Tanh(), nn.Linear(2048, 8))


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def optimizer_of(package: str, name: str, model: nn.Module, rho: float) -> steppe.SAM:
    base = getattr(pytest.importorskip(package), name)(model.parameters(), lr=1e-3)
    return steppe.SAM(base, rho=rho, model=model)


def run(model: nn.Module, optimizer: steppe.SAM, steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = own_share(torch.randn(16, 8, generator=g), torch.randint(3, (16,), generator=g))
        with torch.compiler.set_stance("force_eager"):  # the compilation of torchao's steps takes seconds
            for sam_pass in optimizer.passes():
                with sam_pass:
                    F.cross_entropy(model(x), y).backward()
            optimizer.step()


def train(name: str, rho: float, *, shard: bool = False) -> list[torch.Tensor]:
    model = sharded(network()) if shard else network()
    run(model, optimizer_of("torchao.optim", name, model, rho), range(5))
    return weights(model)


def distance(a, b) -> float:
    return float(sum((x - y).square().sum() for x, y in zip(a, b, strict=True)).sqrt())


def train_sharded(name):
    return train(name, RHO, shard=True)


@pytest.mark.parametrize("name", TORCHAO)
def test_quantized_base_of_torchao_on_shards_is_close_to_one_process(name):
    expected = train(name, RHO)
    moved = distance(expected, [p.detach() for p in network().parameters()])
    assert distance(expected, train(name, 0.0)) > 0.05 * moved
    for found in start_ranks()(train_sharded, name):
        assert distance(found, expected) < 1e-3 * moved


def resumed(name):
    model = sharded(network())
    optimizer = optimizer_of("torchao.optim", name, model, RHO)
    run(model, optimizer, range(3))
    saved = saved_and_loaded(get_optimizer_state_dict(model, optimizer), weights_only=False)
    again = sharded(network())
    again.load_state_dict(model.state_dict())
    second = optimizer_of("torchao.optim", name, again, 0.7)
    with torch.compiler.set_stance("force_eager"):
        set_optimizer_state_dict(again, second, saved)
    assert second.rho == RHO
    for each, of in ((model, optimizer), (again, second)):
        run(each, of, range(3, 6))
    return all(map(torch.equal, weights(model), weights(again)))


@pytest.mark.parametrize("name", TORCHAO)
def test_state_of_a_quantized_base_on_shards_resumes(name):
    assert start_ranks()(resumed, name) == [True, True]


def step_of_bitsandbytes():
    model = sharded(network())
    optimizer = optimizer_of("bitsandbytes.optim", "AdamW8bit", model, RHO)
    before = weights(model)
    with pytest.raises(RuntimeError, match="DTensor"):
        run(model, optimizer, range(1))
    return all(map(torch.equal, before, weights(model)))


def test_bitsandbytes_on_shards_raises_its_own_error_and_leaves_the_weights():
    assert start_ranks()(step_of_bitsandbytes) == [True, True]
