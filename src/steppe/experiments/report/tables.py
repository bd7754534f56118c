"""The rows of the page's tables; tables.html writes them as HTML."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.analysis.summary import Summary, word
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.report.numbers import change, spread
from steppe.flatness import FAMILIES, Flatness

HEADINGS = (
    ("method", ""),
    ("standardized epochs", ""),
    ("passes a step", ""),
    ("train accuracy", "%"),
    ("test accuracy", "%"),
    ("gap", "points"),
    ("train loss", ""),
    ("time", "s"),
    ("runs", ""),
)
"""The columns of the summary, with their units."""

_BAR = (112.0, 14.0)  # width and height of the picture of an interval


@dataclass(frozen=True)
class Bar:
    """An interval as a picture: positions in its coordinates."""

    width: float
    height: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class Cell:
    """The value of one method, and its difference to the reference where there is one."""

    method: str
    label: str
    value: str
    difference: str = ""
    bar: Bar | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Line:
    """One measure: a cell for each method."""

    name: str
    label: str
    notes: Sequence[str]
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Group:
    """The measures of one family."""

    title: str
    about: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class _Change:
    """A difference to the reference, half of its 95 % interval, and the verdict."""

    mean: float
    half: float | None
    verdict: str


def flatness_groups(recipe: Recipe, summary: Summary, measured: Mapping[Run, Flatness]) -> Iterator[Group]:
    """Yield every measure of every method, its difference to the reference, and the generalization beside it."""
    names = {name for flat in measured.values() for name in flat.measures}
    for family in FAMILIES.values():
        found = [(name, label) for name, label in family.measures.items() if name in names]
        if found:
            lines = [_measure(recipe, summary, measured, name, label) for name, label in found]
            yield Group(family.title, family.about, lines)
    about = "What flatness is wanted for: measured, not concluded from it."
    yield Group("Generalization", about, list(_generalization(recipe, summary)))


def text(value: Any) -> str:
    """Write a JSON value as text.

    >>> text(["sgd", "sam"]), text(None), text("demo")
    ('sgd, sam', 'null', 'demo')
    """
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _measure(recipe: Recipe, summary: Summary, measured: Mapping[Run, Flatness], name: str, label: str) -> Line:
    changes = {
        verdict.method: _Change(row.difference.mean, row.difference.half_width, row.word)
        for verdict in summary.flatness
        for row in verdict.rows
        if row.name == name
    }
    measures = [(str(run.method), flat.measures[name]) for run, flat in measured.items() if name in flat.measures]
    finite: dict[str, list[float]] = {}
    for method, measure in measures:
        if math.isfinite(measure.value):
            finite.setdefault(method, []).append(measure.value)
    means = {method: estimate(values) for method, values in finite.items()}
    values = {method: spread(mean.mean, mean.sd) for method, mean in means.items()}
    notes = list(dict.fromkeys(measure.note for _, measure in measures if measure.note))
    return Line(name, label, notes, _cells(recipe, values, changes))


def _generalization(recipe: Recipe, summary: Summary) -> Iterator[Line]:
    rows = {str(row.method): row for row in summary.rows if row.standardized_epoch == recipe.comparison.epochs}
    for name, label, better in (("gap", "generalization gap, points", -1), ("test_accuracy", "test accuracy, %", 1)):
        found: dict[str, Estimate] = {method: getattr(row, name) for method, row in rows.items()}
        values = {m: e.text(".2f").replace("±", " ± ") for m, e in found.items()}
        paired: dict[str, Estimate] = {str(d.method): getattr(d, name) for d in summary.differences}
        changes = {m: _Change(e.mean, e.half_width, word(e, better=better)) for m, e in paired.items()}
        yield Line(name, label, (), _cells(recipe, values, changes))


def _cells(recipe: Recipe, values: Mapping[str, str], changes: Mapping[str, _Change]) -> list[Cell]:
    """Return one measure's cells, whose intervals are drawn on one scale."""
    reach = max((abs(c.mean) + (c.half or 0.0) for c in changes.values()), default=0.0) or 1.0
    cells = []
    for spec in recipe.comparison.methods:
        method, value = str(spec), values.get(str(spec), "–")
        if (c := changes.get(method)) is None:
            cells.append(Cell(method, spec.label, value))
        else:
            bar = None if c.half is None else _bar(c.mean, c.half, reach)
            cells.append(Cell(method, spec.label, value, change(c.mean, c.half), bar, c.verdict))
    return cells


def _bar(mean: float, half: float, reach: float) -> Bar:
    width, height = _BAR
    low, middle, high = (width / 2 + (width / 2 - 5) * x / reach for x in (mean - half, mean, mean + half))
    return Bar(width, height, low, middle, high)
