"""Double descent over the width: errors and sharpness at each width, interpolation thresholds, and a verdict.

Belkin, Hsu, Ma and Mandal 2019, https://arxiv.org/abs/1812.11118; Nakkiran et al. 2020, https://arxiv.org/abs/1912.02292.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.analysis.summary import SummaryFiles, record_at, setting
from steppe.experiments.analysis.tables import bullets, markdown_table, show_table, terminal_table
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import RunFolder

INTERPOLATES = 1.0
"""Percent: a method interpolates from the smallest width on whose mean training error is below it."""

_HEADINGS = (
    "width",
    "parameters",
    "method",
    "train\nerror %",
    "test\nerror %",
    "test error\nagainst {}",
    "sharpness\nS(w)",
    "largest\neigenvalue",
    "runs",
)

Runs = Mapping[tuple[int, MethodSpec], Mapping[int, Record]]
"""By width and method, and then by seed: the measurement at the compute that all methods get."""


@dataclass(frozen=True)
class Point:
    """A method at one width; errors are percent, `against` is test error minus the first method's, by seed."""

    width: int
    parameters: int
    method: MethodSpec
    train_error: Estimate
    test_error: Estimate
    against: Estimate | None
    sharpness: Estimate | None
    lambda_max: Estimate | None

    def cells(self) -> list[str]:
        return [
            str(self.width),
            f"{self.parameters:,}",
            self.method.label,
            *(value.text(".2f") for value in (self.train_error, self.test_error)),
            "" if self.against is None else _interval(self.against),
            *("" if value is None else value.text(".3g") for value in (self.sharpness, self.lambda_max)),
            str(self.test_error.n),
        ]


@dataclass(frozen=True)
class Peak:
    """The highest of a method's mean test errors, and how far it is above those at both ends, paired by seed."""

    method: MethodSpec
    width: int
    test_error: float
    narrowest: int
    widest: int
    above_narrowest: Estimate | None
    above_widest: Estimate | None
    """None where the peak is at that end."""

    def sentence(self) -> str:
        """State the peak and whether the runs support a double descent."""
        highest = f"{self.method.label}: test error is highest at width {self.width}, {self.test_error:.2f} %"
        if self.above_narrowest is None or self.above_widest is None:
            return f"{highest}, an end of the range: no double descent is seen in it."
        signs = self.above_narrowest.sign, self.above_widest.sign
        verdict = (
            "one run, no verdict"
            if None in signs
            else "a peak, and so a double descent"
            if signs == (1, 1)
            else "a peak of the means only, which so few runs cannot distinguish from none"
        )
        return (
            f"{highest}, above width {self.narrowest} by {_interval(self.above_narrowest)} and above width "
            f"{self.widest} by {_interval(self.above_widest)} points: {verdict}."
        )


@dataclass(frozen=True)
class DoubleDescent(SummaryFiles):
    """Every number of a comparison over widths, once, for the terminal, summary.md, summary.json and the figure."""

    title: str
    reference: MethodSpec
    points: Sequence[Point]
    thresholds: Mapping[MethodSpec, int | None]
    """For each method the smallest width that interpolates, None where none does."""
    peaks: Sequence[Peak]
    overall: Mapping[MethodSpec, Estimate]
    """For each further method its test error minus the first one's, averaged over the widths, by seed."""
    unfinished: Sequence[str]

    def notes(self) -> Iterator[str]:
        for method, width in self.thresholds.items():
            where = "at none of these widths" if width is None else f"from width {width} on"
            yield f"{method.label} interpolates (training error below {INTERPOLATES:g} %) {where}."
        yield from (peak.sentence() for peak in self.peaks)
        if self.peaks:
            yield (
                "Intervals are 95 % ones of runs paired by seed. The width of a peak is chosen by the same runs, "
                "which makes it look a little higher than it is."
            )
        reference = self.reference.label
        for method, value in self.overall.items():
            yield f"{method.label} against {reference}, mean over the widths: test error {_interval(value)} points."
        if self.unfinished:
            yield f"Not finished, and not in the table: {', '.join(self.unfinished)}."

    def headings(self) -> list[str]:
        return [heading.format(self.reference.label) for heading in _HEADINGS]

    def markdown(self) -> str:
        lines = markdown_table(self.headings(), [point.cells() for point in self.points], left=(2,))
        return "\n".join([f"# {self.title}", "", *lines, "", *bullets(self.notes()), ""])

    def json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "reference": str(self.reference),
            "points": [asdict(point) | {"method": str(point.method)} for point in self.points],
            "thresholds": {str(method): width for method, width in self.thresholds.items()},
            "peaks": [asdict(peak) | {"method": str(peak.method)} for peak in self.peaks],
            "overall": {str(method): asdict(value) for method, value in self.overall.items()},
            "unfinished": list(self.unfinished),
            "interpolates_below_percent": INTERPOLATES,
            "notes": list(self.notes()),
        }

    def show(self, console: Console) -> None:
        rows = [point.cells() for point in self.points]
        show_table(console, terminal_table(self.headings(), rows, left=(2,), title=self.title), self.notes())


def parameters(recipe: Recipe) -> int:
    """Count the parameters of a recipe's network.

    >>> parameters(Recipe().replace(width=1))
    2945
    """
    with torch.device("meta"):
        network = PreActResNet18(recipe.model.width, stem_stride=recipe.model.stem_stride, norm=recipe.model.norm)
    return sum(p.numel() for p in network.parameters())


def summarize(recipe: Recipe) -> DoubleDescent:
    """Summarize the members' folders; a run counts once it has spent the compute that all methods get.

    Raises:
        ExperimentError: a file is damaged.
    """
    runs, unfinished = _read(recipe)
    sizes = {member.model.width: parameters(member) for member in recipe.members()}
    points = [_point(recipe, width, sizes[width], method, runs) for width, method in runs]
    thresholds = {
        method: min((p.width for p in points if p.method == method and p.train_error.mean < INTERPOLATES), default=None)
        for method in recipe.comparison.methods
    }
    peaks = [peak for method in recipe.comparison.methods if (peak := _peak(method, runs)) is not None]
    reference, *others = recipe.comparison.methods
    means = {method: _means(method, reference, recipe.comparison.widths, runs) for method in others}
    overall = {method: estimate(values) for method, values in means.items() if values}
    return DoubleDescent(f"{recipe.name}: {setting(recipe)}", reference, points, thresholds, peaks, overall, unfinished)


def _read(recipe: Recipe) -> tuple[Runs, list[str]]:
    runs: dict[tuple[int, MethodSpec], dict[int, Record]] = {}
    unfinished = []
    for member in recipe.members():
        for run, records in RunFolder(member.folder).results(member).items():
            record = record_at(records, recipe.comparison.epochs)
            if record is None:
                unfinished.append(f"width-{member.model.width}/{run.name}")
            else:
                runs.setdefault((member.model.width, run.method), {})[run.seed] = record
    return runs, unfinished


def _point(recipe: Recipe, width: int, size: int, method: MethodSpec, runs: Runs) -> Point:
    records = runs[width, method].values()
    reference = recipe.comparison.methods[0]
    pairs = _paired((width, method), (width, reference), runs) if method != reference else []
    return Point(
        width,
        size,
        method,
        estimate([100 - r.train_accuracy for r in records]),
        estimate([100 - r.test_accuracy for r in records]),
        estimate(pairs) if pairs else None,
        _measured([r.sharpness for r in records]),
        _measured([r.lambda_max for r in records]),
    )


def _measured(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def _paired(one: tuple[int, MethodSpec], other: tuple[int, MethodSpec], runs: Runs) -> list[float]:
    """Return the test error at `one` minus that at `other`, for each seed that both have."""
    ours, theirs = runs.get(one, {}), runs.get(other, {})
    return [theirs[seed].test_accuracy - ours[seed].test_accuracy for seed in sorted(ours.keys() & theirs.keys())]


def _peak(method: MethodSpec, runs: Runs) -> Peak | None:
    """Find the highest mean test error of a method; None unless there are three widths with a common seed."""
    widths = sorted(width for width, name in runs if name == method)
    common = set.intersection(*(set(runs[width, method]) for width in widths)) if widths else set()
    if len(widths) < 3 or not common:
        return None
    runs = {(width, method): {seed: runs[width, method][seed] for seed in common} for width in widths}
    errors = {width: fmean(100 - record.test_accuracy for record in runs[width, method].values()) for width in widths}
    top, narrowest, widest = max(widths, key=lambda width: errors[width]), widths[0], widths[-1]
    above = [
        estimate(_paired((top, method), (end, method), runs)) if end != top else None for end in (narrowest, widest)
    ]
    return Peak(method, top, errors[top], narrowest, widest, *above)


def _means(method: MethodSpec, reference: MethodSpec, widths: Sequence[int], runs: Runs) -> list[float]:
    """Return the difference to the reference averaged over all widths, for each seed that has all of them in both."""
    seeds = [set(runs.get((width, name), {})) for width in widths for name in (method, reference)]
    return [
        fmean(runs[w, reference][seed].test_accuracy - runs[w, method][seed].test_accuracy for w in widths)
        for seed in sorted(set.intersection(*seeds))
    ]


def _interval(value: Estimate) -> str:
    if value.half_width is None:
        return f"{value.mean:+.2f}"
    return f"{value.mean:+.2f} [{value.mean - value.half_width:+.2f}, {value.mean + value.half_width:+.2f}]"
