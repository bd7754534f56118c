"""Who called: warnings that point at the user's own line, and frameworks that a step must know of."""

import sys
import warnings
from types import FrameType

_INSIDE = ("torch", "steppe", "accelerate")
_SCALERS_CALL = "_maybe_opt_step"  # in GradScaler.step, where the scaler is enabled


def _caller() -> tuple[FrameType, int]:
    """The innermost caller outside of what lies between a user and us, and how many frames away it is."""
    level, frame = 1, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    return frame, level


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as the innermost caller outside torch and this package, whatever decorators and hooks lie between.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn("careful")
    >>> [str(w.message) for w in caught]
    ['careful']
    """
    warnings.warn(message, category, stacklevel=_caller()[1] + 1)


def called_by_scaler() -> bool:
    """Whether an enabled ``GradScaler`` has called, through whatever decorators and wrappers."""
    frame = sys._getframe(1).f_back
    for _ in range(12):
        if frame is None:
            return False
        if frame.f_code.co_name == _SCALERS_CALL:
            return True
        frame = frame.f_back
    return False


def called_by_trainer() -> bool:
    """Whether Hugging Face's Trainer has called, whose loop makes one backward a step and gives no closure."""
    frame, _ = _caller()
    return frame.f_globals.get("__name__") == "transformers.trainer"


def inside_an_accumulation() -> bool:
    """Whether ``accelerator.accumulate()`` is in force, for a micro-batch that is not the last one of its step."""
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return state is not None and not state._shared_state.get("sync_gradients", True)
