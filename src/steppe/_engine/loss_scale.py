"""Loss scaling: the scale of a ``GradScaler``, and steps that it would make wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steppe._engine.callers import called_by_scaler
from steppe.rules import Cadence, Combination, Perturbation, scale_free


class ScalerTarget:
    """The stand-in for the optimizer that ``step(closure)`` gives to ``GradScaler.step``.

    A scaler reads an optimizer's groups and calls its ``step()``. Given the optimizer itself, it would call the
    ``step()`` that is running, and its hooks would fire twice.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self.step = step


def loss_scale(scaler: torch.amp.GradScaler | None, parameter: Tensor) -> Tensor | None:
    """Return the scale as a tensor: a scaled 1, because ``get_scale()`` would read it on the host; None without one."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), device=parameter.device))


def refuse_closure_of_scaler() -> None:
    """Refuse ``scaler.step(optimizer, closure)``.

    Raises:
        RuntimeError: A scaler is the caller.
    """
    if called_by_scaler():
        raise RuntimeError(
            "scaler.step(optimizer, closure): the scaler has unscaled the earlier gradients, but the base would step "
            "with those of the closure's passes, multiplied by its scale (65536 at first). Make the optimizer with "
            "scaler=scaler and call optimizer.step(closure); or use passes(), then scaler.step(optimizer)"
        )


def check_unscaled(unscaled_by: tuple[Any, int] | None, caller: str) -> None:
    """Refuse to begin a step with gradients for which a scaler has spent its only unscaling of this step.

    Args:
        unscaled_by: The scaler, and the number under which it keeps the state of the optimizer; None if there is none.
        caller: The call that begins the step.

    Raises:
        RuntimeError: The scaler would not unscale the gradients of the later passes.
    """
    if unscaled_by is not None:
        scaler, key = unscaled_by
        # Private names of torch: nothing else shows that update() has not come since.
        stage = scaler._per_optimizer_states.get(key, {}).get("stage")
        if getattr(stage, "name", "") == "UNSCALED":
            raise unscaled_too_early(f"before {caller}")


def unscaled_too_early(when: str) -> RuntimeError:
    """Return the error for ``scaler.unscale_(optimizer)`` before the last pass has ended."""
    return RuntimeError(
        f"scaler.unscale_(optimizer) was called {when}: a scaler unscales the gradients of an optimizer once a step, "
        "and those of later passes would stay multiplied by its scale (65536 at first), or be divided by it twice. "
        "Call it after the last pass: between the loop over passes() and scaler.step(optimizer), or in the classic API "
        "after the second backward. step(closure) unscales by itself: leave it out there, or use passes() to clip"
    )


def check_scale(
    scale: Tensor | None, rules: tuple[Perturbation, Combination, Cadence], mixed: Combination | None
) -> None:
    """Refuse to step with scaled gradients, or with rules that have seen gradients times an unknown scale.

    Args:
        scale: The scale that the optimizer knows; None if it has no scaler.
        rules: The optimizer's rules.
        mixed: A combination that gets g scaled and g_s unscaled, in the classic API.

    Raises:
        RuntimeError: The step would be wrong.
    """
    by_scaler = called_by_scaler()
    if scale is not None and not by_scaler:
        raise RuntimeError(
            "step() after passes with a loss scaler: the gradients are still multiplied by its scale. Call "
            "scaler.step(optimizer), which unscales them, in the place of optimizer.step()"
        )
    sized = [mixed] if mixed is not None else [rule for rule in rules if not scale_free(rule)]
    if by_scaler and scale is None and sized:
        raise RuntimeError(
            f"scaler.step(optimizer) with {sized[0]}, which depends on the size of the gradients: it got them "
            "multiplied by a scale that changes from step to step. Make the optimizer with scaler=scaler, so that it "
            "gets them unscaled. (A rule that works alike on any positive multiple of g declares scale_free = True)"
        )
