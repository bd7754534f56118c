"""The context manager of one pass."""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, NoReturn, Self

from torch import Tensor

from steppe._engine.eager import eager
from steppe._engine.engine import Engine
from steppe._engine.stage import Stage


class Pass(ExitStack[bool | None]):
    """One forward+backward over all micro-batches of a step: displaces the weights on entry, restores them on exit.

    :meth:`steppe.SAM.passes` yields the passes of a step; each is entered once.

    Args:
        engine: The engine of the optimizer.
        begin: Displaces the weights and saves or restores what the pass must not change.
        is_first, is_last, is_perturbed, is_at_w: The attributes of these names.
    """

    # An ExitStack, because an interrupt at the first line of an __exit__ in Python cannot be caught there: the weights
    # would stay at w + e. The stack calls the remaining callbacks if an interrupt hits one.
    # Entry, end and the iteration below are eager, for a training function that is compiled as a whole.

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
        super().__init__()
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
        self._failed = self._made_gradient = False
        self._frozen: list[Tensor] = []
        self._trained_late = 0
        self._around: list[AbstractContextManager[Any]] = []

    def around(self, context: AbstractContextManager[Any]) -> Self:
        """Run the pass in a context: entered before the weights are displaced, and left after they are restored.

        Further calls add contexts inside of it.
        """
        self._around.append(context)
        return self

    @eager
    def __enter__(self) -> Self:
        begin, self._begin = self._begin, None
        if begin is None:
            raise RuntimeError("this pass has already run; enter each object yielded by passes() once")
        engine = self._engine
        try:
            for context in self._around:
                self.enter_context(context)
            self.push(self._end)
            self.push(self._end)  # twice: the second call completes one that an interrupt has hit
            engine.pass_gradients.begin_pass(first_step=engine.steps == 0)
            if self.is_first and not self.is_at_w:  # no gradient has shown yet which parameters are trained
                self._frozen = engine.frozen_parameters()
            begin()
            del begin  # it holds the first gradient, which would stay in memory through the second pass
            engine.gradients.clear()
            if self.is_first and engine.ranks.holds_unreduced_gradients():
                engine.warn_once("unreduced gradients", _UNREDUCED_BEFORE)
            engine.ranks.drop_unreduced_gradients()
            self.enter_context(engine.ranks.context_of_pass(is_last=self.is_last))
            engine.stage = Stage.IN_PASS
            return self
        except BaseException:  # Python does not call __exit__ if __enter__ raises, an interrupt included
            self.__exit__(*sys.exc_info())
            raise

    @eager
    def _end(
        self, kind: type[BaseException] | None, error: BaseException | None = None, _: TracebackType | None = None
    ) -> None:
        if self.done and (self._failed or kind is None):
            return
        self._failed = kind is not None
        if self._failed:
            self._engine.leave_loop()
            self._engine.ranks.drop_unreduced_gradients()
            if not self.is_first and any(message in str(error) for message in _OLD_GRAPH):
                error.add_note(_RUN_ALL_INSIDE)  # type: ignore[union-attr]
        else:
            self._engine.restore()
            self._engine.stage = Stage.BETWEEN_PASSES
            self._made_gradient = self._engine.gradients.any()
            self._trained_late = sum(p.grad is not None for p in self._frozen)
            self._frozen = []
        self.done = True

    def record_loss(self, loss: Any) -> None:
        """Record the mean loss of this pass for :meth:`steppe.SAM.report`; ``step(closure)`` does so by itself."""
        if self.is_at_w or self.is_perturbed:
            self._engine.recorder.loss(loss, is_perturbed=self.is_perturbed)

    def check(self) -> None:
        """Refuse to go on after a pass that was no pass of SAM, and record that it made a gradient.

        Raises:
            RuntimeError: The pass was not entered, has failed, or its backward ran after its end.
        """
        engine = self._engine
        if not self.done:
            raise RuntimeError(
                "a pass of passes() was not entered, so it ran without protection and perturbation. Write `for "
                "sam_pass in optimizer.passes():` and, inside, `with sam_pass:` around forward and backward"
            )
        if self._failed:
            raise RuntimeError(
                "the loop over passes() went on after an exception inside a pass, so the update gradient would be that "
                "of an incomplete pass. Catch the exception outside of the loop, or leave the loop with break, and go "
                "on with the next batch"
            )
        engine.ranks.refuse_unreduced_gradients()
        if not self._made_gradient and engine.gradients.any():
            raise RuntimeError(BACKWARD_OUTSIDE)
        engine.pass_gradients.end_pass(made=self._made_gradient)
        if self._trained_late:
            engine.warn_once(
                "trained late",
                f"{self._trained_late} parameters were frozen (requires_grad=False) when a step began, and its first "
                "pass trained them. With this method that pass is not at w, but it ran with these weights at w: the "
                "method was off for them. Unfreeze them before step() or passes(), not inside of a pass",
            )


class Passes(Iterator[Pass]):
    """The passes of a step, for a loop: a generator that names the remedy where it is taken for a context manager."""

    def __init__(self, passes: Generator[Pass]) -> None:
        self._passes = passes

    def __iter__(self) -> Iterator[Pass]:
        return self

    @eager
    def __next__(self) -> Pass:
        return next(self._passes)

    def close(self) -> None:
        """Leave the loop before its end."""
        self._passes.close()

    def __enter__(self) -> NoReturn:
        raise TypeError(
            "passes() is no context manager, because a step has several passes: write `for sam_pass in "
            "optimizer.passes():` and, inside, `with sam_pass:` around forward and backward"
        )

    def __exit__(self, *_: object) -> None: ...


_OLD_GRAPH = ("modified by an inplace operation", "backward through the graph a second time")
"""Parts of torch's messages about a graph that was made before the weights were perturbed."""
_RUN_ALL_INSIDE = (
    "This was a further pass of SAM, at perturbed weights: a part of its graph was made before it, at other weights. A "
    "loss, an output or a hidden state that is kept from before the pass cannot be used in it. Run the whole forward "
    "inside each pass (in the closure, or in `with sam_pass:`), and start each from the same, detached state"
)
_UNREDUCED_BEFORE = (
    "gradients that FSDP2 had not reduced (set_requires_gradient_sync(False)) were dropped when the passes of a step "
    "began: the micro-batches that made them are not part of the step. Run all micro-batches inside each pass (in the "
    "closure), the last one with set_requires_gradient_sync(True)"
)
BACKWARD_OUTSIDE = (
    "a pass ended without any gradient, and the gradients came after it: the backward ran outside of `with sam_pass:`, "
    "where the weights are at w and the side effects of a second pass stay. Run forward and backward inside of it"
)
