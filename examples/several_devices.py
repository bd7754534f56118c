"""SAM on several devices: DDP with one perturbation for all ranks or one for each rank, and FSDP2.

torchrun --nproc_per_node 2 examples/several_devices.py together    # one perturbation for all ranks
torchrun --nproc_per_node 2 examples/several_devices.py per-rank    # m-sharpness: each rank has its own perturbation
torchrun --nproc_per_node 2 examples/several_devices.py sharded     # FSDP2
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import steppe


def wrapped(way: str, device: torch.device) -> nn.Module:
    """Return a network in DDP or FSDP2."""
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 4)).to(device)
    if way == "sharded":
        return fully_shard(model, mesh=dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),)))
    return DistributedDataParallel(model)


def train(way: str, steps: int = 200) -> tuple[float, float]:
    """Learn the labels that a random linear map gives to random points; return the first and last loss of all ranks."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    model = wrapped(way, device)  # first DDP or FSDP2, then the optimizer
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = steppe.SAM(base, rho=0.05, model=model, per_rank=way == "per-rank")
    teacher = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).to(device)
    points = torch.Generator().manual_seed(dist.get_rank())  # different on each rank
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 16, generator=points).to(device)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), (x @ teacher).argmax(1))
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())
    ends = torch.stack([losses[0], torch.stack(losses[-20:]).mean()]) / dist.get_world_size()
    dist.all_reduce(ends)
    return ends[0].item(), ends[1].item()


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    first, last = train(way := sys.argv[1] if len(sys.argv) > 1 else "together")
    if dist.get_rank() == 0:
        print(f"{way}, {dist.get_world_size()} ranks: loss {first:.2f} -> {last:.2f}")
    dist.destroy_process_group()
