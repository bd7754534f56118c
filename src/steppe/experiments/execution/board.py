"""Progress of several runs at a time: a bar for each one in progress, and one for all."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from steppe.experiments.config.recipe import Run
from steppe.experiments.execution.progress import Lines, Reporter
from steppe.experiments.storage.records import Record

__all__ = ["Board", "board"]


class Board(Reporter):
    """Bars for the units in progress and for all of them together, `total` standardized epochs; on a terminal."""

    def __init__(self, total: int, console: Console, measure: str = "test") -> None:
        self._measure = measure
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._all = self._bars.add_task("all runs", total=total, detail="standardized epochs")
        self._tasks: dict[Run, TaskID] = {}
        self._come: dict[Run, float] = {}
        self._scored: dict[Run, str] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self._bars.stop()

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """Show the unit's bar; a unit that begins again after its process died goes back on it."""
        self._scored[run] = _scores(records[-1], self._measure) if records else ""
        if run not in self._tasks:
            self._tasks[run] = self._bars.add_task(_title(run), total=run.standardized_epochs, detail="")
        self._move(run, standardized_epoch, self._scored[run])

    def step(self, run: Run, standardized_epoch: float, loss: float, images_per_second: float) -> None:
        """Move its bar and that of all."""
        detail = f"loss {loss:.3f}  {self._scored.get(run, '')}  {images_per_second:,.0f} images/s"
        self._move(run, standardized_epoch, detail)

    def measured(self, run: Run, record: Record) -> None:
        """Show the new accuracies."""
        self._scored[run] = _scores(record, self._measure)
        self._move(run, record.standardized_epoch, f"loss {record.train_loss:.3f}  {self._scored[run]}")

    def end(self, run: Run, records: Sequence[Record]) -> None:
        """Turn the unit's bar into a line."""
        self._move(run, run.standardized_epochs, "")
        if run in self._tasks:
            self._bars.remove_task(self._tasks.pop(run))
        scores = _scores(records[-1], self._measure)
        self._bars.console.print(f"{_title(run)}: {scores}  in {records[-1].seconds:.0f} s", soft_wrap=True)

    def _move(self, run: Run, standardized_epoch: float, detail: str) -> None:
        self._come[run] = standardized_epoch
        if run in self._tasks:
            self._bars.update(self._tasks[run], completed=standardized_epoch, detail=detail)
        self._bars.update(self._all, completed=sum(self._come.values()))


class PlainLines(Lines):
    """A line for each measurement, where what stands for the test set has another name."""

    def __init__(self, measure: str) -> None:
        self._measure = measure

    def measured(self, run: Run, record: Record) -> None:
        """Print the measurement."""
        print(
            f"{_title(run)}  standardized epoch {record.standardized_epoch}/{run.standardized_epochs}  "
            f"loss {record.train_loss:.4f}  {_scores(record, self._measure)}",
            flush=True,
        )


def board(total: int, console: Console, measure: str = "test") -> Reporter:
    """Bars on a terminal, plain lines elsewhere; `measure` is what the second split of the data is."""
    if console.is_terminal:
        return Board(total, console, measure)
    return Lines() if measure == "test" else PlainLines(measure)


def _title(run: Run) -> str:
    return f"{run.spec.label} seed {run.seed}"


def _scores(record: Record, measure: str) -> str:
    return f"train {record.train_accuracy:6.2f} %  {measure} {record.test_accuracy:5.2f} %  gap {record.gap:5.2f}"
