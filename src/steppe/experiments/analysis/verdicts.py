"""Verdicts on flatness: a method's minima against the reference's, measure by measure."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.analysis.tables import bullets, markdown_row, markdown_table, show_table, size_of
from steppe.flatness import FAMILIES, Flatness

_HEADINGS, _LEFT = ("measure", "", "", "difference ± 95 %", "verdict"), (0, 4)
_WORDS: Mapping[int | None, str] = {None: "no verdict", 0: "not distinguishable", -1: "flatter", 1: "sharper"}

_APART = 2.0  # ratio of two losses, from which on the difference in fit may explain that in flatness

_FAMILIES = tuple(name for name in FAMILIES if name != "context")

CAVEATS = (
    "A network can be rescaled without changing its function, and its raw measures change; it can become more "
    "confident, and all measures that depend on its logits change. Only where every kind of measure agrees is a "
    "minimum called flatter or sharper.",
    "Each interval is a 95 % one by itself: of so many, one in twenty shows a difference where there is none.",
    "Flatter does not mean better: sharpness often does not track generalization (arXiv 2302.07011). Look at the test "
    "accuracies and the gap beside it.",
)


@dataclass(frozen=True)
class Row:
    """A measure of a method and of the reference, and their difference, paired."""

    name: str
    family: str
    reference: Estimate
    ours: Estimate
    difference: Estimate

    @property
    def label(self) -> str:
        return FAMILIES[self.family].measures[self.name]

    @property
    def word(self) -> str:
        """The verdict of this measure; empty for the context."""
        return "" if self.family == "context" else _WORDS[self.difference.sign]

    def cells(self) -> list[str]:
        half = "" if self.difference.half_width is None else f" ± {self.difference.half_width:.2g}"
        return [self.label, _text(self.reference), _text(self.ours), f"{self.difference.mean:+.3g}{half}", self.word]


@dataclass(frozen=True)
class Verdict:
    """A method against the reference."""

    method: str
    reference: str
    labels: tuple[str, str]
    """Their names in tables and sentences, the method first."""
    rows: Sequence[Row]
    further: str = ""
    """A further note for the reader."""

    @property
    def runs(self) -> int:
        return self.rows[0].difference.n

    def family(self, name: str) -> str:
        """Return the verdict of a family: one word if its measures do not contradict each other, else "mixed"."""
        words = Counter(row.word for row in self.rows if row.family == name)
        if not words or set(words) == {"no verdict"}:
            return "no verdict"
        if words["flatter"] and words["sharper"]:
            return "mixed"
        return next((word for word in ("flatter", "sharper") if words[word]), "not distinguishable")

    @property
    def word(self) -> str:
        """The verdict of raw and adaptive measures, and of normalized logits where measured, if all have the same."""
        words = {self.family(name) for name in _FAMILIES if self._of(name) or name != "normalized"}
        return words.pop() if len(words) == 1 and "mixed" not in words else "inconclusive"

    def sentence(self) -> str:
        ours, theirs = self.labels
        about = f"{ours}'s minima against {theirs}'s, {self.runs} paired run{'s'[: self.runs > 1]}: "
        if self.runs == 1:
            return f"{about}no verdict on flatness, which needs two runs of each at least."
        if self.word == "no verdict":
            return f"{about}no verdict on flatness, as no raw or adaptive measure is finite in all of them."
        counts = "; ".join(self._count(name) for name in _FAMILIES if self._of(name))
        because = ""
        if self.word == "inconclusive":
            mixed = any(self.family(name) == "mixed" for name in _FAMILIES)
            because = f", because measures of {'one kind' if mixed else 'different kinds'} do not agree"
        return f"{about}{self.word}{because} ({counts})."

    def notes(self) -> list[str]:
        """Return further notes: a warning where the two losses are far apart, as the two are then not fitted alike."""
        further = [self.further] if self.further else []
        row = next((row for row in self.rows if row.name == "loss"), None)
        if row is None:
            return further
        (low, lower), (high, higher) = sorted(zip((row.ours.mean, row.reference.mean), self.labels, strict=True))
        if low < 0 or high <= _APART * low:
            return further
        factor = f", a factor of {high / low:.2g}" if low else ""
        return [
            *further,
            f"The loss is {low:.2g} for {lower} and {high:.2g} for {higher}{factor}. Raw curvature falls with the loss "
            "itself, so being flatter and being fitted further cannot be distinguished here: compare at equal loss as "
            f"well, by training {higher} for longer.",
        ]

    def markdown(self) -> str:
        lines = markdown_table(self._headings(), [], _LEFT)
        for name, family in FAMILIES.items():
            rows = self._of(name)
            lines += [f"| **{family.title}** | | | | |"] if rows else []
            lines += [markdown_row(row.cells()) for row in rows]
        return "\n".join([*lines, "", *bullets([self.sentence(), *self.notes()])])

    def show(self, console: Console) -> None:
        """Print the table, the sentence and the notes; a narrow console shows the differences only."""
        table = self._table((0, 1, 2, 3, 4))
        if size_of(table, console).maximum > console.width:
            table = self._table((0, 3, 4))
        show_table(console, table, [self.sentence(), *self.notes()])

    def json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "reference": self.reference,
            "runs": self.runs,
            "measures": [
                {
                    "name": row.name,
                    "difference": {"n": row.difference.n, "mean": row.difference.mean, "sd": row.difference.sd},
                    "half_width_95": row.difference.half_width,
                    "verdict": row.word,
                }
                for row in self.rows
            ],
            **{name: self.family(name) for name in _FAMILIES},
            "verdict": self.word,
            "sentence": self.sentence(),
            "notes": self.notes(),
        }

    def _headings(self) -> list[str]:
        ours, theirs = self.labels
        return [_HEADINGS[0], theirs, ours, *_HEADINGS[3:]]

    def _table(self, shown: Sequence[int]) -> Table:
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for i in shown:
            table.add_column(escape(self._headings()[i]), justify="left" if i in _LEFT else "right")
        for name in FAMILIES:
            for row in self._of(name):
                cells = row.cells()
                table.add_row(*(cells[i] for i in shown), end_section=row is self._of(name)[-1])
        return table

    def _of(self, family: str) -> list[Row]:
        return [row for row in self.rows if row.family == family]

    def _count(self, family: str) -> str:
        words = Counter(row.word for row in self._of(family))
        counts = ", ".join(f"{n} {word}" for word, n in words.most_common())
        return f"{FAMILIES[family].title.lower()} measures: {counts}"


def compared(
    method: str,
    reference: str,
    labels: tuple[str, str],
    pairs: Sequence[tuple[Flatness, Flatness]],
    further: str = "",
) -> Verdict | None:
    """Compare measurements, pair by pair of (ours, the reference's); None without pairs.

    A measure that is not finite in some run is left out of the comparison.
    """
    rows = list(_rows(pairs)) if pairs else []
    return Verdict(method, reference, labels, rows, further) if rows else None


def _rows(pairs: Sequence[tuple[Flatness, Flatness]]) -> Iterator[Row]:
    for family, about in FAMILIES.items():
        for name in about.measures:
            if any(name not in one.measures for pair in pairs for one in pair):
                continue
            ours, theirs = ([one.measures[name].value for one in side] for side in zip(*pairs, strict=True))
            if all(map(math.isfinite, [*ours, *theirs])):
                differences = [a - b for a, b in zip(ours, theirs, strict=True)]
                yield Row(name, family, estimate(theirs), estimate(ours), estimate(differences))


def _text(value: Estimate) -> str:
    return f"{value.mean:.3g}" + ("" if value.sd is None else f" ± {value.sd:.2g}")
