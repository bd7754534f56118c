"""Accelerate: the passes of a step in a raw loop, and its gradient accumulation in every one of them.

Without accumulation nothing of this is needed: ``model, optimizer, loader = accelerator.prepare(model, sam, loader)``,
``for sam_pass in sam.passes(): with sam_pass: accelerator.backward(loss)``, and ``optimizer.step()``. With it, beware of
``optimizer.step(closure)`` inside ``accelerator.accumulate()``: Accelerate drops the call, and with it the closure and
its micro-batch, until the last one.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from steppe.sam import SAM, Pass

try:
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
    from accelerate.utils import DistributedType  # type: ignore[import-untyped]
except ImportError as missing:
    raise ImportError(
        "steppe.integrations.accelerate needs Accelerate, which is not installed: pip install 'steppe[transformers]'"
    ) from missing

_Batch = TypeVar("_Batch")

_ENGINES = {
    DistributedType.DEEPSPEED: "its engine reduces, clips and steps by itself, so that SAM would be silently off",
    DistributedType.MEGATRON_LM: "its engine runs forward, backward and step by itself, so that SAM would be "
    "silently off",
    DistributedType.FSDP: "through Accelerate it has not been shown to equal one process: FSDP1 hands each rank flat "
    "shards, so that each would climb by a norm of its own, and FSDP2 replaces the parameters under the optimizer",
    DistributedType.XLA: "the gradients are summed over the processes in optimizer.step() only, so that each would "
    "climb along its own",
}
_PLANS = {
    "tp_enabled": "tensor parallelism",
    "cp_enabled": "context parallelism",
    "sp_enabled": "sequence parallelism",
}


def innermost(optimizer: Any) -> Any:
    """Return what ``accelerator.prepare`` was given."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def unwrapped(optimizer: Any) -> SAM:
    """Return the :class:`steppe.SAM` in what ``accelerator.prepare`` gave back.

    Raises:
        TypeError: there is none.
    """
    optimizer = innermost(optimizer)
    if not isinstance(optimizer, SAM):
        raise TypeError(
            f"expected a steppe.SAM, prepared or not, got {type(optimizer).__name__}: it makes no second pass. Wrap it "
            "before accelerator.prepare(): steppe.SAM(optimizer, rho=0.05, model=model)"
        )
    return optimizer


def know_scaler(sam: SAM, accelerator: Accelerator) -> None:
    """Let the rules see the gradients without the loss scale, where the optimizer does not know its scaler."""
    if sam.scaler is None:
        sam.scaler = accelerator.scaler


def refuse_unsupported(accelerator: Accelerator) -> None:
    """Refuse a way of distributing in which the passes would not be those of one process.

    Raises:
        RuntimeError: says which, and why.
    """
    reason = _ENGINES.get(accelerator.distributed_type)
    if reason is not None:
        raise RuntimeError(
            f"steppe.SAM under {accelerator.distributed_type.value}: {reason}. Use DistributedDataParallel (torchrun, "
            "or accelerate launch --multi_gpu)"
        )
    config = accelerator.parallelism_config
    for flag, plan in _PLANS.items():
        if getattr(config, flag, False):
            raise RuntimeError(
                f"steppe.SAM under {plan} by Accelerate: it has not been shown to equal one process, and the ranks of "
                "one model must climb and draw their dropout masks together. Use DistributedDataParallel"
            )


def windows(accelerator: Accelerator, loader: Iterable[_Batch]) -> Iterator[list[_Batch]]:
    """Yield the micro-batches of one step at a time: ``gradient_accumulation_steps`` of them, fewer at the end.

    Every pass needs them all, so they are held until the step is done.
    """
    batches = iter(loader)
    while window := list(islice(batches, accelerator.gradient_accumulation_steps)):
        yield window


def passes(
    accelerator: Accelerator, optimizer: Any, micro_batches: int = 1, *, accumulate: bool = False
) -> Iterator[Pass]:
    """Yield the passes of one step, each over all its micro-batches, so that accelerate synchronizes in each.

    Inside a walk, run every micro-batch in its own ``with accelerator.accumulate(model):``; the last one synchronizes
    the processes, also in a window that is not full. ``accelerator.backward`` divides by
    ``gradient_accumulation_steps`` as ever, also there.

    Args:
        accelerator: which prepared model and optimizer.
        optimizer: a :class:`steppe.SAM`, prepared or not.
        micro_batches: how many the walk will see; more than one with :func:`windows` only.
        accumulate: the other way round, called inside ``with accelerator.accumulate(model):``: each micro-batch has a
            perturbation of its own (m-sharpness with a smaller m), and their gradients are added.

    Raises:
        RuntimeError: an engine that is not supported; called inside ``accelerator.accumulate()`` without
            ``accumulate=True``, which would lose all micro-batches but the last; a walk that saw another number of
            micro-batches than it was told.
        TypeError: the optimizer is not a :class:`steppe.SAM`.

    >>> model = torch.nn.Linear(2, 1)  # doctest: +SKIP
    >>> sam = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)  # doctest: +SKIP
    >>> model, optimizer, loader = accelerator.prepare(model, sam, loader)  # doctest: +SKIP
    >>> for batches in windows(accelerator, loader):  # doctest: +SKIP
    ...     for sam_pass in passes(accelerator, optimizer, len(batches)):
    ...         with sam_pass:
    ...             for x, y in batches:
    ...                 with accelerator.accumulate(model):
    ...                     accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
    ...     accelerator.clip_grad_norm_(model.parameters(), 1.0)
    ...     optimizer.step()
    """
    refuse_unsupported(accelerator)
    sam, steps = unwrapped(optimizer), accelerator.gradient_accumulation_steps
    know_scaler(sam, accelerator)
    if accumulate:
        _refuse_unsynchronized(accelerator, steps)
        yield from sam.passes(accumulate=True)
        return
    if not accelerator.sync_gradients:
        raise RuntimeError(
            "passes() was called inside accelerator.accumulate(), for one of several micro-batches: every pass starts "
            "with cleared gradients, so all but the last would be lost. Run them all in each walk (`for batches in "
            "windows(accelerator, loader)`, with accumulate() around each forward and backward), or give each a "
            "perturbation of its own with passes(..., accumulate=True)"
        )
    if not 1 <= micro_batches <= steps:
        raise ValueError(
            f"micro_batches is {micro_batches}, and a step has 1 to gradient_accumulation_steps={steps} of them: pass "
            "len(batches), with batches from windows(accelerator, loader)"
        )
    start = steps - micro_batches
    try:
        for sam_pass in sam.passes():
            accelerator.step = start  # so that accumulate() synchronizes at the last one
            yield sam_pass
            if accelerator.step not in (start, steps, 0):
                raise RuntimeError(
                    f"a walk ended in the middle of an accumulation: passes() was told of {micro_batches} "
                    f"micro-batches, and accelerator.accumulate() saw {accelerator.step - start}, so the gradients "
                    "would not be synchronized or optimizer.step() do nothing. Call passes(accelerator, optimizer, "
                    "len(batches))"
                )
    finally:
        accelerator.sync_gradients = True  # an exception may have come between two micro-batches


def _refuse_unsynchronized(accelerator: Accelerator, steps: int) -> None:
    each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    if accelerator.use_distributed and steps > 1 and not each:
        raise RuntimeError(
            "passes(accumulate=True) on several processes: accelerator.accumulate() synchronizes the last micro-batch "
            "only, so the gradients of the others would stay each process's own, and the replicas drift apart. Pass "
            "GradientAccumulationPlugin(num_steps=..., sync_each_batch=True) to Accelerator, or run all micro-batches "
            "in each walk"
        )
