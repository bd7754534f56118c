"""Measures at the end of equal compute that have a table of their own, such as those of robustness and forgetting."""

from collections.abc import Callable, Mapping

from steppe.experiments.analysis.metric_verdicts import BySeed, MetricVerdict, judge_together
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
    """Return the records at equal compute for which `holds` is true."""
    found: dict[str, dict[int, Record]] = {}
    for run, records in results.items():
        record = record_at(records, recipe.comparison.epochs)
        if record is not None and holds(record):
            found.setdefault(str(run.method), {})[run.seed] = record
    return found


def judge_measures(base: str, found: Found, names: Mapping[MetricInfo, str]) -> dict[MetricInfo, list[MetricVerdict]]:
    """Judge every method against the base, corrected for all metrics; `names` are those of the metrics in records."""
    return judge_together(base, {metric: _pairs(base, found, name) for metric, name in names.items()})


def _pairs(base: str, found: Found, name: str) -> dict[str, BySeed]:
    """Return the numbers of each method and of the base by seed, where both were measured."""
    theirs = {seed: record.measures[name] for seed, record in found[base].items() if name in record.measures}
    pairs = {
        method: {
            seed: (record.measures[name], theirs[seed])
            for seed, record in by_seed.items()
            if name in record.measures and seed in theirs
        }
        for method, by_seed in found.items()
        if method != base
    }
    return {method: by_seed for method, by_seed in pairs.items() if by_seed}
