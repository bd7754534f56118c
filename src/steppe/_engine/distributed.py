"""The processes that train one model together: what a pass asks of their engine, and engines that are refused."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steppe._tensors.dtensor import is_sharded


class Ranks:
    """What the passes of one optimizer need of the engine that its model runs in; without one, nothing.

    Args:
        model: the module that the passes run, as its engine has wrapped it.
        owned: the optimizer's parameters.
        per_rank: whether every rank climbs along its own gradient.

    Raises:
        TypeError: an engine under which SAM would be silently wrong.
        ValueError: ``per_rank`` without a ``DistributedDataParallel`` model.
    """

    def __init__(self, model: nn.Module | None, owned: Sequence[Tensor], *, per_rank: bool) -> None:
        modules = list(model.modules()) if model is not None else []
        _refuse_engines(modules, owned)
        self._sharded: list[Any] = [m for m in modules if _is(m, "torch.distributed.fsdp", "FSDPModule")]
        self._replica = model if per_rank and isinstance(model, DistributedDataParallel) else None
        """The module whose ranks climb apart; None where all climb together."""
        if per_rank and self._replica is None:
            what = (
                "sharded parameters: no rank has a whole gradient of its own"
                if any(map(is_sharded, owned))
                else (f"model={type(model).__name__}: nothing says how to keep the ranks' gradients apart")
            )
            raise ValueError(
                f"per_rank=True with {what}. It needs model= to be the DistributedDataParallel module that the passes "
                "run; without it, all ranks climb together"
            )

    def pass_to(self, *, is_last: bool | None) -> AbstractContextManager[Any]:
        """The context of one pass: a gradient that only says where to climb stays the rank's own.

        Raises:
            RuntimeError: a static graph that has seen no backward yet.
        """
        if self._replica is None or is_last:
            return nullcontext()
        if self._replica.static_graph and not getattr(self._replica, "_static_graph_delay_allreduce_enqueued", True):
            raise RuntimeError(
                "per_rank=True with static_graph=True: torch learns the graph from a backward that averages the "
                "gradients, and the first pass is one that does not. Before the first step, run one forward and "
                "backward of the model outside of passes(), and clear the gradients"
            )
        return self._replica.no_sync()

    def moved(self) -> None:
        """Note that weights were changed in place: copies of them that were gathered before are stale."""
        for module in self._sharded:
            module.reshard()

    def memory(self, shared: dict[str, Any]) -> dict[str, Any]:
        """What a rule that says where to climb may remember: nothing, where each rank climbs by itself."""
        return shared if self._replica is None else SharedMemoryRefused()

    @torch.no_grad()
    def all(self, flag: Tensor) -> Tensor:
        """Whether a flag is true on every rank: where each climbs by itself, one may have overflowed alone."""
        if self._replica is None:
            return flag
        device = next(p.device for p in self._replica.parameters())  # which its process group can send
        lowest = flag.to(device, torch.int32)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._replica.process_group)
        return lowest.to(flag.device).bool()

    @torch.no_grad()
    def holders(self, here: Sequence[Tensor], owned: Sequence[Tensor]) -> list[Tensor]:
        """The parameters that have a gradient on any rank, where a rank may have left some of them out."""
        if self._replica is None or not self._replica.find_unused_parameters:
            return list(here)
        has, device = set(here), next(p.device for p in self._replica.parameters())
        held = torch.tensor([p in has for p in owned], dtype=torch.int32, device=device)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self._replica.process_group)
        return [p for p, somewhere in zip(owned, held.tolist(), strict=True) if somewhere]

    @torch.no_grad()
    def mean_(self, gradients: Sequence[Tensor]) -> None:
        """Average gradients that every rank has made for itself, in place."""
        if self._replica is None:
            return
        group = self._replica.process_group
        for gradient in gradients:
            dist.all_reduce(gradient.div_(dist.get_world_size(group)), group=group)


class SharedMemoryRefused(dict[str, Any]):
    """The memory of rules that climb on each rank by itself: there is none, because a checkpoint holds one for all."""

    def setdefault(self, rule: str, default: Any = None) -> NoReturn:
        """Refuse."""
        raise ValueError(
            f"per_rank=True with {rule}, which remembers something of each rank's own gradients: a checkpoint would "
            "keep one rank's memory and lose the others'. Let all ranks climb together (per_rank=False), or take a "
            "perturbation without a memory"
        )


def _refuse_engines(modules: Iterable[nn.Module], owned: Iterable[Tensor]) -> None:
    for module in modules:
        if _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            _refuse_fsdp1()
        if type(module).__module__.partition(".")[0] == "deepspeed":
            _refuse_deepspeed()
    for p in owned:
        if getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter":
            _refuse_fsdp1()
        if hasattr(p, "ds_id"):
            _refuse_deepspeed()


def _refuse_fsdp1() -> None:
    raise TypeError(
        "FullyShardedDataParallel (FSDP1) gives an optimizer flat pieces that do not say what they are pieces of, so "
        "every rank would climb along another direction, by the norm of its own piece. Shard the model with "
        "torch.distributed.fsdp.fully_shard (FSDP2), which works"
    )


def _refuse_deepspeed() -> None:
    raise TypeError(
        "DeepSpeed's engine keeps gradients and master weights to itself and steps inside its own backward-and-step "
        "protocol, so a second pass would be lost or counted twice. Use FSDP2 (torch.distributed.fsdp.fully_shard) or "
        "DistributedDataParallel with ZeroRedundancyOptimizer as the base, which both work"
    )


def _is(module: nn.Module, package: str, name: str) -> bool:
    """Whether it is an instance of a class that may not even be imported."""
    kind = getattr(sys.modules.get(package), name, None)
    return kind is not None and isinstance(module, kind)
