"""The result of a measurement from Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from steppe.experiments.analysis.summary import setting
from steppe.experiments.analysis.tables import Table, bullets
from steppe.experiments.analysis.verdicts import CAVEATS, Verdict, verdicts
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.figures.flatness import drawings
from steppe.experiments.measuring.flatness_table import table_of_methods
from steppe.experiments.report.notebook import as_html, draw_all
from steppe.flatness import Flatness


@dataclass(frozen=True, eq=False)
class FlatnessResult:
    """The result of :func:`steppe.experiments.measure`; a notebook shows its measures, its verdicts and its figures."""

    recipe: Recipe
    measured: Mapping[Run, Flatness]
    """The measures of each run."""

    @property
    def folder(self) -> Path:
        """The run folder, whose summary and report.html now have the measures as well."""
        return self.recipe.folder

    @property
    def table(self) -> str:
        """The measures, with a column for each method, in Markdown."""
        return "\n".join(self._table.markdown())

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """One verdict a method, against the first one; `verdict.word` is "flatter", "sharper", ..."""
        return verdicts(self.recipe, self.measured)

    def figures(self) -> dict[str, Figure]:
        """Draw the spectra and the landscapes, where they were measured."""
        return draw_all(drawings(self._by_method, setting(self.recipe)))

    @property
    def _by_method(self) -> dict[str, list[Flatness]]:
        methods = self.recipe.comparison.methods
        return {m.label: [found for run, found in self.measured.items() if run.method == m] for m in methods}

    @property
    def _table(self) -> Table:
        return table_of_methods(self._by_method, f"{self.recipe.name}, flatness: {setting(self.recipe)}")

    @property
    def _notes(self) -> list[str]:
        found = [note for verdict in self.verdicts for note in (verdict.sentence(), *verdict.notes())]
        return [*found, *(CAVEATS if found else ())]

    def __str__(self) -> str:
        return "\n".join([f"# {self._table.title}", "", self.table, "", *bullets(self._notes), ""])

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return as_html(self._table, self._notes, self.figures())
