"""The context manager of one pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

from steppe._engine.engine import Engine
from steppe._engine.stage import Stage


class Pass:
    """One forward+backward over all micro-batches of a step: displaces the weights on entry, restores them on exit.

    :meth:`steppe.SAM.passes` yields the passes of a step; each is entered once.

    Args:
        engine: The engine of the optimizer.
        begin: Displaces the weights and saves or restores what the pass must not change.
        is_first, is_last, is_perturbed, is_at_w: The attributes of these names.
    """

    def __init__(
        self,
        engine: Engine,
        begin: Callable[[], None],
        *,
        is_first: bool,
        is_last: bool | None,
        is_perturbed: bool,
        is_at_w: bool = False,
    ) -> None:
        self._engine = engine
        self._begin: Callable[[], None] | None = begin
        self.is_perturbed = is_perturbed
        """True if this pass runs at w + e."""
        self.is_at_w = is_at_w
        """True if this pass runs at w; False at w + e, or at a point of the method's own (SAMPa's y)."""
        self.is_first = is_first
        """True if this is the step's first pass: at w, unless the step has a single pass."""
        self.is_last = is_last
        """True if the gradient of this pass is used for the update: that of the step's last pass, and in some methods
        (Lookbehind, SAMPa) those of earlier passes, too. None if the cadence decides by the gradient of this pass."""
        self.done = False
        """True if this pass has run."""
        self._context: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> Self:
        begin, self._begin = self._begin, None
        if begin is None:
            raise RuntimeError("this pass has already run; enter each object yielded by passes() once")
        engine = self._engine
        try:
            begin()
            del begin  # it holds the first gradient, which would stay in memory through the second pass
            engine.gradients.clear()
            self._context = engine.ranks.context_of_pass(is_last=self.is_last)
            self._context.__enter__()
        except BaseException:  # Python does not call __exit__ if __enter__ raises, an interrupt included
            engine.restore()
            raise
        engine.stage = Stage.IN_PASS
        return self

    def check_entered(self) -> None:
        """Refuse to go on after a pass that was yielded and not entered.

        Raises:
            RuntimeError: The pass has not run.
        """
        if not self.done:
            self._engine.stage = Stage.IDLE
            raise RuntimeError(
                "a pass of passes() was not entered, so it ran without protection and perturbation. Write `for "
                "sam_pass in optimizer.passes():` and, inside, `with sam_pass:` around forward and backward"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self.done = True
        self._context.__exit__(None, None, None)
        self._engine.restore()
        self._engine.stage = Stage.BETWEEN_PASSES if kind is None else Stage.IDLE
