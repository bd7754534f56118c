"""The processes that train a run together, and their devices; torchrun starts them."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from steppe.experiments.errors import ExperimentError, typed

_GROUPS = count()
"""Numbers of the process groups of this process: all processes make the same ones, in the same order."""


def has_bfloat16(*, on_gpu: bool) -> bool:
    """True if the hardware multiplies matrices in bfloat16; False if torch cannot tell."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # a private name of torch, which may be missing; of x86 alone, because the speed of others was not measured
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return has is not None and bool(has()) and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def launched() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """True in the process of torchrun that prints and writes for all; True without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def lost_connection(error: BaseException) -> bool:
    """True if it says that another process could not be reached; gloo's errors have no type of their own."""
    if isinstance(error, ExperimentError):
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


@dataclass(frozen=True)
class World:
    """The rank of this process among `size`, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def share(self, n: int) -> slice:
        """Return this process's contiguous part of `n` items; parts differ by one item at most.

        >>> [World(torch.device("cpu"), rank, 3).share(7) for rank in range(3)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
        """
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def total(self, value: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """True if the flag is set in any process; every process must call it."""
        return flag if self.size == 1 else bool(self.total(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.any(False)

    @contextmanager
    def first_process_first(self) -> Iterator[None]:
        """Let the first process finish a block before the others begin it."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def synchronize_norms(self, network: nn.Module) -> nn.Module:
        """Make BatchNorm normalize by the whole batch; call it before the optimizer is built."""
        if self.size == 1:
            return network
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call, no-any-return]

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return a module whose backward averages the gradients over the processes."""
        if self.size == 1:
            return network
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(network, device_ids=[self.device] if on_gpu else None)


@contextmanager
def join(device: str, threads: int | None) -> Iterator[World]:
    """Set up this process (threads, determinism), and join the others if there are any."""
    if threads is not None:
        torch.set_num_threads(threads)
    # a resumed run must end with the same bits, which cuDNN's fastest kernels do not guarantee
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32):
        if launched() == 1:
            yield World(torch.device(device))
            return
        if dist.is_initialized():
            raise ExperimentError(
                "this process is in a process group already, and steppe makes one of its own: call steppe before "
                "torch.distributed.init_process_group(), or after torch.distributed.destroy_process_group()"
            )
        place = torch.device(device)
        if place.type == "cuda":
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        store, rank, size = next(rendezvous("env://"))
        # without a prefix, a second group would read the addresses of the first one, whose sockets are closed
        store = PrefixStore(f"steppe {next(_GROUPS)}", store)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        try:
            yield World(place, rank, size)
        except RuntimeError as error:
            if not lost_connection(error):
                raise
            reason = typed(error).split(". ")[0]
            raise ExperimentError(
                f"process {rank} of {size} lost the connection to the others ({reason}): one of them has ended, and "
                "its own message names the reason"
            ) from error
        finally:
            dist.destroy_process_group()
            # A DistributedDataParallel in a reference cycle keeps gloo's threads, and a thread that drops the last
            # tensor of its work while Python shuts down ends the process with "terminate called".
            gc.collect()
