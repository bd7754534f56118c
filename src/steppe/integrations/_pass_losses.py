"""Metrics of the passes of a step, under the same names in all integrations.

``loss`` is L(w), ``perturbed_loss`` is L(w + e), and ``sharpness`` is L(w + e) - L(w).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from steppe.sam import Pass

PERTURBED_LOSS, SHARPNESS = "perturbed_loss", "sharpness"


class StepLosses:
    """The losses of one step: L(w) of its pass at w, and L(w + e) of its last perturbed pass."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.perturbed_loss: Tensor | None = None

    def add(self, sam_pass: Pass, loss: Tensor | None) -> None:
        """Add the loss of a pass."""
        if loss is None:
            return
        sam_pass.record_loss(loss)
        if sam_pass.is_perturbed:
            self.perturbed_loss = loss
        elif sam_pass.is_at_w:
            self.loss = loss

    def metrics(self) -> dict[str, Tensor]:
        """Return ``perturbed_loss`` if the step was perturbed, and ``sharpness`` if it had a pass at w as well."""
        if self.perturbed_loss is None:
            return {}
        if self.loss is None:
            return {PERTURBED_LOSS: self.perturbed_loss}
        return {PERTURBED_LOSS: self.perturbed_loss, SHARPNESS: self.perturbed_loss - self.loss}


class MeanLosses:
    """Means of ``perturbed_loss`` and ``sharpness`` over the perturbed steps with a pass at w."""

    def __init__(self) -> None:
        self._steps = 0
        self._sums: Tensor | float = 0.0

    def add(self, step: StepLosses) -> None:
        """Count a step, if it was perturbed and had a pass at w."""
        if step.loss is not None and step.perturbed_loss is not None:
            self._steps += 1
            self._sums = self._sums + torch.stack([step.perturbed_loss, step.loss])

    def metrics(self, gather: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, Tensor]:
        """Return the means, or nothing if there was no such step.

        Args:
            gather: Concatenates a tensor of all processes along its first dimension.
        """
        if not isinstance(self._sums, Tensor):
            return {}
        perturbed_loss, loss = (gather(self._sums.unsqueeze(0)).mean(0) / self._steps).unbind()
        return {PERTURBED_LOSS: perturbed_loss, SHARPNESS: perturbed_loss - loss}
