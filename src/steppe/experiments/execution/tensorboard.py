"""Measurements of runs as TensorBoard logs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.records import Record
from steppe.experiments.training.reporter import Reporter
from steppe.experiments.world import World


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
        self.__exit__()
        # drops what was logged after the point where the run resumes
        self._writer = self._make(str(self._folder / run.name), purge_step=int(standardized_epoch) + 1)
        self._reporter.begin(run, standardized_epoch, records)

    def step(self, run: Run, standardized_epoch: float, loss: float, images_per_second: float) -> None:
        self._reporter.step(run, standardized_epoch, loss, images_per_second)

    def measured(self, run: Run, record: Record) -> None:
        assert self._writer is not None  # begin() comes first
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "gap", "images_per_second"):
            self._writer.add_scalar(name, getattr(record, name), int(record.standardized_epoch))
        self._reporter.measured(run, record)

    def end(self, run: Run, records: Sequence[Record]) -> None:
        self._reporter.end(run, records)

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()


def with_tensorboard(reporter: Reporter, run: Run, control: Path, world: World) -> AbstractContextManager[Reporter]:
    """Let a reporter also log to TensorBoard, in the folder `control`, if the run's options say so."""
    wanted = run.recipe.output.tensorboard and world.rank == 0
    return TensorBoard(control / "tensorboard", reporter) if wanted else nullcontext(reporter)
