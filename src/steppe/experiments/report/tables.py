"""The tables: they stand in the page itself, and need no script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.analysis.summary import Summary
from steppe.experiments.config.method_spec import parse
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.figures.style import Style, styles
from steppe.experiments.report.markup import Markup, change, element, join, spread
from steppe.experiments.report.payload import on_dark
from steppe.experiments.report.verdicts import typographic, word, word_of
from steppe.flatness import FAMILIES, Flatness

__all__ = ["chips", "configuration", "environment", "flatness_table", "summary_table"]

_HEADINGS = (
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

_FEW = 2  # methods, up to which a line has room for all that is said of a measure
_BAR = (112.0, 14.0)  # width and height of an interval's picture


@dataclass(frozen=True)
class _Change:
    """A difference to the reference: its mean, half of its 95 % interval, and the verdict."""

    mean: float
    half: float | None
    verdict: str

    def show(self, reach: float) -> Iterator[Markup]:
        """The numbers, their picture, the word."""
        yield element("span", change(self.mean, self.half), class_="numbers")
        if self.half is not None:
            yield _bar(self.mean, self.half, reach)
        yield word_of(self.verdict)


def chips(recipe: Recipe) -> Markup:
    """A button for each method, that switches it on and off in the whole page."""
    return join(
        *(
            element("button", _swatch(style), style.label, type="button", class_="chip", data_chip=method)
            for method, style in styles(recipe).items()
        )
    )


def summary_table(recipe: Recipe, summary: Summary) -> Markup:
    """The methods with mean ± standard deviation."""
    if not summary.rows:
        return element("p", "Nothing has been measured yet.", class_="empty")
    look = styles(recipe)
    head = element("tr", *(element("th", name, *_unit(run), scope="col") for name, run in _HEADINGS))
    rows = (
        element(
            "tr",
            element("th", _swatch(look[row.method]), row.cells()[0], scope="row"),
            *(
                element("td", typographic(cell).replace("±", " ± "), data_column=name)
                for (name, _), cell in zip(_HEADINGS[1:], row.cells()[1:], strict=True)
            ),
            data_method=row.method,
        )
        for row in summary.rows
    )
    table = element("table", element("thead", head), element("tbody", *rows), id="summary-table")
    note = element("p", "Mean ± standard deviation over the runs of each method.", class_="aside")
    return join(_scrolling("Summary", table), note)


def flatness_table(recipe: Recipe, summary: Summary, flatness: Mapping[Run, Flatness]) -> Markup:
    """Every measure of every method, its difference to the reference, and what generalized beside it."""
    reference = recipe.methods[0]
    look = styles(recipe)
    head = element(
        "tr",
        element("th", "measure", scope="col"),
        *(
            element("th", _swatch(style), style.label, scope="col", data_method=method)
            for method, style in look.items()
        ),
    )
    there = {name for flat in flatness.values() for name in flat.measures}
    groups = [
        element(
            "tbody",
            element("tr", _group(family.title, family.about, len(look) + 1)),
            *(_measure(recipe, summary, flatness, k, label) for k, label in family.measures.items() if k in there),
            data_family=family.title,
        )
        for family in FAMILIES.values()
        if there & set(family.measures)
    ]
    groups.append(_generalization(recipe, summary))
    note = element(
        "p",
        f"Mean ± standard deviation over the runs; then the difference to {parse(reference).label}, paired by seed, "
        "with its 95 % interval, where the upright line is no difference. Lower is flatter.",
        class_="aside",
    )
    wide = "few" if len(look) <= _FEW else None
    table = element("table", element("thead", head), *groups, id="flatness-table", class_=wide)
    return join(_scrolling("Flatness", table), note)


def configuration(recipe: Recipe) -> Markup:
    """Every field of the recipe."""
    return _pairs({key: _json(value) for key, value in recipe.to_json().items()})


def environment(sessions: Sequence[Mapping[str, Any]]) -> Markup:
    """Where each session ran."""
    if not sessions:
        return element("p", "The folder has no environment.json.", class_="empty")
    return join(
        *(
            join(element("h4", f"Session {i}"), _pairs({k: _json(v) for k, v in session.items()}))
            for i, session in enumerate(sessions, 1)
        )
    )


def _measure(recipe: Recipe, summary: Summary, flatness: Mapping[Run, Flatness], name: str, label: str) -> Markup:
    changes = {
        verdict.method: _Change(row.difference.mean, row.difference.half_width, row.word)
        for verdict in summary.flatness
        for row in verdict.rows
        if row.name == name
    }
    measures = [(run.method, flat.measures[name]) for run, flat in flatness.items() if name in flat.measures]
    finite: dict[str, list[float]] = {}
    for method, measure in measures:
        if math.isfinite(measure.value):
            finite.setdefault(method, []).append(measure.value)
    means = {method: estimate(values) for method, values in finite.items()}
    values = {method: spread(mean.mean, mean.sd) for method, mean in means.items()}
    notes = dict.fromkeys(measure.note for _, measure in measures if measure.note)
    return _row(recipe, name, join(label, *(element("small", note) for note in notes)), values, changes)


def _generalization(recipe: Recipe, summary: Summary) -> Markup:
    """Test gap and accuracy, in the manner of the measures."""
    rows = {row.method: row for row in summary.rows if row.standardized_epoch == recipe.epochs}
    differences = {difference.method: difference for difference in summary.differences}
    lines = []
    for field, label, better in (("gap", "generalization gap, points", -1), ("test_accuracy", "test accuracy, %", 1)):
        found: dict[str, Estimate] = {method: getattr(row, field) for method, row in rows.items()}
        values = {m: f"{e.mean:.2f}" + ("" if e.sd is None else f" ± {e.sd:.2f}") for m, e in found.items()}
        paired: dict[str, Estimate] = {method: getattr(difference, field) for method, difference in differences.items()}
        changes = {m: _Change(e.mean, e.half_width, word(e, better=better)) for m, e in paired.items()}
        lines.append(_row(recipe, field, label, values, changes))
    about = "What flatness is wanted for: measured, not concluded from it."
    first = element("tr", _group("Generalization", about, len(recipe.methods) + 1))
    return element("tbody", first, *lines, data_family="Generalization")


def _row(recipe: Recipe, name: str, label: str, values: Mapping[str, str], changes: Mapping[str, _Change]) -> Markup:
    """One measure: a cell for each method; the row's intervals are drawn on one scale."""
    reach = max((abs(c.mean) + (c.half or 0.0) for c in changes.values()), default=0.0) or 1.0
    cells = (
        element(
            "td",
            element(
                "div",
                element("span", typographic(values.get(method, "–")), class_="value"),
                *(changes[method].show(reach) if method in changes else ()),
                class_="cell",
            ),
            data_method=method,
            data_label=parse(method).label,
        )
        for method in recipe.methods
    )
    return element("tr", element("th", label, scope="row"), *cells, data_measure=name)


def _bar(mean: float, half: float, reach: float) -> Markup:
    """Draw an interval in a picture that goes from -reach to reach."""
    width, height = _BAR

    def x(value: float) -> str:
        return f"{width / 2 + (width / 2 - 5) * value / reach:.1f}"

    middle, zero = f"{height / 2:g}", f"{width / 2:g}"
    return element(
        "svg",
        element("line", x1=zero, x2=zero, y1="0", y2=f"{height:g}", class_="zero"),
        element("line", x1=x(mean - half), x2=x(mean + half), y1=middle, y2=middle, class_="reach"),
        element("circle", cx=x(mean), cy=middle, r="3.2"),
        class_="interval",
        viewBox=f"0 0 {width:g} {height:g}",
        aria_hidden="true",
    )


def _group(title: str, about: str, columns: int) -> Markup:
    content = element("b", title), join(" "), element("small", about)
    return element("th", *content, scope="rowgroup", colspan=str(columns), class_="group")


def _pairs(values: Mapping[str, str]) -> Markup:
    rows = (element("tr", element("th", key, scope="row"), element("td", value)) for key, value in values.items())
    return _scrolling("Values", element("table", element("tbody", *rows), class_="pairs"))


def _json(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _scrolling(label: str, table: Markup) -> Markup:
    """Let a wide table scroll by itself, with a finger or with the arrow keys."""
    return element("div", table, class_="scrolling", tabindex="0", role="region", aria_label=f"{label}, table")


def _unit(run: str) -> Iterator[Markup]:
    if run:
        yield element("small", f" {run}")


def _swatch(style: Style) -> Markup:
    """A dot in the method's color, hollow where its line is not solid."""
    colors = f"--light:{style.color};--dark:{on_dark(style.color)}"
    return element("i", class_="swatch" if style.line == "-" else "swatch hollow", style=colors, aria_hidden="true")
