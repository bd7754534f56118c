"""Accelerate's FSDP2 in the processes of ``ranks.py``, and training by it."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate_state import reset_accelerate_state, train_epoch

import steppe
from layouts import network, samples, skip_without_fsdp2, weights

MICRO_BATCH = 4  # samples of a micro-batch, over all processes
SAMPLES = 20  # three windows of two micro-batches; the last one is not full


@contextlib.contextmanager
def distributed_environment() -> Iterator[None]:
    """Set the variables that torchrun would set; at the end, restore them, and forget Accelerate's state."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    variables |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with mock.patch.dict(os.environ, variables), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")  # Accelerate does, for HSDP
        try:
            yield
        finally:
            reset_accelerate_state()


def choose_fsdp2(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin, replicas: int = 1) -> None:
    """Set the engine of an accelerator to FSDP2.

    Accelerate chooses it for accelerators only, and DDP on a CPU. All that follows this choice is its own code.
    """
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    if replicas > 1:
        shards = dist.get_world_size() // replicas
        config = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
        accelerator.state.device_mesh = config.get_device_mesh("cpu")
        accelerator.state.parallelism_config = config


def accelerator_with_fsdp2(state_dict_type: str = "SHARDED_STATE_DICT", *, replicas: int = 1, **options) -> Accelerator:
    """Return a new accelerator under FSDP2, for float64; several replicas may each be sharded (HSDP)."""
    skip_without_fsdp2(torch.float64)
    reset_accelerate_state()
    policy = {"auto_wrap_policy": "size_based_wrap", "min_num_params": 20}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=state_dict_type, **policy)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, **options)
    choose_fsdp2(accelerator, plugin, replicas)
    return accelerator


def loader(batch_size: int) -> torch.utils.data.DataLoader:
    pairs = [samples(step) for step in range(3)]
    x, y = (torch.cat(parts)[:SAMPLES] for parts in zip(*pairs, strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch_size)


def prepared(accelerator: Accelerator, make, seed: int = 0):
    """Return model, optimizer and loader as Accelerate prepares them."""
    model = network(seed)
    return accelerator.prepare(model, make(model), loader(MICRO_BATCH // dist.get_world_size()))


def by_hand(make, *, clip: float | None = 0.5, window: int = 2) -> list[torch.Tensor]:
    """Return the weights of the same loop in one process, without Accelerate."""
    model = network()
    optimizer = make(model)
    micro = list(loader(MICRO_BATCH))
    for start in range(0, len(micro), window):
        for sam_pass in optimizer.passes():
            with sam_pass:
                for x, y in micro[start : start + window]:
                    (F.cross_entropy(model(x), y) / window).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return weights(model)


def train_by_passes(make, replicas: int = 1) -> list[torch.Tensor]:
    with distributed_environment():
        accelerator = accelerator_with_fsdp2(replicas=replicas, gradient_accumulation_steps=2)
        model, optimizer, batches = prepared(accelerator, make)
        train_epoch(accelerator, model, optimizer, batches)
        return weights(model)


def train_by_closure(make) -> list[torch.Tensor]:
    """Train without the integration: Accelerate prepares, and the loop is the user's."""
    with distributed_environment():
        accelerator = accelerator_with_fsdp2()
        model, optimizer, batches = prepared(accelerator, make)
        for x, y in batches:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
        return weights(model)


def train_in_the_classic_api(make) -> list[torch.Tensor]:
    with distributed_environment():
        accelerator = accelerator_with_fsdp2()
        model, optimizer, batches = prepared(accelerator, make)
        sam: steppe.SAM = optimizer.optimizer
        for x, y in batches:
            sam.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            sam.first_step(zero_grad=True)
            accelerator.backward(F.cross_entropy(model(x), y))
            sam.second_step()
        return weights(model)


def resumed(make, state_dict_type: str, folder: Path) -> list[list[torch.Tensor]]:
    """Return the weights after two epochs, and those of a run that another one has left after the first."""
    with distributed_environment():
        accelerator = accelerator_with_fsdp2(state_dict_type, gradient_accumulation_steps=2)
        parts = prepared(accelerator, make)
        train_epoch(accelerator, *parts)
        accelerator.save_state(str(folder))
        train_epoch(accelerator, *parts)
        straight = weights(parts[0])
        accelerator = accelerator_with_fsdp2(state_dict_type, gradient_accumulation_steps=2)
        parts = prepared(accelerator, make, seed=1)
        accelerator.load_state(str(folder))
        assert parts[1].state_dict()["param_groups"][0]["sam_step"] == 3
        train_epoch(accelerator, *parts)
        return [straight, weights(parts[0])]
