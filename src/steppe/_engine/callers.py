"""The caller of a step: warnings at the user's own line, and frameworks that change what a step has to do.

No argument carries this information, so that it is read from the call stack.
"""

import gc
import sys
import warnings
from types import FrameType, GeneratorType
from typing import Any

_INTERNAL_PACKAGES = ("torch", "steppe", "accelerate")
_SCALER_FUNCTION = "_maybe_opt_step"
"""The function in which an enabled ``GradScaler`` calls ``optimizer.step()``; a private name of torch."""
_UNSCALE_FUNCTION = "_unscale_grads_"
"""The function in which an enabled ``GradScaler`` reads ``optimizer.param_groups`` and unscales; likewise."""

_LOAD_FUNCTION = "_load_optim_state_dict"
"""The function in which ``torch.distributed.checkpoint`` loads an optimizer's checkpoint; likewise."""


def _caller() -> tuple[FrameType, int]:
    """Return the innermost frame outside of the internal packages, and the number of frames to it."""
    level, frame = 1, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL_PACKAGES:
        level, frame = level + 1, frame.f_back
    return frame, level


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the innermost caller outside torch and this package.

    A fixed ``stacklevel`` would point into torch: hooks, schedulers and decorators add frames of their own.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn("careful")
    >>> [str(w.message) for w in caught]
    ['careful']
    """
    warnings.warn(message, category, stacklevel=_caller()[1] + 1)


def called_by_scaler() -> bool:
    """True if an enabled ``GradScaler`` called, through any decorators and wrappers.

    A scaler leaves no other trace: without this, gradients that were unscaled could not be told from scaled ones.
    """
    return _frame_of(_SCALER_FUNCTION, within=14) is not None


def unscaling_scaler() -> tuple[Any, int] | None:
    """Return the scaler that reads the groups of an optimizer to unscale its gradients; None if none does.

    Returns:
        The scaler, and the number under which it keeps the state of the optimizer, or of a proxy of it.
    """
    frame = _frame_of(_UNSCALE_FUNCTION, within=4)
    return None if frame is None else (frame.f_locals["self"], id(frame.f_locals["optimizer"]))


def flattened_checkpoint() -> dict[str, Any] | None:
    """Return the checkpoint that torch loads if it is flattened (``flatten_optimizer_state_dict=True``); else None.

    Torch passes on only those entries of it that it finds in the groups and the state of the optimizer.
    """
    frame = _frame_of(_LOAD_FUNCTION, within=8)
    checkpoint = None if frame is None else frame.f_locals.get("state_dict")
    return checkpoint if isinstance(checkpoint, dict) and "state" not in checkpoint else None


def _frame_of(function: str, *, within: int) -> FrameType | None:
    """Return the frame of a function that called the caller of this module, through a few others; None if none did."""
    frame = sys._getframe(2).f_back
    for _ in range(within):
        if frame is None or frame.f_code.co_name == function:
            return frame
        frame = frame.f_back
    return None


def called_by_trainer() -> bool:
    """True if Hugging Face's Trainer called: it makes one backward a step and gives no closure."""
    frame, _ = _caller()
    return frame.f_globals.get("__name__") == "transformers.trainer"


def refuse_accumulation() -> None:
    """Refuse ``passes()`` inside ``accelerator.accumulate()``, for a micro-batch that is not the last one of its step.

    Raises:
        RuntimeError: Accelerate accumulates gradients.
    """
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    # The private _shared_state is read, because the constructor of GradientState could change it.
    # It outlives the loop: one that ends in the middle of an accumulation leaves it behind for every later one.
    if state is not None and not state._shared_state.get("sync_gradients", True) and accumulates():
        raise RuntimeError(
            "passes() inside accelerator.accumulate(): every pass starts with cleared gradients, so all "
            "micro-batches but the last would be lost. steppe.integrations.accelerate has the loop that runs them "
            "all in each pass, and accumulate=True gives each a perturbation of its own"
        )


def accumulates() -> bool:
    """True in a block of ``accelerator.accumulate()``, or if Hugging Face's Trainer called, which has none.

    The generator of an open block is suspended in it, and neither a frame of the call stack nor a variable shows it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.trainer":
            return True
        frame = frame.f_back
    accelerator = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", None)
    code = getattr(getattr(getattr(accelerator, "accumulate", None), "__wrapped__", None), "__code__", None)
    if code is None:
        return True  # another version of Accelerate, whose blocks cannot be told
    generators = (o for o in gc.get_objects() if type(o) is GeneratorType and o.gi_code is code)
    return any(generator.gi_frame is not None for generator in generators)
