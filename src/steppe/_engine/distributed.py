"""Processes that train one model: communication in a pass, and errors for engines that are not supported."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steppe._tensors.dtensor import fsdp_modules, is_sharded


class Ranks:
    """The ranks on which one optimizer's model runs; without a distributed engine, every method is a no-op.

    Args:
        model: The module that the passes run, as its engine has wrapped it.
        owned: The optimizer's parameters.
        per_rank: Perturb each rank along its own gradient.

    Raises:
        TypeError: An engine under which SAM would be silently wrong.
        ValueError: ``per_rank`` without a ``DistributedDataParallel`` model.
    """

    def __init__(self, model: nn.Module | None, owned: Sequence[Tensor], *, per_rank: bool) -> None:
        _refuse_engines(model, owned)
        self._sharded: list[Any] = [] if model is None else fsdp_modules(model)
        self._synchronized = model if isinstance(model, DistributedDataParallel) else None
        self._replica = model if per_rank and isinstance(model, DistributedDataParallel) else None
        """The module, if each rank has its own perturbation; None if all ranks share one."""
        if per_rank and self._replica is None:
            what = (
                "sharded parameters: no rank has a whole gradient of its own"
                if any(map(is_sharded, owned))
                else f"model={type(model).__name__}: it has no way to keep the ranks' gradients apart"
            )
            raise ValueError(
                f"per_rank=True with {what}. Give model= the DistributedDataParallel module that the passes run; "
                "without per_rank, all ranks share one perturbation"
            )

    @property
    def sharded(self) -> bool:
        """True if the passes run on weights that FSDP2 gathers, and not on the optimizer's parameters."""
        return bool(self._sharded)

    def context_of_pass(self, *, is_last: bool | None) -> AbstractContextManager[Any]:
        """Return the context of one pass. With ``per_rank``, the gradient of a pass that is not the last stays local.

        Raises:
            RuntimeError: A static graph before its first backward, or uneven inputs of ``join()``.
        """
        if self._replica is None:
            return nullcontext()
        # A private name of torch; join() has no other mark.
        if getattr(getattr(self._replica, "_join_config", None), "enable", False):
            raise RuntimeError(
                "per_rank=True inside model.join(): a step communicates more than its backwards (if the gradients of "
                "all ranks are finite), and the ranks that have no more data take part in backwards only. Give each "
                "rank as many batches (DistributedSampler does), or leave per_rank out"
            )
        if is_last:
            return nullcontext()
        # A private name of torch, False until the first backward: nothing else shows that the graph is not known yet.
        if self._replica.static_graph and not getattr(self._replica, "_static_graph_delay_allreduce_enqueued", True):
            raise RuntimeError(
                "per_rank=True with static_graph=True: torch learns the graph from a backward that averages the "
                "gradients, and the first pass does not average. Before the first step, run one forward and backward "
                "of the model outside of passes(), and clear the gradients"
            )
        return self._replica.no_sync()

    @property
    def keeps_gradients(self) -> bool:
        """True if the last forward of ``DistributedDataParallel`` was in ``no_sync``: its gradient is of this rank."""
        # A name of torch: False after a forward whose backward does not average; it is so after one in no_grad, too.
        return self._synchronized is not None and not self._synchronized.require_forward_param_sync

    def drop_gathered_weights(self) -> None:
        """Make FSDP2 gather the weights again: what it has gathered before an in-place change is stale."""
        for module in self._sharded:
            module.reshard()

    def drop_unreduced_gradients(self) -> None:
        """Drop gradients that FSDP2 has kept for a later reduction: those of a pass that an exception has ended.

        ``zero_grad()`` does not reach them, and FSDP2 would add them to the gradient of the next pass.
        """
        for group in self._fsdp_groups():
            group._partial_reduce_output = None  # of replicas of shards
            for p in group.fsdp_params:
                p.unsharded_accumulated_grad = None
                if (unsharded := getattr(p, "_unsharded_param", None)) is not None:
                    unsharded.grad = None

    def holds_unreduced_gradients(self) -> bool:
        """True if FSDP2 keeps gradients for a later reduction."""
        return any(map(_holds_unreduced, self._fsdp_groups()))

    def refuse_unreduced_gradients(self) -> None:
        """Refuse to go on after a pass whose gradient FSDP2 keeps for a later reduction.

        Raises:
            RuntimeError: A part of the gradient is not in ``.grad``.
        """
        if self.holds_unreduced_gradients():
            self.drop_unreduced_gradients()
            raise RuntimeError(
                "a pass ended with gradients that FSDP2 has not reduced (set_requires_gradient_sync(False) or "
                "set_requires_all_reduce(False)): they are not in .grad, so the step would go on without them. Reduce "
                "them in the last backward of every pass: set_requires_gradient_sync(True) before its forward. With "
                "passes(accumulate=True) that is every backward, because each micro-batch has passes of its own"
            )

    def _fsdp_groups(self) -> Iterator[Any]:
        """Yield FSDP2's groups of parameters, in which it keeps gradients that it has not reduced."""
        for module in self._sharded:
            # Private names of torch: the public way, unshard(), is a collective operation, and may find one rank only.
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            yield from filter(None, groups)

    def memory_of_perturbation(self, shared: dict[str, Any]) -> dict[str, Any]:
        """Return the memory of the perturbation; a forbidden one where each rank has a perturbation of its own."""
        return shared if self._replica is None else ForbiddenMemory()

    def all_true(self, flag: Tensor) -> Tensor:
        """Return True if the flag is true on every rank; local gradients may overflow on one rank only."""
        if self._replica is None:
            return flag
        device = next(p.device for p in self._replica.parameters())  # a device that the process group supports
        lowest = flag.to(device, torch.int32)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._replica.process_group)
        return lowest.to(flag.device).bool()

    def with_gradient_anywhere(self, here: list[Tensor], owned: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters that have a gradient on any rank, where a rank may leave some of them out."""
        if self._replica is None or not self._replica.find_unused_parameters:
            return here
        owned, has, device = list(owned), set(here), next(p.device for p in self._replica.parameters())
        held = torch.tensor([p in has for p in owned], dtype=torch.int32, device=device)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self._replica.process_group)
        return [p for p, anywhere in zip(owned, held.tolist(), strict=True) if anywhere]

    def average_(self, gradients: Sequence[Tensor]) -> None:
        """Average the ranks' own gradients, in place."""
        if self._replica is not None:
            average_over_(gradients, self._replica.process_group)


def _holds_unreduced(group: Any) -> bool:
    """True if a group of parameters of FSDP2 keeps gradients for a later reduction."""
    return getattr(group, "_partial_reduce_output", None) is not None or any(
        p.unsharded_accumulated_grad is not None
        or getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None
        for p in group.fsdp_params
    )


def refuse_uneven_inputs(base: Any) -> None:
    """Refuse a second pass inside ``Join([model, base])`` with ``ZeroRedundancyOptimizer`` as the base.

    Raises:
        RuntimeError: The ranks without data would make a step of the base for each backward of the others, and wait.
    """
    if getattr(getattr(base, "_join_config", None), "enable", False):  # a private name of torch; there is no other mark
        raise RuntimeError(
            f"{type(base).__name__} inside Join: the ranks that have no more data make one step of it for each "
            "backward of the others, and a step of SAM has two, so that the ranks would wait for each other. Give "
            "each rank as many batches (DistributedSampler does), or take a base that is not sharded, and model.join()"
        )


@torch.no_grad()
def average_over_(tensors: Iterable[Tensor], group: "dist.ProcessGroup") -> None:
    """Average tensors over the ranks of a group, in place; each rank has to call it with as many."""
    size = dist.get_world_size(group)
    for tensor in tensors:
        dist.all_reduce(tensor.div_(size), group=group)


class ForbiddenMemory(dict[str, Any]):
    """Memory that raises an error if a rule uses it: each rank would have its own, and a checkpoint holds only one."""

    def setdefault(self, rule: str, default: Any = None) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(
            f"per_rank=True with {rule}, which keeps a memory of each rank's own gradients: a checkpoint would "
            "keep one rank's memory and lose the others'. Leave per_rank out, so that all ranks share one "
            "perturbation, or take a perturbation without a memory"
        )


def _refuse_engines(model: nn.Module | None, owned: Iterable[Tensor]) -> None:
    if model is not None:
        if fsdp_modules(model, version=1):
            _refuse_fsdp1()
        if any(type(module).__module__.partition(".")[0] == "deepspeed" for module in model.modules()):
            _refuse_deepspeed()
    # Without model=, the engines show only in marks on their parameters; private names, checked by tests.
    for p in owned:
        if getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter":
            _refuse_fsdp1()
        if hasattr(p, "ds_id"):
            _refuse_deepspeed()


def _refuse_fsdp1() -> None:
    raise TypeError(
        "FullyShardedDataParallel (FSDP1) gives an optimizer flat shards without their shapes, so that every rank "
        "would be perturbed in another direction, by the norm of its own shard. Shard the model with "
        "torch.distributed.fsdp.fully_shard (FSDP2), which works"
    )


def _refuse_deepspeed() -> None:
    raise TypeError(
        "DeepSpeed's engine keeps gradients and master weights private and steps inside its own backward-and-step "
        "protocol, so a second pass would be lost or counted twice. Use FSDP2 (torch.distributed.fsdp.fully_shard) or "
        "DistributedDataParallel with ZeroRedundancyOptimizer as the base, which both work"
    )
