"""Accelerate: the passes of a step in a plain loop, with gradient accumulation in each of them.

Without accumulation this module is not needed: ``model, optimizer, loader = accelerator.prepare(model, sam, loader)``,
``for sam_pass in sam.passes(): with sam_pass: accelerator.backward(loss)``, and ``optimizer.step()``. Do not call
``optimizer.step(closure)`` inside ``accelerator.accumulate()``: Accelerate drops the call, and with it the closure and
its micro-batch, until the last micro-batch.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from steppe._engine.callers import accumulates
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

_UNSUPPORTED_ENGINES = {
    DistributedType.DEEPSPEED: "its engine reduces, clips and steps by itself, so that SAM would be silently off",
    DistributedType.MEGATRON_LM: "its engine runs forward, backward and step by itself, so that SAM would be "
    "silently off",
    DistributedType.FSDP: "FSDP1 gives each rank flat shards, so that each would perturb by a norm of its own",
    DistributedType.XLA: "the gradients are summed over the processes in optimizer.step() only, so that each would "
    "perturb along its own",
}
_UNSUPPORTED_PARALLELISM = {
    "tp_enabled": "tensor parallelism",
    "cp_enabled": "context parallelism",
    "sp_enabled": "sequence parallelism",
}


def unprepared(optimizer: Any) -> Any:
    """Return the optimizer that ``accelerator.prepare`` was called with."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def unwrap_optimizer(optimizer: Any) -> SAM:
    """Return the :class:`steppe.SAM` in the optimizer that ``accelerator.prepare`` returned.

    Raises:
        TypeError: It is another optimizer.
    """
    optimizer = unprepared(optimizer)
    if not isinstance(optimizer, SAM):
        raise TypeError(
            f"expected a steppe.SAM, prepared or not, got {type(optimizer).__name__}: it makes no second pass. Wrap it "
            "before accelerator.prepare(): steppe.SAM(optimizer, rho=0.05, model=model)"
        )
    return optimizer


def share_scaler(sam: SAM, accelerator: Accelerator) -> None:
    """Give the optimizer the accelerator's loss scaler, unless it has one: rules then see unscaled gradients."""
    if sam.scaler is None:
        sam.scaler = accelerator.scaler


def check_supported(accelerator: Accelerator) -> None:
    """Raise an error under a distributed engine whose passes would not equal those of one process.

    Raises:
        RuntimeError: The engine or the kind of parallelism is not supported.
    """
    reason = _UNSUPPORTED_ENGINES.get(accelerator.distributed_type)
    if reason is not None and not getattr(accelerator, "is_fsdp2", False):
        raise RuntimeError(
            f"steppe.SAM under {accelerator.distributed_type.value}: {reason}. Use DistributedDataParallel (torchrun, "
            "or accelerate launch --multi_gpu) or FSDP2 (FullyShardedDataParallelPlugin(fsdp_version=2))"
        )
    config = accelerator.parallelism_config
    for flag, parallelism in _UNSUPPORTED_PARALLELISM.items():
        if getattr(config, flag, False):
            raise RuntimeError(
                f"steppe.SAM under {parallelism} by Accelerate: it has not been shown to equal one process, because "
                "the ranks of one model must share perturbation and dropout masks. Use DistributedDataParallel"
            )


def windows(accelerator: Accelerator, loader: Iterable[_Batch]) -> Iterator[list[_Batch]]:
    """Yield the micro-batches of one step at a time: ``gradient_accumulation_steps`` of them, fewer at the end.

    They are kept until the step is done, because every pass runs all of them.
    """
    batches = iter(loader)
    while window := list(islice(batches, accelerator.gradient_accumulation_steps)):
        yield window


def passes(
    accelerator: Accelerator, optimizer: Any, micro_batches: int = 1, *, accumulate: bool = False
) -> Iterator[Pass]:
    """Yield the passes of one step, each over all its micro-batches, so that Accelerate synchronizes in each.

    Inside a pass, run every micro-batch in its own ``with accelerator.accumulate(model):``. The last micro-batch
    synchronizes the processes. ``accelerator.backward`` divides by ``gradient_accumulation_steps`` as usual. Both hold
    for a window that is not full, too.

    Args:
        accelerator: The accelerator that prepared model and optimizer.
        optimizer: A :class:`steppe.SAM`, prepared or not.
        micro_batches: The number of micro-batches in each pass; more than one with :func:`windows` only.
        accumulate: Give each micro-batch a perturbation of its own (m-sharpness with a smaller m), and add their
            gradients. Call this function inside ``with accelerator.accumulate(model):`` then.

    Yields:
        The passes. Distinguish them by ``sam_pass.is_first`` and ``sam_pass.is_perturbed``, for example to log
        ``loss``, ``perturbed_loss`` and ``sharpness``.

    Raises:
        RuntimeError: The engine is not supported; the call is inside ``accelerator.accumulate()`` without
            ``accumulate=True``, which would lose all micro-batches but the last; or a pass ran another number of
            micro-batches than ``micro_batches``.
        TypeError: The optimizer is not a :class:`steppe.SAM`.
        ValueError: ``micro_batches`` is not between 1 and ``gradient_accumulation_steps``.

    Example:
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
    check_supported(accelerator)
    sam = unwrap_optimizer(optimizer)
    share_scaler(sam, accelerator)
    if accumulate:
        _check_each_micro_batch_synchronizes(accelerator)
        share = 1 / accelerator.gradient_accumulation_steps  # by which accelerator.backward multiplies the loss
        yield from sam.passes(accumulate=True, loss_weight=share)
    else:
        yield from _passes_over_window(accelerator, sam, micro_batches)


def _passes_over_window(accelerator: Accelerator, sam: SAM, micro_batches: int) -> Iterator[Pass]:
    steps = accelerator.gradient_accumulation_steps
    if not accelerator.sync_gradients and accumulates():  # the mark alone outlives a loop that ended in between
        raise RuntimeError(
            "passes() was called inside accelerator.accumulate(), for one of several micro-batches: every pass starts "
            "with cleared gradients, so all but the last would be lost. Run them all in each pass (`for batches in "
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
            # accumulate() counts in accelerator.step and synchronizes where it reaches `steps`. Without this line a
            # second pass would start in the middle of the count, and a window that is not full would never reach it.
            accelerator.step = start
            yield sam_pass
            if accelerator.step not in (start, steps, 0):
                raise RuntimeError(
                    f"a pass ended in the middle of an accumulation: passes() was called for {micro_batches} "
                    f"micro-batches, but accelerator.accumulate() ran {accelerator.step - start}, so either the "
                    "gradients would not be synchronized, or optimizer.step() would do nothing. Call "
                    "passes(accelerator, optimizer, len(batches))"
                )
    finally:
        accelerator.sync_gradients = True  # False after an exception between two micro-batches


def _check_each_micro_batch_synchronizes(accelerator: Accelerator) -> None:
    each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    if accelerator.use_distributed and accelerator.gradient_accumulation_steps > 1 and not each:
        raise RuntimeError(
            "passes(accumulate=True) on several processes: accelerator.accumulate() synchronizes the last micro-batch "
            "only, so the gradients of the others would stay each process's own, and the replicas drift apart. Pass "
            "GradientAccumulationPlugin(num_steps=..., sync_each_batch=True) to Accelerator, or run all micro-batches "
            "in each pass"
        )
