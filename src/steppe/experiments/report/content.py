"""The content of the page: the verdict in sentences, where unknown is stated as plainly as known, and table rows."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steppe.experiments.analysis.metric_verdicts import MetricVerdict, controls_of
from steppe.experiments.analysis.statistics import Decision, Estimate, estimate
from steppe.experiments.analysis.summary import Summary
from steppe.experiments.analysis.verdicts import CAVEATS
from steppe.experiments.analysis.words import BAD, GOOD, NO_VERDICT, NOT_MEASURED
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.report.numbers import change, spread
from steppe.flatness import FAMILIES, Flatness
from steppe.flatness.families import labels_by_family

KINDS: Mapping[str, str] = dict.fromkeys(GOOD, "good") | dict.fromkeys(BAD, "bad")
"""The class of a verdict's word on the page; every other word is "open"."""

Headline = Sequence[tuple[str, str]]
"""A sentence as pairs: a text, and the verdict's word after it, which the page sets apart."""

Changes = Mapping[str, tuple[Estimate, str]]
"""By method: the difference to the reference, and its verdict."""


def headlines(summary: Summary, *, measured: bool) -> list[Headline]:
    """Return the verdict on generalization and, if `measured`, flatness: one sentence for all methods it is true of."""
    if not summary.rows:
        return [[("Nothing has been measured yet.", "")]]
    if not summary.verdicts:
        return [[("There is one method so far, and nothing to compare it with.", "")]]
    if all(verdict.first.difference.n + verdict.first.difference.lost == 1 for verdict in summary.verdicts):
        return [[("One run of each method gives ", NO_VERDICT), (": chance alone may explain the difference.", "")]]
    flatness = {verdict.method: verdict.word for verdict in summary.flatness}
    groups: dict[tuple[str, str, str], list[MetricVerdict]] = {}
    for verdict, gap in summary.verdicts_with_gaps():
        flat = flatness.get(verdict.method, NO_VERDICT if measured else NOT_MEASURED)
        groups.setdefault((verdict.word, "" if gap is None else gap.word, flat), []).append(verdict)
    return [_headline(summary.labels, of, *words) for words, of in groups.items()]


def _headline(labels: Mapping[str, str], of: Sequence[MetricVerdict], accuracy: str, gap: str, flat: str) -> Headline:
    name = of[0].metric.name
    about = subject([labels[verdict.method] for verdict in of], labels[of[0].base])
    minima = ("minima " if len(of) > 1 else "minimum ") if flat in KINDS else "flatness "
    if accuracy == gap:
        parts = [(f"{about}test {name} and generalization gap ", accuracy)]
    else:
        parts = [(f"{about}test {name} ", accuracy), *([(", generalization gap ", gap)] if gap else [])]
    return [*parts, (f"; {minima}", flat), (".", "")]


def subject(ours: Sequence[str], theirs: str) -> str:
    """Return the beginning of a sentence that compares methods with another one."""
    *most, last = ours
    return f"{', '.join(most)} and {last} against {theirs}: " if most else f"{last} against {theirs}: "


def details(summary: Summary) -> list[str]:
    """Return the sentences with the numbers, the runs and the intervals, and every caveat, each once."""
    sentences = list(summary.notes())
    for verdict in summary.flatness:
        sentences += [verdict.sentence(), *verdict.notes()]
    return list(dict.fromkeys([*sentences, *(CAVEATS if summary.flatness else [])]))


def text(value: Any) -> str:
    """Write the value of an option as text.

    >>> text(["sgd", "sam"]), text(None), text("demo")
    ('sgd, sam', 'null', 'demo')
    """
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def flatness_groups(
    recipe: Recipe, summary: Summary, measured: Mapping[Run, Flatness]
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield title, explanation and rows of each family of measures, and of the generalization beside them.

    A row has a cell for each method: its value and, where there is one, its difference to the reference.
    """
    for family, labels in labels_by_family(name for flat in measured.values() for name in flat.measures).items():
        if labels:
            rows = [_measure(recipe, summary, measured, name, label) for name, label in labels.items()]
            yield FAMILIES[family].title, FAMILIES[family].about, rows
    about = "What flatness is wanted for: measured, not concluded from it."
    yield "Generalization", about, list(generalization(recipe, summary))


def footnotes(measured: Mapping[Run, Flatness]) -> dict[str, list[str]]:
    """Return each note on measures, with their names, once: of notes that differ in numbers only, the largest.

    Ascents of a run "differ by up to 7 %", those of another one by up to 12 %; the latter is true of both.
    """
    largest: dict[str, str] = {}
    names: dict[str, dict[str, None]] = {}
    for flat in measured.values():
        for name, measure in flat.measures.items():
            if measure.note:
                kind = measure.note.partition(", which differ")[0]
                largest[kind] = max(largest.get(kind, ""), measure.note, key=_largest_number)
                names.setdefault(kind, {})[name] = None
    return {largest[kind]: list(found) for kind, found in names.items()}


def _largest_number(note: str) -> tuple[float, str]:
    return max(map(float, re.findall(r"(\d+)%", note)), default=-1.0), note


def _measure(
    recipe: Recipe, summary: Summary, measured: Mapping[Run, Flatness], name: str, label: str
) -> dict[str, Any]:
    changes = {
        verdict.method: (row.difference, row.word)
        for verdict in summary.flatness
        for row in verdict.rows
        if row.name == name
    }
    finite: dict[str, list[float]] = {}
    for run, flat in measured.items():
        measure = flat.measures.get(name)
        if measure is not None and math.isfinite(measure.value):
            finite.setdefault(str(run.method), []).append(measure.value)
    values = {method: spread(estimate(found).mean, estimate(found).sd) for method, found in finite.items()}
    return {"label": label, "name": name, "cells": cells(recipe, values, changes)}


def generalization(recipe: Recipe, summary: Summary) -> Iterator[dict[str, Any]]:
    """Yield the rows of the gap and of the deciding metric on the test data."""
    rows = {str(row.method): row for row in summary.rows if row.standardized_epoch == recipe.comparison.epochs}
    metric = summary.task.deciding
    gap = f"generalization gap, {metric.unit_of_change}".removesuffix(", ")
    measures = (
        ("gap", gap, summary.gaps),
        (f"test_{metric.name}", metric.with_unit(f"test {metric.name}"), summary.verdicts),
    )
    for name, label, verdicts in measures:
        values = {method: row.measures[name].text(metric.form, sign=" ± ") for method, row in rows.items()}
        changes = {verdict.method: (verdict.first.difference, verdict.word) for verdict in verdicts}
        yield {"label": label, "name": name, "cells": cells(recipe, values, changes)}


def cells(recipe: Recipe, values: Mapping[str, str], changes: Changes) -> list[dict[str, Any]]:
    """Return the cells of a row; `bar` is an interval from -1 to 1, on one scale for all of them."""
    intervals = {method: _interval(value) for method, (value, _) in changes.items()}
    reach = max((abs(end) for interval in intervals.values() for end in interval or ()), default=0.0) or 1.0
    found: list[dict[str, Any]] = []
    for method in recipe.comparison.methods:
        cell = {"method": method, "label": method.label, "value": values.get(str(method), "–"), "bar": None}
        if str(method) in changes:
            (value, verdict), interval = changes[str(method)], intervals[str(method)]
            cell |= {"difference": change(value.mean, interval), "verdict": verdict}
            cell["bar"] = interval and [x / reach for x in (interval[0], value.mean, interval[1])]
        found.append(cell)
    return found


def _interval(value: Estimate) -> tuple[float, float] | None:
    """Return the interval as the sentences have it: a decision's ends at 0 where a difference was found."""
    if isinstance(value, Decision):
        return value.interval
    half = value.half_width
    return None if half is None else (value.mean - half, value.mean + half)


def control_rows(recipe: Recipe, summary: Summary) -> Iterator[dict[str, Any]]:
    """Yield a row for each method and measure: its differences to the base and to the controls, each with its word."""
    methods = {str(method): method for method in recipe.comparison.methods}
    verdicts = summary.verdicts_with_controls()
    controls = controls_of(verdicts)
    for verdict in verdicts:
        compared = [verdict.control(control) for control in controls]
        yield {
            "method": methods[verdict.method],
            "label": methods[verdict.method].label,
            "measure": verdict.metric.name,
            "cells": [
                ("–", "") if each is None else (change(each.difference.mean, each.difference.interval), each.word)
                for each in compared
            ],
        }
