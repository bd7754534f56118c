"""The result of a comparison from Python."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from steppe.experiments.analysis.metric_verdicts import MetricVerdict
from steppe.experiments.analysis.statistics import rank
from steppe.experiments.analysis.summary import Summary
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures import curves
from steppe.experiments.report.notebook import as_html, draw_all
from steppe.experiments.storage.run_folder import Results
from steppe.experiments.tasks.task import Task


@dataclass(frozen=True, eq=False)
class ComparisonResult:
    """The result of :func:`steppe.experiments.compare`; a notebook shows its table, its verdicts and its curves."""

    recipe: Recipe
    results: Results
    """By run: its measurements in order."""
    summary: Summary
    task: Task | None = field(default=None, repr=False)
    """The task, if it has no name by which it could be imported."""

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
        return draw_all(curves.drawings(self.recipe, self.results))

    def __str__(self) -> str:
        return self.summary.markdown()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        shown = (drawing for drawing in curves.drawings(self.recipe, self.results) if drawing.stem == "overview")
        return as_html(self.summary.table(), self.summary.notes(), draw_all(shown))
