"""A small problem, and layouts of its network over processes; each must train as one process does."""

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.nn.functional as F
from named_methods import TOTAL_STEPS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import steppe
from steppe._tensors.dtensor import full_tensor
from steppe.methods.registry import CARDS, FUNCTIONS

Make = Callable[[nn.Module], steppe.SAM]
BATCH_SIZE = 8  # samples of a step, over all processes


def network(seed: int = 0) -> nn.Sequential:
    """Return a network with shards of unequal size: 7 is odd."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()


def samples(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH_SIZE, 5, generator=generator, dtype=torch.float64), torch.randint(
        3, (BATCH_SIZE,), generator=generator
    )


def own_share(*tensors: Tensor) -> list[Tensor]:
    """Return this process's share of the samples; all of them in a single process."""
    if not dist.is_initialized():
        return list(tensors)
    return [t.chunk(dist.get_world_size())[dist.get_rank()] for t in tensors]


def plain(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module, **options) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fully_shard(module: nn.Module, **options) -> nn.Module:
    """Shard a module by FSDP2, or skip the test where torch's FSDP2 is wrong without Steppe too."""
    skip_without_fsdp2(next(module.parameters()).dtype)
    return torch.distributed.fsdp.fully_shard(module, **options)


def skip_without_fsdp2(dtype: torch.dtype) -> None:
    """Skip the test where FSDP2 does not run on a CPU, or sums the ranks' gradients instead of averaging them.

    It needs events of CPU streams, which torch 2.6 lacks; that of torch 2.8 does not divide float32 gradients.
    """
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of this torch does not run on a CPU")
    if not _fsdp2_averages(dtype, dist.get_world_size()):
        pytest.skip(f"FSDP2 of this torch does not average gradients of {dtype} on a CPU")


@functools.cache
def _fsdp2_averages(dtype: torch.dtype, ranks: int) -> bool:
    """True if FSDP2 gives a weight the mean of the ranks' gradients, here 1."""
    mesh = init_device_mesh("cpu", (ranks,))
    layer = torch.distributed.fsdp.fully_shard(nn.Linear(1, ranks, dtype=dtype), mesh=mesh)
    layer(torch.ones(1, 1, dtype=dtype)).sum().backward()
    return bool((layer.weight.grad.full_tensor() == 1).all())


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class PartlySharded(nn.Module):
    """A network with sharded and plain parameters; the gradients of the plain ones are averaged by hand."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.layers = model
        fully_shard(model[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        for p in model[1:].parameters():
            p.register_post_accumulate_grad_hook(_average)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _average(p: Tensor) -> None:
    dist.all_reduce(p.grad)
    p.grad /= dist.get_world_size()


def tensor_parallel(model: nn.Module) -> nn.Module:
    """Give each process half of the weights of two layers; all processes run all samples."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})


def sequence_parallel(model: nn.Module) -> nn.Module:
    """Split the samples over the processes for LayerNorm, too, whose gradients then are partial sums."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    to_shards = ColwiseParallel(output_layouts=Shard(0), use_local_output=False)
    norm = SequenceParallel(sequence_dim=0)
    from_shards = ColwiseParallel(input_layouts=Shard(0))
    return parallelize_module(model, mesh, {"0": to_shards, "1": norm, "3": from_shards, "5": RowwiseParallel()})


LAYOUTS = {
    "ddp": ddp,
    "fsdp2": fsdp,
    "partly sharded": PartlySharded,
    "tensor parallel": tensor_parallel,
    "sequence parallel": sequence_parallel,
}
WHOLE_BATCH_LAYOUTS = ("tensor parallel", "sequence parallel")  # every process gets the whole batch


def method(name: str, *, rho: float = 0.1, **more) -> Make:
    """Return model -> optimizer of the named method, around SGD with momentum."""
    arguments = CARDS[name].short_arguments(total_steps=TOTAL_STEPS)

    def make(model: nn.Module) -> steppe.SAM:
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return FUNCTIONS[name](base, **{"rho": rho, **arguments, **more}, model=model)

    return make


def train(
    layout: Callable[[nn.Module], nn.Module], make: Make, steps: int, *, whole_batch: bool = False
) -> list[Tensor]:
    """Return the full weights after some steps, on every process."""
    model = layout(network())
    optimizer = make(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_shard_tensor.*|.*redistribut.*")
        run(model, optimizer, range(steps), whole_batch=whole_batch)
    return weights(model)


def run(model: nn.Module, optimizer: steppe.SAM, steps: range, *, whole_batch: bool = False) -> None:
    for step in steps:
        x, y = samples(step) if whole_batch else own_share(*samples(step))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def weights(model: nn.Module) -> list[Tensor]:
    return [full_tensor(p.detach()).clone() for p in model.parameters()]


def close(found, expected, **tolerance):
    """Assert that float64 results agree to rounding, or to another tolerance."""
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-12, "atol": 1e-12}))
