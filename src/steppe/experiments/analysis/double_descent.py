"""Double descent over the width: errors and sharpness at each width, interpolation thresholds, and a verdict.

Belkin, Hsu, Ma and Mandal 2019, https://arxiv.org/abs/1812.11118; Nakkiran et al. 2020, https://arxiv.org/abs/1912.02292.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from steppe.experiments.analysis.statistics import Estimate, estimate, is_usable
from steppe.experiments.analysis.summary import SummaryFiles, setting
from steppe.experiments.analysis.tables import Table
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.models.networks import new_network
from steppe.experiments.storage.records import Record, record_at
from steppe.experiments.storage.run_folder import RunFolder

INTERPOLATES = 1.0
"""Percent: a method interpolates from the smallest width on whose mean training error is below it."""

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
        return [text(self) for text in _COLUMNS.values()]


_COLUMNS: Mapping[str, Callable[[Point], str]] = {
    "width": lambda point: str(point.width),
    "parameters": lambda point: f"{point.parameters:,}",
    "method": lambda point: point.method.label,
    "train\nerror %": lambda point: point.train_error.text(".2f"),
    "test\nerror %": lambda point: point.test_error.text(".2f"),
    "test error\nagainst {}": lambda point: "" if point.against is None else _interval(point.against),
    "sharpness\nS(w)": lambda point: "" if point.sharpness is None else point.sharpness.text(".3g"),
    "largest\neigenvalue": lambda point: "" if point.lambda_max is None else point.lambda_max.text(".3g"),
    "runs": lambda point: str(point.test_error.n),
}


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
    """Every number of a comparison over widths, once."""

    title: str
    reference: MethodSpec
    points: Sequence[Point]
    thresholds: Mapping[MethodSpec, int | None]
    """For each method the smallest width that interpolates, None where none does."""
    peaks: Sequence[Peak]
    overall: Mapping[MethodSpec, Estimate]
    """For each further method its test error minus the first one's, averaged over the widths, by seed."""
    unfinished: Sequence[str]

    def table(self) -> Table:
        headings = [heading.format(self.reference.label) for heading in _COLUMNS]
        return Table(headings, {"": [point.cells() for point in self.points]}, left=(2,), title=self.title)

    def notes(self) -> Iterator[str]:
        for method, width in self.thresholds.items():
            where = "at none of these widths" if width is None else f"from width {width} on"
            yield f"{method.label} interpolates (training error below {INTERPOLATES:g} %) {where}."
        yield from (peak.sentence() for peak in self.peaks)
        for method in self.thresholds:
            widths = [str(p.width) for p in self.points if p.method == method and not is_usable(p.test_error.mean)]
            if widths:
                yield (
                    f"{method.label}: test error is not finite at width {', '.join(widths)}, so its peak is not known."
                )
        if self.peaks:
            yield (
                "The intervals have a confidence of 95 %, over runs paired by seed. The width of a peak is chosen by "
                "the same runs, which makes it look a little higher than it is."
            )
        reference = self.reference.label
        for method, value in self.overall.items():
            yield f"{method.label} against {reference}, mean over the widths: test error {_interval(value)} points."
        if self.unfinished:
            yield f"Not finished, and not in the table: {', '.join(self.unfinished)}."

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


def parameters(recipe: Recipe) -> int:
    """Count the parameters of a recipe's network.

    >>> parameters(Recipe().replace(width=1))
    2945
    """
    model = recipe.model
    with torch.device("meta"):
        network = new_network(model.network, model.width, stem_stride=model.stem_stride, norm=model.norm)
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
    overall = {method: value for method in others if (value := _overall(recipe, method, runs)) is not None}
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
    return Point(
        width,
        size,
        method,
        estimate([100 - r["train_accuracy"] for r in records]),
        estimate([100 - r["test_accuracy"] for r in records]),
        _estimate_of_some(_against(recipe, width, method, runs).values()),
        _estimate_of_some(r.sharpness for r in records),
        _estimate_of_some(r.lambda_max for r in records),
    )


def _overall(recipe: Recipe, method: MethodSpec, runs: Runs) -> Estimate | None:
    """Average the difference to the reference over all widths, for each seed that has all of them in both."""
    each = [_against(recipe, width, method, runs) for width in recipe.comparison.widths]
    return _estimate_of_some(
        estimate([by[seed] for by in each]).mean for seed in sorted(set.intersection(*map(set, each)))
    )


def _against(recipe: Recipe, width: int, method: MethodSpec, runs: Runs) -> dict[int, float]:
    """Return the test error minus the reference's, for each seed that both have; nothing for the reference itself."""
    reference = recipe.comparison.methods[0]
    ours, theirs = runs.get((width, method), {}), runs.get((width, reference), {})
    seeds = sorted(ours.keys() & theirs.keys()) if method != reference else []
    return {seed: theirs[seed]["test_accuracy"] - ours[seed]["test_accuracy"] for seed in seeds}


def _estimate_of_some(values: Iterable[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def _peak(method: MethodSpec, runs: Runs) -> Peak | None:
    """Find the highest mean test error of a method.

    None unless there are three widths with a common seed, and all errors are finite.
    """
    widths = sorted(width for width, name in runs if name == method)
    if len(widths) < 3 or not (seeds := set.intersection(*(set(runs[width, method]) for width in widths))):
        return None
    accuracies = {width: [runs[width, method][seed]["test_accuracy"] for seed in sorted(seeds)] for width in widths}
    errors = {width: estimate([100 - value for value in values]).mean for width, values in accuracies.items()}
    if not all(map(is_usable, errors.values())):
        return None
    top, narrowest, widest = max(widths, key=lambda width: errors[width]), widths[0], widths[-1]

    def above(end: int) -> Estimate | None:
        differences = [theirs - ours for ours, theirs in zip(accuracies[top], accuracies[end], strict=True)]
        return estimate(differences) if end != top else None

    return Peak(method, top, errors[top], narrowest, widest, above(narrowest), above(widest))


def _interval(value: Estimate) -> str:
    if value.half_width is None:
        return f"{value.mean:+.2f}"
    return f"{value.mean:+.2f} [{value.mean - value.half_width:+.2f}, {value.mean + value.half_width:+.2f}]"
