"""Measures at the end of equal compute that have a table of their own, such as those of robustness and forgetting."""

from collections.abc import Callable, Mapping

from steppe.experiments.analysis.controls import pairs
from steppe.experiments.analysis.metric_verdicts import (
    AVERAGED,
    EQUAL_COMPUTE,
    EQUAL_STEPS,
    MetricVerdict,
    judge_together,
)
from steppe.experiments.analysis.tables import TableWithNotes
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.task_info import MetricInfo
from steppe.experiments.storage.records import Record, record_at
from steppe.experiments.storage.run_folder import Results

Found = Mapping[str, Mapping[int, Record]]
"""The record of each run at equal compute, by method and by seed."""


class EndMeasures(TableWithNotes):
    """A table with notes, as a section of the summary."""

    def markdown(self) -> str:
        """Return the section of summary.md."""
        return "\n" + self.section(2)


def records_with(recipe: Recipe, results: Results, holds: Callable[[Record], bool]) -> Found:
    """Return the records of the methods at equal compute for which `holds` is true."""
    found: dict[str, dict[int, Record]] = {}
    for run, records in results.items():
        record = record_at(records, recipe.comparison.epochs)
        if run.method in recipe.comparison.methods and record is not None and holds(record):
            found.setdefault(str(run.method), {})[run.seed] = record
    return found


def judge_measures(
    recipe: Recipe, results: Results, names: Mapping[MetricInfo, str]
) -> dict[MetricInfo, list[MetricVerdict]]:
    """Judge every method against the base and its controls, corrected for all metrics.

    `names` are those of the metrics in records.
    """
    numbers = {
        control: {metric: pairs(recipe, results, control, name) for metric, name in names.items()}
        for control in (EQUAL_COMPUTE, EQUAL_STEPS, AVERAGED)
    }
    return judge_together(str(recipe.comparison.methods[0]), numbers)
