"""The measured flatness of runs: its files, and verdicts on a method's minima against the reference's."""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.analysis.tables import Table, bullets
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.files import read_checked
from steppe.experiments.storage.run_folder import RunFolder
from steppe.flatness import FAMILIES, Flatness, Measure

FLATNESS = "flatness.json"

log = logging.getLogger(__name__)

_WORDS: Mapping[int | None, str] = {None: "no verdict", 0: "not distinguishable", -1: "flatter", 1: "sharper"}

_APART = 2.0  # ratio of two losses, from which on the difference in fit may explain that in flatness

_UNEQUAL = "These are the ends of all runs, and not of equal compute: {0} after {2} standardized epochs, {1} after {3}."

_NONE = Measure(math.nan)

_REMEASURED = "the lines between the runs are left out until steppe measure has measured them again"

_FAMILIES = tuple(name for name in FAMILIES if name != "context")

CAVEATS = (
    "A network can be rescaled without changing its function, and its raw measures change; it can become more "
    "confident, and all measures that depend on its logits change. Only where every kind of measure agrees is a "
    "minimum called flatter or sharper.",
    "Each interval alone has a confidence of 95 %: of so many, one in twenty shows a difference where there is none.",
    "Flatter does not mean better: sharpness often does not track generalization (arXiv 2302.07011). Look at the test "
    "results and the gap beside it.",
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
    def word(self) -> str:
        """The verdict of this measure; empty for the context."""
        return "" if self.family == "context" else _WORDS[self.difference.sign]

    def cells(self) -> list[str]:
        label = FAMILIES[self.family].measures[self.name]
        half = "" if self.difference.half_width is None else f" ± {self.difference.half_width:.2g}"
        reference, ours = (value.text(".3g", ".2g", " ± ") for value in (self.reference, self.ours))
        return [label, reference, ours, f"{self.difference.mean:+.3g}{half}", self.word]


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
        if not words or set(words) == {"no verdict"}:
            return "no verdict"
        if words["flatter"] and words["sharper"]:
            return "mixed"
        return next((word for word in ("flatter", "sharper") if words[word]), "not distinguishable")

    @property
    def word(self) -> str:
        """The verdict of raw and adaptive measures, and of normalized logits where measured, if all have the same."""
        words = {self.family(name) for name in _FAMILIES if self._words(name) or name != "normalized"}
        return words.pop() if len(words) == 1 and "mixed" not in words else "inconclusive"

    def sentence(self) -> str:
        ours, theirs = self.labels
        about = f"{ours}'s minima against {theirs}'s, {self.runs} paired run{'s'[: self.runs > 1]}: "
        if self.runs == 1:
            return f"{about}no verdict on flatness, which needs two runs of each at least."
        if self.word == "no verdict":
            return f"{about}no verdict on flatness, as no raw or adaptive measure is finite in all of them."
        counts = "; ".join(self._count(name) for name in _FAMILIES if self._words(name))
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
        return "\n".join([*self._table().markdown(), "", *bullets([self.sentence(), *self.notes()])])

    def show(self, console: Console, caveats: Sequence[str] = ()) -> None:
        """Print the table, the sentence and the notes; a narrow console shows the differences only."""
        self._table().show(console, [self.sentence(), *self.notes(), *caveats])

    def json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "reference": self.reference,
            "runs": self.runs,
            "measures": [
                {
                    "name": row.name,
                    "difference": asdict(row.difference),
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

    def _table(self) -> Table:
        ours, theirs = self.labels
        headings = ("measure", theirs, ours, "difference ± 95 %", "verdict")
        sections = {
            family.title: [row.cells() for row in self.rows if row.family == name] for name, family in FAMILIES.items()
        }
        return Table(headings, sections, left=(0, 4), optional=[(1, 2)], wraps=False)

    def _words(self, family: str) -> Counter[str]:
        return Counter(row.word for row in self.rows if row.family == family)

    def _count(self, family: str) -> str:
        counts = ", ".join(f"{n} {word}" for word, n in self._words(family).most_common())
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
    made = []
    for method in others:
        labels = method.label, reference.label
        ends = [Run(recipe, m, recipe.comparison.first_seed).standardized_epochs for m in (method, reference)]
        further = "" if ends[0] == ends[1] else _UNEQUAL.format(*labels, *ends)
        runs = [(run, Run(recipe, reference, run.seed)) for run in found if run.method == method]
        pairs = [(found[run], found[other]) for run, other in runs if other in found]
        made.append(compared(str(method), str(reference), labels, pairs, further))
    return [verdict for verdict in made if verdict is not None]


def compared(
    method: str, reference: str, labels: tuple[str, str], pairs: Sequence[tuple[Flatness, Flatness]], further: str = ""
) -> Verdict | None:
    """Compare measurements, pair by pair of (ours, the reference's); None without pairs.

    A measure that is not finite in some run is left out of the comparison.
    """
    rows = []
    for family, about in FAMILIES.items():
        for name in about.measures:
            measured = [(a.measures.get(name, _NONE).value, b.measures.get(name, _NONE).value) for a, b in pairs]
            if measured and all(math.isfinite(value) for pair in measured for value in pair):
                ours, theirs = zip(*measured, strict=True)
                differences = [a - b for a, b in measured]
                rows.append(Row(name, family, estimate(theirs), estimate(ours), estimate(differences)))
    return Verdict(method, reference, labels, rows, further) if rows else None
