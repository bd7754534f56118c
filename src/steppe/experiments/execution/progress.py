"""The progress display of all commands: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Hashable, Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from steppe.experiments.config.recipe import Run
from steppe.experiments.config.task_info import IMAGES, TaskInfo
from steppe.experiments.storage.records import Record
from steppe.experiments.training.reporter import Reporter


def print_line(console: Console, text: str) -> None:
    """Print a text as it is; the terminal wraps it."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


class _TimeColumn(TimeRemainingColumn):
    """Remaining time, or elapsed time where the total is unknown."""

    def render(self, task: Task) -> Text:
        return TimeElapsedColumn().render(task) if task.total is None else super().render(task)


class _DetailColumn(TextColumn):
    """The column that a narrow terminal shortens, so that the others are complete: it alone may wrap, but does not."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class ProgressDisplay:
    """A bar for each task in progress and one for all tasks; without a terminal, only printed lines appear."""

    def __init__(self, console: Console, title: str, total: float, detail: str) -> None:
        self._bars = Progress(
            # without markup, which would replace the :name: of a model by an emoji
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[count]}", markup=False, table_column=Column(no_wrap=True)),
            _DetailColumn("{task.fields[detail]}", markup=False, table_column=Column()),
            _TimeColumn(table_column=Column(no_wrap=True, min_width=7)),
            console=console,
            expand=False,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task(title, total=total, count=f"0/{total:.0f}", detail=detail)
        self._total = total
        self._tasks: dict[Hashable, TaskID] = {}
        self._completed: dict[Hashable, float] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def update(self, key: Hashable, title: str, completed: float, total: float | None, detail: str) -> None:
        """Move the bar of a task, or add one; a task without a total counts only when it is finished."""
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(title, total=total, count="", detail=detail)
        count = "" if total is None else f"{completed:.0f}/{total:.0f}"
        self._bars.update(self._tasks[key], completed=completed, count=count, detail=detail)
        self._complete(key, completed)

    def finish(self, key: Hashable, completed: float) -> None:
        """Remove the bar of a task that has completed so much."""
        if key in self._tasks:
            self._bars.remove_task(self._tasks.pop(key))
        self._complete(key, completed)

    def print(self, line: str) -> None:
        print_line(self._bars.console, line)  # above the bars

    def _complete(self, key: Hashable, completed: float) -> None:
        self._completed[key] = completed
        done = sum(self._completed.values())
        self._bars.update(self._all, completed=done, count=f"{done:.0f}/{self._total:.0f}")


class RunProgress(ProgressDisplay, Reporter):
    """Displays runs, of `total` standardized epochs; `split` is the name of the data in place of the test set."""

    def __init__(self, console: Console, total: int, split: str = "test", task: TaskInfo = IMAGES) -> None:
        super().__init__(console, "all runs", total, "standardized epochs")
        self._terminal = console.is_terminal
        self.interval = 0.5 if self._terminal else float("inf")
        self._split, self._task = split, task
        self._samples = "samples" if task.description else "images"
        self._scores: dict[Run, str] = {}

    def begin(self, run: Run, standardized_epoch: float, records: Sequence[Record]) -> None:
        """Show the run's bar; a run that begins again after its worker died moves back on it."""
        self._scores[run] = self._text(records[-1]) if records else ""
        self._move(run, standardized_epoch, self._scores[run])
        if standardized_epoch and not self._terminal:
            state = "is finished" if standardized_epoch >= run.standardized_epochs else "resumes"
            self.print(f"{_title(run)}: {state} at standardized epoch {standardized_epoch:.2f}")

    def step(self, run: Run, standardized_epoch: float, loss: float, samples_per_second: float) -> None:
        detail = f"loss {loss:.3f}  {self._scores.get(run, '')}  {samples_per_second:,.0f} {self._samples}/s"
        self._move(run, standardized_epoch, detail)

    def measured(self, run: Run, record: Record) -> None:
        self._scores[run] = self._text(record)
        self._move(run, record.standardized_epoch, f"loss {record['train_loss']:.3f}  {self._scores[run]}")
        if not self._terminal:
            self.print(
                f"{_title(run)}  standardized epoch {record.standardized_epoch}/{run.standardized_epochs}  "
                f"loss {record['train_loss']:.4f}  {self._scores[run]}  "
                f"{record.images_per_second:,.0f} {self._samples}/s"
            )

    def end(self, run: Run, records: Sequence[Record]) -> None:
        self.finish(run, run.standardized_epochs)
        if self._terminal:
            self.print(f"{_title(run)}: {self._text(records[-1])}  in {records[-1].seconds:.0f} s")

    def _move(self, run: Run, standardized_epoch: float, detail: str) -> None:
        self.update(run, _title(run), standardized_epoch, run.standardized_epochs, detail)

    def _text(self, record: Record) -> str:
        metric = self._task.deciding
        name, unit = ("", f" {metric.unit}") if metric.unit else (f"{metric.name} ", "")
        train, test = record[f"train_{metric.name}"], record[f"test_{metric.name}"]
        digits = ".2f" if metric.unit == "%" else ".4g"
        return (
            f"{name}train {train:6{digits}}{unit}  {self._split} {test:5{digits}}{unit}  gap {record['gap']:5{digits}}"
        )


class JobProgress(ProgressDisplay):
    """Displays jobs whose length is unknown, and prints a line for each that is finished."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, "all jobs", total, "measured")
        self._started: dict[str, float] = {}

    def show(self, name: str, activity: str, passes: int) -> None:
        """Show the activity of a job and its passes so far."""
        self._started.setdefault(name, time.monotonic())
        if not self._completed.get(name):  # a late message must not bring the bar back
            self.update(name, name, 0, None, f"{activity} (pass {passes})")

    def done(self, name: str) -> None:
        self.finish(name, 1)
        seconds = time.monotonic() - self._started.get(name, time.monotonic())
        self.print(f"{name}: measured in {seconds:.0f} s ({sum(self._completed.values()):.0f} of {self._total:.0f})")


def _title(run: Run) -> str:
    return f"{run.method.label} seed {run.seed}"
