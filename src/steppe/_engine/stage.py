"""Stages of one step, and the error for a call out of order."""

import enum


class Stage(enum.Enum):
    """Stage of a step; the value describes it in the error for a call out of order."""

    IDLE = "between two steps"
    IN_PASS = "inside a pass of passes()"
    BETWEEN_PASSES = "inside the loop over passes(), before its end"
    INCOMPLETE = "after a loop over passes() that did not reach its end (an exception, an interrupt, a break, or zip())"
    AFTER_FIRST_STEP = "between first_step() and second_step()"
    READY = "after passes(), before step()"


def out_of_order(caller: str, stage: Stage) -> RuntimeError:
    """Return the error for a call that would lose an incomplete step."""
    if stage is Stage.INCOMPLETE:
        return RuntimeError(
            f"{caller} was called {stage.value}: there is no update gradient, and the weights are at w. Leave {caller} "
            f"out for this batch, or run a new loop over passes() before it; restore() aborts the step. zip() leaves "
            f"the second of two loops before its end: write zip(a.passes(), b.passes(), strict=True), or make one SAM "
            f"of both bases, SAM([base_a, base_b])"
        )
    return RuntimeError(
        f"{caller} was called {stage.value}: this step is not complete, and another call would lose it. End the loop "
        f"over passes(), or call second_step() or step() after first_step(), before the next step; restore() aborts "
        f"the step and restores the weights"
    )
