"""Corrupted images, calibration and rounded weights in a comparison: a table, and verdicts on the main measures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steppe.experiments.analysis.end_measures import EndMeasures, judge_measures, records_with
from steppe.experiments.analysis.metric_verdicts import MetricVerdict
from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.analysis.tables import Table
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.task_info import MetricInfo
from steppe.experiments.robustness.records import PREFIX, Measure, measures_in
from steppe.experiments.storage.run_folder import Results

TITLE = "The trained networks on corrupted images, and with rounded weights"
MAIN = ("accuracy under corruptions", "calibration error", "accuracy at 4 bits")
"""The measures that have a sentence: with one for each of all, some would be wrong by chance."""
READING = (
    "By chance alone, any of these is called better or worse in at most 5 % of comparisons. Accuracies are in "
    "percent, the calibration error in percentage points. Of it, the negative log-likelihood and the Brier "
    "score, less is better."
)
"""How verdicts and table are to be read."""
_LEAST_NEEDED = (
    *("Brier score", "negative log-likelihood", "accuracy at 8 bits", "accuracy at 2 bits", "accuracy at 3 bits"),
    *("accuracy under brightness", "accuracy under contrast", "accuracy under blur", "accuracy under shift"),
    *("accuracy under salt_and_pepper", "accuracy under gaussian_noise"),
)
"""In the order in which a narrow console leaves them out."""


@dataclass(frozen=True)
class Robustness(EndMeasures):
    """Means over the runs of each method at equal compute, and verdicts on every measure."""

    methods: Sequence[MethodSpec]
    measures: Sequence[Measure]
    values: Mapping[str, Mapping[str, Estimate]]
    """By method and by measure."""
    verdicts: Mapping[str, Sequence[MetricVerdict]]
    """By measure."""

    def main_verdicts(self) -> list[MetricVerdict]:
        """Return the verdicts that have sentences."""
        return [verdict for name in MAIN for verdict in self.verdicts.get(name, ())]

    def table(self) -> Table:
        """Return the table: a row for each method, a column for each measure."""
        rows = [
            [
                method.label,
                *(_cell(self.values[str(method)].get(measure.name), measure) for measure in self.measures),
            ]
            for method in self.methods
        ]
        positions = {measure.name: i + 1 for i, measure in enumerate(self.measures)}
        own = [name for name in positions if name not in _LEAST_NEEDED and name not in MAIN]
        optional = tuple((positions[name],) for name in (*_LEAST_NEEDED, *own) if name in positions)
        return Table(["method", *(m.heading for m in self.measures)], {"": rows}, title=TITLE, optional=optional)

    def notes(self) -> Iterator[str]:
        """Yield the verdicts on the main measures in sentences, and the units of the table."""
        labels = {str(method): method.label for method in self.methods}
        yield from (verdict.sentence(labels) for verdict in self.main_verdicts())
        yield READING

    def json(self) -> list[dict[str, Any]]:
        """Return the verdicts on every measure; its means are in the rows of the summary."""
        return [verdict.json() for verdicts in self.verdicts.values() for verdict in verdicts]


def robustness_of(recipe: Recipe, results: Results) -> Robustness | None:
    """Collect the measures at equal compute; None where none were made."""
    found = records_with(recipe, results, lambda record: bool(measures_in(record.measures)))
    methods = [method for method in recipe.comparison.methods if str(method) in found]
    if not methods:
        return None
    every = [record for by_seed in found.values() for record in by_seed.values()]
    measures = measures_in(dict.fromkeys(name for record in every for name in record.measures))
    values = {str(method): dict(_estimates(found[str(method)].values(), measures)) for method in methods}
    base = str(recipe.comparison.methods[0])
    return Robustness(methods, measures, values, _verdicts(measures, recipe, results) if base in found else {})


def _estimates(records: Any, measures: Sequence[Measure]) -> Iterator[tuple[str, Estimate]]:
    for measure in measures:
        values = [r.measures[PREFIX + measure.name] for r in records if PREFIX + measure.name in r.measures]
        if values:
            yield measure.name, estimate(values)


def _verdicts(measures: Sequence[Measure], recipe: Recipe, results: Results) -> dict[str, Sequence[MetricVerdict]]:
    """Judge the main measures together, as they are read together, and all others together."""
    verdicts: dict[str, Sequence[MetricVerdict]] = {}
    for main in (True, False):
        names = {
            MetricInfo(measure.name, measure.higher_is_better, measure.unit): PREFIX + measure.name
            for measure in measures
            if (measure.name in MAIN) == main
        }
        verdicts |= {metric.name: of for metric, of in judge_measures(recipe, results, names).items()}
    return {measure.name: verdicts[measure.name] for measure in measures}


def _cell(value: Estimate | None, measure: Measure) -> str:
    return "–" if value is None else value.text(".2f" if measure.unit == "%" else ".3f")
