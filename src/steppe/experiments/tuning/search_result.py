"""The result of a search from Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from steppe.experiments.report.notebook import as_html, draw_all
from steppe.experiments.tuning.figure import drawings
from steppe.experiments.tuning.result import TrialResult, TuningResult
from steppe.experiments.tuning.search_space import Values


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The result of :func:`steppe.experiments.tune`; a notebook shows its trials, its notes and its figures."""

    summary: TuningResult

    @property
    def folder(self) -> Path:
        """The run folder of the search."""
        return self.summary.path

    @property
    def table(self) -> str:
        """The complete trials, the best of each method first, in Markdown."""
        return "\n".join(self.summary.table().markdown())

    @property
    def trials(self) -> Sequence[TrialResult]:
        """All trials, each with its method, values, state and runs."""
        return self.summary.trials

    @property
    def best(self) -> Sequence[str]:
        """The methods with their best arguments, as `compare` takes them: ["base", "sam:rho=0.1"]."""
        return [str(best.recipe.comparison.methods[0]) for best in self.summary.best]

    @property
    def values(self) -> Mapping[str, Values]:
        """The best values by method, also of options of the recipe, such as lr: {"sam": {"rho": 0.1}}."""
        return {best.result.method: best.result.values for best in self.summary.best}

    @property
    def commands(self) -> Sequence[str]:
        """The commands, or calls of Python, that compare the methods at their best on the test data, by fresh seeds.

        Where the best lr or the like of the methods differ, there are several, and none compares one with another.
        """
        return [*self.summary.commands()]

    def figures(self) -> dict[str, Figure]:
        """Draw the validation metric and the gap over each searched number, by its name."""
        return draw_all(drawings(self.summary))

    def __str__(self) -> str:
        return self.summary.markdown()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        confirm = [f"To confirm on the test data: {command}" for command in self.commands]
        notes = [*self.summary.notes(), *self.summary.warnings(), *confirm, *self.summary.limits()]
        return as_html(self.summary.table(), notes, self.figures())
