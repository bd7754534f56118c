"""Measurements of runs as TensorBoard logs."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.records import Record
from steppe.experiments.training.reporter import Reporter


class TensorBoard(Reporter):
    """Logs the measurements for TensorBoard, and forwards everything to another reporter, which stays the caller's.

    Raises ExperimentError when TensorBoard is not installed.
    """

    def __init__(self, folder: Path, reporter: Reporter | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ExperimentError(
                "--tensorboard needs TensorBoard, which is not installed: pip install 'steppe[tensorboard]'"
            ) from error
        self._folder, self._make, self._reporter = folder, SummaryWriter, reporter or Reporter()
        self.interval = float("inf") if reporter is None else reporter.interval
        self._writer: SummaryWriter | None = None

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """Open the run's log, and drop what was logged after the point where the run resumes."""
        self._close()
        self._writer = self._make(str(self._folder / run.name), purge_step=int(standardized_epoch) + 1)
        self._reporter.begin(run, standardized_epoch, records)

    def step(self, run: Run, standardized_epoch: float, loss: float, images_per_second: float) -> None:
        """Forward the state of the training."""
        self._reporter.step(run, standardized_epoch, loss, images_per_second)

    def measured(self, run: Run, record: Record) -> None:
        """Log every number of the record over the standardized epochs."""
        assert self._writer is not None  # begin() comes first
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "gap", "images_per_second"):
            self._writer.add_scalar(name, getattr(record, name), int(record.standardized_epoch))
        self._reporter.measured(run, record)

    def end(self, run: Run, records: Sequence[Record]) -> None:
        """Forward the end of the run."""
        self._reporter.end(run, records)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush and close the log."""
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
