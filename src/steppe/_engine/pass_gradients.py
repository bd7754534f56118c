"""Notice passes without a gradient: the step would train nothing, or only half of it would be SAM."""

from typing import Any

import torch

from steppe._engine.gradients import Gradients


class PassGradients:
    """Records which passes of a step have made a gradient for any parameter of the optimizer."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self._made: list[bool] = []
        self._backward_ran = False
        self._empty_steps = 0
        self._before: int | None = None

    def begin_step(self, *, accumulate: bool = False) -> None:
        """Begin a step; with ``accumulate``, there may be a gradient before its passes."""
        self._made, self._backward_ran = [True] if accumulate and self._gradients.any() else [], False

    def begin_pass(self, *, first_step: bool) -> None:
        """Begin a pass. In the first step, note the number of backwards, which costs a tenth of a millisecond."""
        self._before = number_of_backwards() if first_step else None

    def end_pass(self, *, made: bool) -> None:
        """Record if the pass has made a gradient."""
        if made or self._before is None or number_of_backwards() != self._before + 1:
            self._backward_ran = True
        self._made.append(made)

    @property
    def any(self) -> bool:
        """True if a pass of this step has made a gradient."""
        return any(self._made)

    def problem(self) -> str:
        """Return a warning about the passes of this step, or an empty string. Called once a step, before the base's."""
        self._empty_steps = 0 if self.any else self._empty_steps + 1
        if self.any and not all(self._made):
            return (
                f"pass {self._made.index(False) + 1} of a step made no gradient, and another pass made one: the step "
                "is not SAM's. Run forward and backward in every pass"
            )
        # One such step may be a loss on other parameters, or a batch that the closure has left out.
        if not self.any and (not self._backward_ran or self._empty_steps > 1):
            return (
                "no pass of this step made a gradient for a parameter of the optimizer, so nothing was trained. Call "
                "backward() in each pass, on a loss that depends on these parameters; a closure may return the loss "
                "instead"
            )
        return ""


def number_of_backwards() -> int:
    """Return the number of backwards in this process so far, including one that this function runs."""
    # A private name of torch: nothing else shows that a backward ran if it made no gradient for our parameters.
    numbers: list[int] = []
    with torch.enable_grad():
        probe: Any = torch.zeros((), requires_grad=True)
        probe.register_hook(lambda _: numbers.append(torch._C._current_graph_task_id()))
        torch.autograd.backward(probe.clone())
    return numbers[0]
