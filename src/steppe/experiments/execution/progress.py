"""How a comparison tells how it goes: live bars on a terminal, plain lines elsewhere, TensorBoard if asked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.records import Record

__all__ = ["Bars", "Lines", "Reporter", "TensorBoard", "Together", "reporter"]


class Reporter(AbstractContextManager["Reporter"]):
    """Is told how the units go; this one keeps silent. Use it as a context manager."""

    interval = 0.5
    """Seconds between two calls of `step`: each waits for the device."""

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """A unit starts, or goes on from where its checkpoint was."""

    def step(self, run: Run, standardized_epoch: float, loss: float, images_per_second: float) -> None:
        """The unit trains."""

    def measured(self, run: Run, record: Record) -> None:
        """The unit was measured."""

    def end(self, run: Run, records: Sequence[Record]) -> None:
        """The unit is finished."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop telling."""


def _title(run: Run) -> str:
    return f"{run.spec.label} seed {run.seed}"


def _scores(record: Record) -> str:
    return f"train {record.train_accuracy:6.2f} %  test {record.test_accuracy:5.2f} %  gap {record.gap:5.2f}"


class Lines(Reporter):
    """One plain line for each measurement."""

    interval = float("inf")

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """Say where the unit goes on, if it does not begin."""
        if standardized_epoch:
            done = "is finished" if standardized_epoch >= run.standardized_epochs else "goes on"
            print(f"{_title(run)}: {done} at standardized epoch {standardized_epoch:.2f}", flush=True)

    def measured(self, run: Run, record: Record) -> None:
        """Print the measurement."""
        print(
            f"{_title(run)}  standardized epoch {record.standardized_epoch}/{run.standardized_epochs}  "
            f"loss {record.train_loss:.4f}  {_scores(record)}  {record.images_per_second:,.0f} images/s",
            flush=True,
        )


class Bars(Reporter):
    """A bar for the unit in progress and one for the whole comparison; finished units leave a line."""

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._before = 0.0
        total = sum(run.standardized_epochs for run in recipe.runs())
        self._all = self._bars.add_task("all runs", total=total, detail="standardized epochs")
        self._one: TaskID | None = None
        self._scores = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self._bars.stop()

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """Show the unit's bar."""
        self._scores = _scores(records[-1]) if records else ""
        self._one = self._bars.add_task(
            _title(run), total=run.standardized_epochs, completed=int(standardized_epoch), detail=self._scores
        )
        self._move(standardized_epoch, self._scores)

    def step(self, run: Run, standardized_epoch: float, loss: float, images_per_second: float) -> None:
        """Move both bars."""
        self._move(standardized_epoch, f"loss {loss:.3f}  {self._scores}  {images_per_second:,.0f} images/s")

    def measured(self, run: Run, record: Record) -> None:
        """Show the new accuracies."""
        self._scores = _scores(record)
        self._move(record.standardized_epoch, f"loss {record.train_loss:.3f}  {self._scores}")

    def end(self, run: Run, records: Sequence[Record]) -> None:
        """Turn the unit's bar into a line."""
        if self._one is not None:
            self._bars.remove_task(self._one)
        self._one = None
        self._before += run.standardized_epochs
        self._bars.update(self._all, completed=self._before)
        self._bars.console.print(f"{_title(run)}: {_scores(records[-1])}  in {records[-1].seconds:.0f} s")

    def _move(self, standardized_epoch: float, detail: str) -> None:
        if self._one is not None:
            self._bars.update(self._one, completed=standardized_epoch, detail=detail)
        self._bars.update(self._all, completed=self._before + standardized_epoch)


class TensorBoard(Reporter):
    """Writes the measurements for TensorBoard; raises ExperimentError when that is not installed."""

    interval = float("inf")

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ExperimentError(
                "--tensorboard needs TensorBoard, which is not installed: pip install 'steppe[tensorboard]'"
            ) from error
        self._folder, self._make = folder, SummaryWriter
        self._writer: SummaryWriter | None = None

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """Open the unit's log; what was logged after the point where it goes on is dropped."""
        self._close()
        self._writer = self._make(str(self._folder / run.name), purge_step=int(standardized_epoch) + 1)

    def measured(self, run: Run, record: Record) -> None:
        """Log every number of the record over the standardized epochs."""
        assert self._writer is not None  # begin() comes first
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "gap", "images_per_second"):
            self._writer.add_scalar(name, getattr(record, name), int(record.standardized_epoch))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write out what is left."""
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Together(Reporter):
    """Several reporters as one."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters
        self.interval = min(reporter.interval for reporter in reporters)

    def __enter__(self) -> Self:
        for one in self._reporters:
            one.__enter__()
        return self

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """Tell all."""
        for one in self._reporters:
            one.begin(run, standardized_epoch, records)

    def step(self, run: Run, standardized_epoch: float, loss: float, images_per_second: float) -> None:
        """Tell all."""
        for one in self._reporters:
            one.step(run, standardized_epoch, loss, images_per_second)

    def measured(self, run: Run, record: Record) -> None:
        """Tell all."""
        for one in self._reporters:
            one.measured(run, record)

    def end(self, run: Run, records: Sequence[Record]) -> None:
        """Tell all."""
        for one in self._reporters:
            one.end(run, records)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell all."""
        for one in reversed(self._reporters):
            one.__exit__(kind, error, trace)


def reporter(recipe: Recipe, *, speaks: bool, console: Console) -> Reporter:
    """Choose how to tell: nothing where `speaks` is false (a further process), bars on a terminal, lines elsewhere."""
    if not speaks:
        return Reporter()
    first: Reporter = Bars(recipe, console) if console.is_terminal else Lines()
    return Together(first, TensorBoard(recipe.folder / "tensorboard")) if recipe.tensorboard else first
