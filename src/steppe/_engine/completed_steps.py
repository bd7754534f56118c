"""Call a function after each completed step of an optimizer, at the new weights."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.base_hook import BeforeStep
from steppe._engine.cuda_graphs import is_capturing
from steppe._engine.eager import eager
from steppe._engine.groups import parameters_of
from steppe._engine.stage import Stage
from steppe._engine.wrapper import Wrapper

_MAY_BE_PERTURBED = (Stage.IN_PASS, Stage.BETWEEN_PASSES, Stage.AFTER_FIRST_STEP)


class CompletedSteps:
    """Calls a method after each completed step of an optimizer, as long as the method's object lives.

    A step is completed if the optimizer has moved the weights, or could have. These steps are not:

    - a step that raised or was interrupted,
    - a step that a loss scaler or SAM has skipped on the host. (On an accelerator the device decides; then the weights
      are unchanged, and the step counts.)
    - a step with learning rate 0: ``torch.distributed.checkpoint`` makes one to see the optimizer's state.

    Args:
        optimizer: An optimizer whose step runs hooks (:func:`with_hooks`). Not the base of a SAM: a method may step its
            base several times a step.
        method: A bound method.

    Raises:
        TypeError: The optimizer is the base of a SAM.
    """

    def __init__(self, optimizer: Optimizer, method: Callable[[], None]) -> None:
        if _is_base_of_sam(optimizer):
            raise TypeError(_BASE_OF_SAM.format(type(optimizer).__name__))
        self._method = weakref.WeakMethod(method)
        self._before: tuple[Any, ...] = ()
        for handle in (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ):
            weakref.finalize(method.__self__, handle.remove)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Callable[[], "CompletedSteps"], tuple[()]]:
        return _dead, ()  # some optimizers copy and pickle their hooks

    @eager
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if _is_base_of_sam(optimizer):
            raise TypeError(_BASE_OF_SAM.format(type(optimizer).__name__))
        if any(map(is_capturing, parameters_of(optimizer))):
            raise RuntimeError(
                "the step is being captured in a CUDA graph, whose replays call no hooks, so the average would miss "
                "them. Build it without an optimizer, and update it yourself after each replay"
            )
        self._before = _counters(optimizer)

    @eager
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        method = self._method()
        has_closure = len(args) > 1 or kwargs.get("closure") is not None  # args[0] is the optimizer
        if (
            method is not None
            and not self._was_skipped(optimizer, has_closure)
            and not _has_no_learning_rate(optimizer)
        ):
            method()

    def _was_skipped(self, optimizer: Optimizer, has_closure: bool) -> bool:
        if not isinstance(optimizer, Wrapper):
            # torch's private protocol between GradScaler and fused optimizers, which skip the step themselves
            found_inf = getattr(optimizer, "found_inf", None)
            return isinstance(found_inf, Tensor) and found_inf.is_cpu and bool(found_inf)
        (skipped_before, steps_before), (skipped, steps) = self._before, _counters(optimizer)
        by_sam = isinstance(skipped, int) and skipped != skipped_before
        by_scaler = has_closure and steps == steps_before
        return by_sam or by_scaler


def with_hooks(optimizer: Any) -> Optimizer:
    """Return the optimizer whose step runs hooks: a wrapper (Accelerate's) may leave torch's constructor out.

    Raises:
        TypeError: There is none.
    """
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and isinstance(
        inner := getattr(optimizer, "optimizer", None), Optimizer
    ):
        optimizer = inner
    if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"expected a torch.optim.Optimizer whose step() runs hooks, got {type(optimizer).__name__}: its steps "
            "would not be averaged. Build the average without an optimizer, and update it yourself after each step"
        )
    return optimizer


def require_completed_step(optimizer: Optimizer | None, caller: str) -> None:
    """Refuse a call in the middle of a step of SAM.

    Raises:
        RuntimeError: The weights may be perturbed.
    """
    if isinstance(optimizer, Wrapper) and optimizer._engine.stage in _MAY_BE_PERTURBED:
        raise RuntimeError(
            f"{caller} was called {optimizer._engine.stage.value}: the weights may be w + e, which is no result of a "
            "step. Call it between two steps"
        )


def _counters(optimizer: Optimizer) -> tuple[Any, ...]:
    if not isinstance(optimizer, Wrapper):
        return ()
    return optimizer._engine.gradients.skipped, optimizer._engine.steps


def _is_base_of_sam(optimizer: Optimizer) -> bool:
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    return any(isinstance(hook, BeforeStep) and hook.is_alive for hook in hooks)


def _has_no_learning_rate(optimizer: Optimizer) -> bool:
    rates = [group.get("lr") for group in optimizer.param_groups]
    on_host = all(isinstance(rate, int | float) or (isinstance(rate, Tensor) and rate.is_cpu) for rate in rates)
    return on_host and all(rate == 0.0 for rate in rates)


class _Nothing:
    def method(self) -> None: ...


def _dead() -> CompletedSteps:
    steps = object.__new__(CompletedSteps)
    steps._method, steps._before = weakref.WeakMethod(_Nothing().method), ()
    return steps


_BASE_OF_SAM = (
    "this {} is the base of a SAM, which may step it several times a step, or between two passes: give the average the "
    "SAM itself"
)
