"""Forgetting in a comparison: a table and verdicts on the first task after training on a second one."""

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
from steppe.experiments.storage.records import AFTER, FORGOTTEN, ON_SECOND
from steppe.experiments.storage.run_folder import Results

TITLE = "Forgetting: the networks after training on a second task"


@dataclass(frozen=True)
class Forgetting(EndMeasures):
    """Means over the runs of each method, and verdicts on the measures after the second task."""

    methods: Sequence[MethodSpec]
    deciding: MetricInfo
    """The metric of the first task."""
    others: Sequence[MetricInfo]
    """Its further metrics, after the second task."""
    values: Mapping[str, Mapping[str, Estimate]]
    """By method and by the name of the measure."""
    verdicts: Sequence[MetricVerdict]
    second: str
    """The second task in words."""

    def table(self) -> Table:
        """Return the table: a row for each method."""
        name, unit = self.deciding.name, f" {self.deciding.unit}".rstrip()
        points = f", {self.deciding.unit_of_change}" if self.deciding.unit else ""
        columns = [
            (name, self.deciding, f"first task,\nbefore{unit}"),
            (name + AFTER, self.deciding, f"first task,\nafter{unit}"),
            (name + FORGOTTEN, self.deciding, f"forgotten{points}"),
            (name + ON_SECOND, self.deciding, f"second\ntask{unit}"),
            *((other.name + AFTER, other, f"{other.name},\nafter {other.unit}".rstrip()) for other in self.others),
        ]
        rows = [
            [method.label, *(_cell(self.values[str(method)].get(column), metric) for column, metric, _ in columns)]
            for method in self.methods
        ]
        optional = tuple((i,) for i in range(len(columns), 4, -1))
        return Table(["method", *(heading for *_, heading in columns)], {"": rows}, title=TITLE, optional=optional)

    def notes(self) -> Iterator[str]:
        """Yield the verdicts in sentences, and what was done."""
        labels = {str(method): method.label for method in self.methods}
        yield from (verdict.sentence(labels) for verdict in self.verdicts)
        yield (
            f"The second task is {self.second}, on which a copy of each network was trained with the base alone. "
            "Forgetting can be compared where the second task is learned equally well."
        )

    def json(self) -> list[dict[str, Any]]:
        """Return the verdicts; the means are in the rows of the summary."""
        return [verdict.json() for verdict in self.verdicts]


def forgetting_of(recipe: Recipe, results: Results) -> Forgetting | None:
    """Collect the measures at equal compute; None where there was no second task."""
    deciding, *others = recipe.task.measured
    found = records_with(recipe, results, lambda record: f"test_{deciding.name}{AFTER}" in record.measures)
    methods = [method for method in recipe.comparison.methods if str(method) in found]
    if not methods:
        return None
    names = [
        *(deciding.name + suffix for suffix in ("", AFTER, FORGOTTEN, ON_SECOND)),
        *(m.name + AFTER for m in others),
    ]
    values = {
        str(method): {name: estimate([r[f"test_{name}"] for r in found[str(method)].values()]) for name in names}
        for method in methods
    }
    base = str(recipe.comparison.methods[0])
    judged = [
        MetricInfo(deciding.name + AFTER, deciding.higher_is_better, deciding.unit),
        MetricInfo(deciding.name + FORGOTTEN, False, deciding.unit),
        MetricInfo(deciding.name + ON_SECOND, deciding.higher_is_better, deciding.unit),
    ]
    verdicts = judge_measures(recipe, results, {m: f"test_{m.name}" for m in judged}) if base in found else {}
    of_each = [verdict for metric in judged for verdict in verdicts.get(metric, ())]
    return Forgetting(methods, deciding, others, values, of_each, recipe.forgetting.description)


def _cell(value: Estimate | None, metric: MetricInfo) -> str:
    return "–" if value is None else value.text(metric.form, None if metric.form.endswith("f") else ".2g")
