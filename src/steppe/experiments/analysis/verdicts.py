"""The measured flatness of runs: its files, and verdicts on a method's minima against the reference's."""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from steppe.experiments.analysis.metric_verdicts import decision_json
from steppe.experiments.analysis.statistics import Decision, Estimate, Pairs, decide_together, estimate
from steppe.experiments.analysis.tables import Table, bullets
from steppe.experiments.analysis.words import (
    FLATTER,
    INCONCLUSIVE,
    MIXED,
    NO_VERDICT,
    NOT_DISTINGUISHABLE,
    SHARPER,
    word,
)
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.files import read_checked
from steppe.experiments.storage.run_folder import RunFolder
from steppe.flatness import FAMILIES, Flatness, Measure
from steppe.flatness.families import IN_VERDICT, labels_by_family

FLATNESS = "flatness.json"

log = logging.getLogger(__name__)

_APART = 2.0  # ratio of two losses, from which on the difference in fit may explain that in flatness

_UNEQUAL = "These are the ends of all runs, and not of equal compute: {0} after {2} standardized epochs, {1} after {3}."

_NONE = Measure(math.nan)

_REMEASURED = "the lines between the runs are left out until steppe measure has measured them again"

CAVEATS = (
    "A network can be rescaled without changing its function, and its raw measures change; it can become more "
    "confident, and all measures that depend on its logits change. Only where every kind of measure agrees is a "
    "minimum called flatter or sharper.",
    "The verdicts of all these measures and methods are corrected together: where no minimum differs, any of them is "
    "called flatter or sharper in at most 5 % of comparisons. Their intervals hold all at once with 95 %, or end at 0.",
    "Flatter does not mean better: sharpness often does not track generalization (arXiv 2302.07011). Look at the test "
    "results and the gap beside it.",
)


@dataclass(frozen=True)
class Pairing:
    """The measurements of a method and of the reference, in pairs of (ours, the reference's)."""

    method: str
    reference: str
    labels: tuple[str, str]
    """Their names in tables and sentences, the method first."""
    pairs: Sequence[tuple[Flatness, Flatness]]
    further: str = ""
    """A further note for the reader."""

    def numbers(self, name: str) -> Pairs:
        """Return the values of a measure; none if it is not finite in some run."""
        found = [(a.measures.get(name, _NONE).value, b.measures.get(name, _NONE).value) for a, b in self.pairs]
        return found if all(math.isfinite(value) for pair in found for value in pair) else []


@dataclass(frozen=True)
class Row:
    """A measure of a method and of the reference, and their difference, paired."""

    name: str
    family: str
    reference: Estimate
    ours: Estimate
    difference: Decision

    @property
    def word(self) -> str:
        """The verdict of this measure; empty for the context."""
        return "" if self.family == "context" else word(self.difference, better=-1, words=(FLATTER, SHARPER))

    def cells(self) -> list[str]:
        label, ends = labels_by_family([self.name])[self.family][self.name], self.difference.interval
        interval = "" if ends is None else f"[{ends[0]:+.2g}, {ends[1]:+.2g}]"
        reference, ours = (value.text(".3g", ".2g", " ± ") for value in (self.reference, self.ours))
        return [label, reference, ours, f"{self.difference.mean:+.3g}", interval, self.word]


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
        words = self._words(name)
        if not words or set(words) == {NO_VERDICT}:
            return NO_VERDICT
        if words[FLATTER] and words[SHARPER]:
            return MIXED
        return next((found for found in (FLATTER, SHARPER) if words[found]), NOT_DISTINGUISHABLE)

    @property
    def word(self) -> str:
        """The verdict of raw and adaptive measures, and of normalized logits where measured, if all have the same."""
        words = {self.family(name) for name in IN_VERDICT if self._words(name) or name != "normalized"}
        return words.pop() if len(words) == 1 and MIXED not in words else INCONCLUSIVE

    def sentence(self) -> str:
        ours, theirs = self.labels
        about = f"{ours}'s minima against {theirs}'s, {self.runs} paired run{'s'[: self.runs > 1]}: "
        if self.runs == 1:
            return f"{about}no verdict on flatness, which needs two runs of each at least."
        if self.word == NO_VERDICT:
            return f"{about}no verdict on flatness, as no raw or adaptive measure is finite in all of them."
        counts = "; ".join(self._count(name) for name in IN_VERDICT if self._words(name))
        because = ""
        if self.word == INCONCLUSIVE:
            mixed = any(self.family(name) == MIXED for name in IN_VERDICT)
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
        return "\n".join([*self._table().markdown(), "", *bullets([self.sentence(), *self.notes()])])

    def show(self, console: Console, caveats: Sequence[str] = ()) -> None:
        """Print the table, the sentence and the notes; a narrow console shows less of the columns."""
        self._table().show(console, [self.sentence(), *self.notes(), *caveats])

    def json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "reference": self.reference,
            "runs": self.runs,
            "measures": [
                {
                    "name": row.name,
                    "difference": decision_json(row.difference),
                    "verdict": row.word,
                }
                for row in self.rows
            ],
            **{name: self.family(name) for name in IN_VERDICT},
            "verdict": self.word,
            "sentence": self.sentence(),
            "notes": self.notes(),
        }

    def _table(self) -> Table:
        ours, theirs = self.labels
        headings = ("measure", theirs, ours, "difference", "95 % interval", "verdict")
        sections = {
            family.title: [row.cells() for row in self.rows if row.family == name] for name, family in FAMILIES.items()
        }
        return Table(headings, sections, left=(0, 5), optional=[(1, 2), (3,)], wraps=False)

    def _words(self, family: str) -> Counter[str]:
        return Counter(row.word for row in self.rows if row.family == family)

    def _count(self, family: str) -> str:
        counts = ", ".join(f"{n} {found}" for found, n in self._words(family).most_common())
        return f"{FAMILIES[family].title.lower()} measures: {counts}"


def read_flatness(folder: RunFolder, recipe: Recipe) -> dict[Run, Flatness]:
    """Read the measures of every run that has some; ExperimentError when a file is damaged."""
    found = {run: read_flatness_file(folder.run(run) / FLATNESS) for run in recipe.runs()}
    return {run: flatness for run, (flatness, _) in found.items() if flatness is not None}


def read_flatness_file(path: Path) -> tuple[Flatness | None, dict[str, Any]]:
    """Read a file of measures, decoded and as JSON; None and an empty dictionary where there is no file.

    Raises:
        ExperimentError: if the file is damaged or not one of `steppe measure`.
    """
    if not path.exists():
        return None, {}
    remedy = "its numbers cannot be used; delete it, or move it away, and run steppe measure again"
    return read_checked(path, lambda content: (Flatness.from_json(content), content), remedy)


def read_lines(folder: RunFolder) -> list[dict[str, Any]]:
    """Read the losses on the lines between runs; none if the file is missing, or damaged, which a note says."""
    path = folder.path / FLATNESS
    try:
        return read_checked(path, lambda content: list(map(_line, content["lines"])), _REMEASURED)
    except FileNotFoundError:
        return []
    except ExperimentError as error:
        log.warning("Note: %s", error)
        return []


def _line(values: Any) -> dict[str, Any]:
    """Check the form of a line that is read."""
    losses = [values[name] for name in ("axis", "train", "test")]
    numbers = [value for each in losses for value in each if value is not None]
    if len({len(each) for each in losses}) > 1 or not all(isinstance(value, int | float) for value in numbers):
        raise ValueError("a line must have as many losses as points")
    return dict(values) | {"a": str(values["a"]), "b": str(values["b"]), "seed": int(values["seed"])}


def verdicts(recipe: Recipe, found: Mapping[Run, Flatness]) -> list[Verdict]:
    """Compare the measures of each method with those of the first one, paired by seed.

    Raises:
        ExperimentError: if the runs were measured with different options.
    """
    if len({json.dumps(dict(one.settings), sort_keys=True) for one in found.values()}) > 1:
        raise ExperimentError(
            "these runs were measured in different ways, and their numbers cannot be compared: run steppe measure on "
            "the folder again, with the same options for all"
        )
    reference, *others = recipe.comparison.methods
    pairings = []
    for method in others:
        labels = method.label, reference.label
        ends = [Run(recipe, m, recipe.comparison.first_seed).standardized_epochs for m in (method, reference)]
        further = "" if ends[0] == ends[1] else _UNEQUAL.format(*labels, *ends)
        runs = [(run, Run(recipe, reference, run.seed)) for run in found if run.method == method]
        pairs = [(found[run], found[other]) for run, other in runs if other in found]
        pairings.append(Pairing(str(method), str(reference), labels, pairs, further))
    return compare(pairings)


def compare(pairings: Sequence[Pairing]) -> list[Verdict]:
    """Compare measurements, pair by pair; methods without a measure that is finite in all runs have no verdict.

    All measures of all methods are one family, for which each is corrected. The further ones, which were asked for, are
    another, those of layers a third, and the context, which has no verdict, is part of none.
    """
    rows: list[list[Row]] = [[] for _ in pairings]
    both = (one for pairing in pairings for pair in pairing.pairs for one in pair)
    labels = labels_by_family(name for one in both for name in one.measures)
    for families in (IN_VERDICT, ("further",), ("layers",), ("context",)):
        measured = [
            (name, family, numbers)
            for family in families
            for name in labels[family]
            if (numbers := {i: found for i, pairing in enumerate(pairings) if (found := pairing.numbers(name))})
        ]
        decided = decide_together([list(numbers.values()) for *_, numbers in measured])
        for (name, family, numbers), decisions in zip(measured, decided, strict=True):
            for (i, pairs), difference in zip(numbers.items(), decisions, strict=True):
                ours, theirs = zip(*pairs, strict=True)
                rows[i].append(Row(name, family, estimate(theirs), estimate(ours), difference))
    made = zip(pairings, rows, strict=True)
    return [Verdict(p.method, p.reference, p.labels, found, p.further) for p, found in made if found]
