"""The result of a search: the best values of each method, their uncertainty, and the commands that confirm them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from rich.console import Console

from steppe.experiments.analysis.statistics import estimate
from steppe.experiments.analysis.summary import setting
from steppe.experiments.analysis.tables import Table
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.tuning.confirm import confirmations
from steppe.experiments.tuning.options import MEASURES, Objective
from steppe.experiments.tuning.search_space import Range, Space
from steppe.experiments.tuning.studies import TrialResult

_SHOWN = 5  # trials of a method on the terminal; the files have them all
_LISTED = 6  # values within one standard error that are listed; of more, the ends only

_HEADINGS = ("trial", "validation\naccuracy %", "validation\nloss", "train\naccuracy %", "gap,\npoints", "runs")
_COLUMNS = {"test_accuracy": ".2f", "test_loss": ".3f", "train_accuracy": ".2f", "gap": ".2f"}
"""The measures in the table, with their formats."""


@dataclass(frozen=True)
class Search:
    """A search: its recipe, spaces, objective and folder."""

    recipe: Recipe
    spaces: Sequence[Space]
    objective: Objective
    hold_out: int
    path: Path

    @property
    def by_accuracy(self) -> bool:
        return self.objective == "accuracy"

    @property
    def points(self) -> str:
        """The unit of a difference, as it follows a number."""
        return " points" if self.by_accuracy else ""

    def goal(self, result: TrialResult) -> list[float]:
        """Return the value that a trial is judged by, for each of its runs."""
        return [getattr(run, MEASURES[self.objective]) for run in result.runs]

    def score(self, result: TrialResult) -> float:
        """Return the mean of the goal, with the sign for which higher is better."""
        return fmean(self.goal(result)) * (1 if self.by_accuracy else -1)


@dataclass(frozen=True)
class Best:
    """The best trial of a method."""

    space: Space
    ranked: Sequence[TrialResult]
    """The complete trials, the best first."""
    error: float | None
    """The standard error of a trial's mean, pooled over the better half of the trials; None for single runs."""
    near: Sequence[TrialResult]
    """The trials within one standard error of it, itself among them."""

    @property
    def result(self) -> TrialResult:
        return self.ranked[0]

    @property
    def complete(self) -> int:
        return len(self.ranked)

    @property
    def label(self) -> str:
        return _label(self.space, self.result)


@dataclass(frozen=True)
class TuningResult:
    """The contents of the report, for the terminal, summary.md and summary.json."""

    title: str
    search: Search
    best: Sequence[Best]
    notes: Sequence[str]
    warnings: Sequence[str]
    commands: Sequence[str]

    def rows(self, limit: int | None = None) -> Iterator[list[str]]:
        """Yield the rows of the table, for at most `limit` trials of a method."""
        for best in self.best:
            for result in best.ranked[:limit]:
                cells = [estimate([getattr(run, n) for run in result.runs]).text(form) for n, form in _COLUMNS.items()]
                yield [f"{result.number}: {_label(best.space, result)}", *cells, str(len(result.runs))]

    def table(self, limit: int | None = None) -> Table:
        return Table(_HEADINGS, {"": list(self.rows(limit))}, title=self.title)

    def markdown(self) -> str:
        notes = [f"- {note}" for note in self.notes] + [f"- **{warning}**" for warning in self.warnings]
        confirm = ["", "To confirm on the test set:", "", "```", *self.commands, "```"] if self.commands else []
        lines = self.table().markdown()
        return "\n".join([f"# {self.title}", "", *lines, "", *notes, *confirm, ""])

    def json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "objective": f"validation {self.search.objective}",
            "best": [
                {
                    "method": best.result.method,
                    "trial": best.result.number,
                    "values": dict(best.result.values),
                    "spec": str(best.space.at(best.result.values).comparison.methods[0]),
                    "validation": asdict(estimate(self.search.goal(best.result))),
                    "standard_error": best.error,
                    "within_one_standard_error": [dict(result.values) for result in best.near],
                    "complete_trials": best.complete,
                }
                for best in self.best
            ],
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "confirm": list(self.commands),
        }

    def show(self, console: Console) -> None:
        notes = (*self.notes, *(f"Warning: {warning}" for warning in self.warnings))
        self.table(_SHOWN).show(console, [*notes, *(["To confirm on the test set:"] if self.commands else [])])
        for command in self.commands:
            console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def summarize_search(search: Search, results: Sequence[TrialResult]) -> TuningResult:
    """Rank the complete trials and write the report."""
    best: list[Best] = []
    for space in search.spaces:
        complete = [r for r in results if r.method == str(space.spec) and r.state == "complete"]
        if complete:
            ranked = sorted(complete, key=search.score, reverse=True)
            error = _standard_error(search, ranked)
            near = [r for r in ranked if search.score(r) >= search.score(ranked[0]) - (error or 0.0)]
            best.append(Best(space, ranked, error, near))
    chosen = [one.space.at(one.result.values) for one in best]
    names = [dimension.name for one in best for dimension in one.space.dimensions]
    return TuningResult(
        f"{search.recipe.name}, tuned: {setting(search.recipe)}",
        search,
        best,
        [*_notes(search, best, results)],
        [warning for one in best for warning in _warnings(one)],
        confirmations(search.recipe, chosen, names, search.path),
    )


def _notes(search: Search, best: Sequence[Best], results: Sequence[TrialResult]) -> Iterator[str]:
    runs = search.recipe.comparison.seeds
    what = "highest validation accuracy" if search.by_accuracy else "lowest validation loss"
    yield (
        f"Chosen by the {what} after {search.recipe.comparison.epochs} standardized epochs (mean of {runs} "
        f"run{'s'[: runs > 1]}), on one in {search.hold_out} of the training images of each class, which were held out "
        "of training. The test set was not used."
    )
    for one in best:
        yield _best_note(search, one)
    yield from _differences(search, best)
    tried = max((one.complete for one in best), default=0)
    if tried > 1:
        yield (
            f"The best of {tried} trials is partly luck: expect a lower value on other images, and confirm it on the "
            "test set."
        )
    diverged = [r for r in results if r.state == "diverged"]
    if diverged:
        where = "; ".join(f"{r.method} trial {r.number} ({_text_of_values(r)})" for r in diverged)
        yield f"Diverged, and counted as worse than all others: {where}."
    running = [r for r in results if r.state == "running"]
    if running:
        yield f"In progress, or stopped: {len(running)} trial{'s'[: len(running) > 1]}; the same command resumes them."


def _best_note(search: Search, best: Best) -> str:
    digits = 2 if search.by_accuracy else 4
    value = estimate(search.goal(best.result)).text(f".{digits}f") + (" %" if search.by_accuracy else "")
    text = f"{best.label}: {value}"
    if not best.space.dimensions:
        return f"{text}."
    text += f", the best of {best.complete} trial{'s'[: best.complete > 1]} (trial {best.result.number})."
    if best.error is None:
        return f"{text} One run per trial gives no measure of the noise: take --seeds 3 or more."
    error = f"one standard error ({best.error:.{digits}f}{search.points})"
    if len(best.near) == 1:
        return f"{text} No other is within {error}."
    names = [d.name for d in best.space.dimensions]
    if len(names) == 1:
        values = sorted((r.values[names[0]] for r in best.near), key=lambda v: (isinstance(v, str), v))
        listed = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        where = f"{names[0]} {', '.join(listed) if len(listed) <= _LISTED else f'from {listed[0]} to {listed[-1]}'}"
    else:
        where = "; ".join(map(_text_of_values, best.near[:_LISTED])) + ("; ..." if len(best.near) > _LISTED else "")
    flat = "The optimum is flat: " if 2 * len(best.near) >= best.complete and best.complete > 3 else ""
    return f"{text} {flat}{len(best.near)} of {best.complete} trials are within {error} of the best: {where}."


def _differences(search: Search, best: Sequence[Best]) -> Iterator[str]:
    """Yield the difference between each method's best and the first one's, paired by seed."""
    if not best:
        return
    reference, *others = best
    for one in others:
        pairs = zip(search.goal(one.result), search.goal(reference.result), strict=True)
        value = estimate([ours - theirs for ours, theirs in pairs])
        about = f"{one.label} against {reference.label}, on the images it was chosen by"
        text = f"{about}: {value.mean:+.3g}{search.points}"
        if value.half_width is None:
            yield f"{text} (one run: no verdict)."
            continue
        low, high = value.mean - value.half_width, value.mean + value.half_width
        verdict = "; not distinguishable from none" if value.sign == 0 else ""
        yield f"{text}, 95 % interval [{low:+.3g}, {high:+.3g}]{verdict}."


def _warnings(best: Best) -> Iterator[str]:
    for dimension in best.space.dimensions:
        value = best.result.values[dimension.name]
        edge = dimension.edge(value)
        if edge is None or best.complete < 2:
            continue
        text = (
            f"{best.result.method}: the best {dimension.name}, {value}, lies at the {edge} edge of {dimension}, so a "
            "better one may lie beyond."
        )
        if isinstance(dimension, Range) and dimension.log:
            factor = 10.0 if edge == "upper" else 0.1
            low, high = (float(f"{end * factor:.3g}") for end in (dimension.low, dimension.high))
            text += f" Search there, in another --out: --search {dimension.name}={low:g}..{high:g}"
        yield text


def _standard_error(search: Search, order: Sequence[TrialResult]) -> float | None:
    """Return the standard error of a trial's mean, pooled, because three runs estimate their own variance poorly.

    Only over the better half: where training is about to diverge, the noise is larger.
    """
    values = [goal for r in order[: max(1, -(-len(order) // 2))] if len(goal := search.goal(r)) > 1]
    if not values:
        return None
    return math.sqrt(fmean(variance(goal) for goal in values) / len(values[0]))


def _label(space: Space, result: TrialResult) -> str:
    """Return the label of a method at a trial's values, including values of the recipe's options."""
    arguments = space.spec.definition.arguments
    options = [_text_of(name, value) for name, value in result.values.items() if name not in arguments]
    return ", ".join([space.at(result.values).comparison.methods[0].label, *options])


def _text_of_values(result: TrialResult) -> str:
    return ", ".join(_text_of(name, value) for name, value in result.values.items()) or "as it is"


def _text_of(name: str, value: object) -> str:
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
