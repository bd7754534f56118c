"""The interface through which a run reports its progress."""

from collections.abc import Sequence
from typing import Self

from steppe.experiments.config.recipe import Run
from steppe.experiments.storage.records import Record


class Reporter:
    """Base class of progress reporters; does nothing. Use it as a context manager."""

    interval = 0.5
    """Seconds between two calls of `step`: each waits for the device."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """Report that a run starts, or resumes at its checkpoint."""

    def step(self, run: Run, standardized_epoch: float, loss: float, samples_per_second: float) -> None:
        """Report the state of the training."""

    def measured(self, run: Run, record: Record) -> None:
        """Report a measurement."""

    def saved(self, run: Run) -> None:
        """Report that a checkpoint was written, and the metrics that belong to it."""

    def end(self, run: Run, records: Sequence[Record]) -> None:
        """Report that the run is finished."""
