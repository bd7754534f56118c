"""Comparisons from Python, for a task of one's own; the command line is in :mod:`.commands`."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from torch.optim import Optimizer

from steppe.experiments import comparison
from steppe.experiments.analysis.metric_verdicts import MetricVerdict
from steppe.experiments.analysis.statistics import rank
from steppe.experiments.analysis.summary import Summary, columns
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.execution.executor import ExecutionOptions
from steppe.experiments.figures import curves
from steppe.experiments.storage.run_folder import Results, RunFolder
from steppe.experiments.tasks.task import Task


@dataclass(frozen=True, eq=False)
class ComparisonResult:
    """The result of :func:`compare`; in a notebook it shows its table, its verdicts and its curves."""

    recipe: Recipe
    results: Results
    """By run: its measurements in order."""
    summary: Summary

    @property
    def folder(self) -> Path:
        """The run folder, with report.html."""
        return self.recipe.folder

    @property
    def table(self) -> str:
        """The table, in Markdown."""
        return "\n".join(self.summary.table().markdown())

    @property
    def verdicts(self) -> Sequence[MetricVerdict]:
        """One verdict a method, against the first one; `verdict.word` is "better", "worse", ..."""
        return self.summary.verdicts

    @property
    def advice(self) -> Sequence[str]:
        """Sentences: which method to take, at what price, how sure that is, what to try next."""
        return self.summary.advice

    @property
    def best(self) -> MethodSpec:
        """The method with the best mean of the deciding metric at equal compute; `verdicts` say how sure that is."""
        metric = self.recipe.task.deciding
        rows = [row for row in self.summary.rows if row.standardized_epoch == self.recipe.comparison.epochs]
        return max(rows, key=lambda row: rank(metric.better * row.measures[f"test_{metric.name}"].mean)).method

    def figures(self) -> dict[str, Figure]:
        """Draw the figures of the run folder, by the names of their files."""
        return {drawing.stem: drawing.figure for drawing in curves.drawings(self.recipe, self.results)}

    def __str__(self) -> str:
        return self.summary.markdown()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        heads, *rows = [[column.name for column in columns(self.summary.task)], *self.summary.cells]
        lines = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"]
        lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.summary.notes())
        picture = io.BytesIO()
        self.figures()["overview"].savefig(picture, format="png", dpi=90)
        source = base64.b64encode(picture.getvalue()).decode()
        title = escape(self.summary.title)
        return (
            f"<p><b>{title}</b></p><table>{''.join(lines)}</table><ul>{notes}</ul>"
            f'<img alt="Curves of {title}" src="data:image/png;base64,{source}">'
        )


def compare(
    task: Task | Callable[[], Task] | str,
    methods: Sequence[str | Callable[..., Optimizer]] = ("base", "sam"),
    *,
    epochs: int = 20,
    seeds: int = 3,
    out: str | Path | None = None,
    runs_at_once: int = 1,
    quiet: bool = False,
    **options: Any,
) -> ComparisonResult:
    """Train methods on a task at equal compute, and compare them with the first one.

    Finished runs of the folder are kept, and a stopped comparison goes on where it was.

    Args:
        task: A :class:`Task`, a function that returns one, or the name of either, "package.module:task". By a name, or
            as a function of an importable module, the task can be measured by `steppe measure` as well.
        methods: Names as on the command line ("sam", "sam:rho=0.1", "base+ema", "package.module:function"), or
            functions (base, rho=0.05, ...) -> optimizer. The first one is what the others are compared with.
        epochs: Standardized epochs: the compute of each method, in gradient evaluations by training samples. An epoch
            of SAM counts as 2.
        seeds: Runs of each method. One gives no verdict.
        out: The run folder; by default runs/NAME.
        runs_at_once: Runs at a time, each in a process of its own. Above 1, a script needs its calls under
            `if __name__ == "__main__":`.
        quiet: True to print nothing.
        **options: Any other option of `steppe compare task --help`, such as rho, lr, batch_size, schedule, eval_every,
            device, with underscores.

    Returns:
        The result, with its table, verdicts, advice and figures.

    Raises:
        ExperimentError: The task has an error, or a run failed; the message names the function and the reason.
        ValueError: An option or a method is unknown or out of range.

    Example:
        >>> from steppe.experiments import compare
        >>> result = compare("my_project.flowers:task", ["base", "sam:rho=0.1"], epochs=20, seeds=5)  # doctest: +SKIP
        >>> print(result.table)  # doctest: +SKIP
    """
    name, given = _named(task)
    label = given.name if given is not None and given.name != "task" else name.rpartition(":")[2]
    recipe = RECIPES["task"][0].replace(
        **{
            "name": label if label.isidentifier() else "task",
            "task": name,
            "methods": methods,
            "epochs": epochs,
            "seeds": seeds,
            "out": out,
            **options,
        }
    )
    console = Console(quiet=quiet, emoji=False)
    execution = ExecutionOptions(runs_at_once=runs_at_once)
    comparison.compare(recipe, ["steppe.experiments.compare", name], console, execution, given)
    folder = RunFolder(recipe.folder)
    trained = folder.recipe().replace(out=recipe.folder, methods=recipe.comparison.methods)
    results = folder.results(trained)
    return ComparisonResult(trained, results, comparison.summarize_folder(folder, trained, results, console))


def _named(task: Task | Callable[[], Task] | str) -> tuple[str, Task | None]:
    """Return the name of a task, and the task itself if it cannot be imported by that name."""
    if isinstance(task, str):
        return task, None
    if isinstance(task, Task):
        return f"{task.name}", task
    module, qualified = getattr(task, "__module__", "__main__"), getattr(task, "__qualname__", "<>")
    if module != "__main__" and "<" not in qualified:
        return f"{module}:{qualified}", None
    return str(getattr(task, "__name__", "task")), task()
