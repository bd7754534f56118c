"""What tuning found: the best values of each method, how sure that is, and how to confirm it on the test set."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from steppe.experiments.analysis.statistics import Estimate, estimate
from steppe.experiments.analysis.summary import setting
from steppe.experiments.config.method_spec import parse
from steppe.experiments.config.recipe import RECIPES, Recipe
from steppe.experiments.tuning.search_space import Range, Space
from steppe.experiments.tuning.studies import Result

__all__ = ["Findings", "Tuning", "command_line", "find"]

_SHOWN = 5  # trials of a method on the terminal; the files have them all
_NAMED = 6  # values within one standard error, from which on only their ends are named
_CONFIRMING = 3  # runs that a verdict needs at least

_HEADINGS = ("trial", "validation\naccuracy %", "validation\nloss", "train\naccuracy %", "gap,\npoints", "runs")


@dataclass(frozen=True)
class Tuning:
    """What was searched, for what, and where."""

    recipe: Recipe
    spaces: Sequence[Space]
    objective: Literal["accuracy", "loss"]
    hold_out: int
    path: Path

    def goal(self, result: Result) -> list[float]:
        """What a trial is judged by, a value for each of its runs."""
        return [run.test_accuracy if self.objective == "accuracy" else run.test_loss for run in result.runs]

    def merit(self, result: Result) -> float:
        """Its mean: the higher, the better."""
        return fmean(self.goal(result)) * (1 if self.objective == "accuracy" else -1)

    def label(self, space: Space, result: Result) -> str:
        """A trial in words: the method with its values, those of the recipe too."""
        known = space.spec.method.arguments
        rest = [
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.values.items() if k not in known
        ]
        return ", ".join([parse(space.at(result.values).methods[0]).label, *rest])


@dataclass(frozen=True)
class Best:
    """The best trial of a method."""

    space: Space
    result: Result
    error: float | None
    """The standard error of a trial's mean, pooled over the better half of the trials; None for single runs."""
    near: Sequence[Result]
    """The trials within one standard error of it, itself among them."""
    complete: int


@dataclass(frozen=True)
class Findings:
    """Everything that is to say, once: the terminal, summary.md and summary.json all say the same."""

    title: str
    tuning: Tuning
    ranked: Mapping[str, Sequence[Result]]
    """The complete trials of each method, the best first."""
    best: Sequence[Best]
    notes: Sequence[str]
    warnings: Sequence[str]
    commands: Sequence[str]

    def rows(self, most: int | None = None) -> Iterator[list[str]]:
        """The table, at most so many trials of a method."""
        for space in self.tuning.spaces:
            for result in self.ranked[str(space.spec)][:most]:
                columns = ("test_accuracy", "test_loss", "train_accuracy", "gap")
                values = [estimate([getattr(run, name) for run in result.runs]) for name in columns]
                cells = [
                    _text(value, 3 if name == "test_loss" else 2) for name, value in zip(columns, values, strict=True)
                ]
                yield [f"{result.number}: {self.tuning.label(space, result)}", *cells, str(len(result.runs))]

    def markdown(self) -> str:
        """All trials and what they say, as Markdown."""
        headings = (heading.replace("\n", " ") for heading in _HEADINGS)
        lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(_HEADINGS) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        said = [f"- {note}" for note in self.notes] + [f"- **{warning}**" for warning in self.warnings]
        confirm = ["", "To confirm on the test set:", "", "```", *self.commands, "```"] if self.commands else []
        return "\n".join([f"# {self.title}", "", *lines, "", *said, *confirm, ""])

    def json(self) -> dict[str, Any]:
        """What was found, as JSON."""
        return {
            "title": self.title,
            "objective": f"validation {self.tuning.objective}",
            "best": [
                {
                    "method": best.result.method,
                    "trial": best.result.number,
                    "values": dict(best.result.values),
                    "spec": best.space.at(best.result.values).methods[0],
                    "validation": asdict(estimate(self.tuning.goal(best.result))),
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
        """Print the best trials, what they say and how to confirm it."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for index, heading in enumerate(_HEADINGS):
            table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0)
        for row in self.rows(_SHOWN):
            table.add_row(*row)
        console.print(table)
        for note in (*self.notes, *(f"Warning: {warning}" for warning in self.warnings)):
            console.print(note, highlight=False, markup=False)
        if self.commands:
            console.print("To confirm on the test set:", highlight=False, markup=False)
        for command in self.commands:
            console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def find(tuning: Tuning, results: Sequence[Result]) -> Findings:
    """Say what the trials that are complete allow to say."""
    ranked: dict[str, Sequence[Result]] = {}
    best: list[Best] = []
    for space in tuning.spaces:
        complete = [r for r in results if r.method == str(space.spec) and r.state == "complete"]
        ranked[str(space.spec)] = order = sorted(complete, key=tuning.merit, reverse=True)
        if order:
            error = _error(tuning, order)
            near = [r for r in order if tuning.merit(r) >= tuning.merit(order[0]) - (error or 0.0)]
            best.append(Best(space, order[0], error, near, len(order)))
    title = f"{tuning.recipe.name}, tuned: {setting(tuning.recipe)}"
    return Findings(
        title,
        tuning,
        ranked,
        best,
        [*_notes(tuning, best, results)],
        [*_warnings(best)],
        _confirm(tuning, [b for b in best if b.space.dimensions or not _tuned(best)], best),
    )


def command_line(recipe: Recipe) -> str:
    """The command that compares as `recipe` says."""
    name = recipe.name if recipe.name in RECIPES else "demo"
    usual, words = RECIPES[name][0], ["steppe", "compare", name]
    for field in fields(Recipe):
        value, option = getattr(recipe, field.name), field.name.replace("_", "-")
        if value == getattr(usual, field.name):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def _notes(tuning: Tuning, best: Sequence[Best], results: Sequence[Result]) -> Iterator[str]:
    runs = tuning.recipe.seeds
    what = "highest validation accuracy" if tuning.objective == "accuracy" else "lowest validation loss"
    yield (
        f"Chosen by the {what} after {tuning.recipe.epochs} standardized epochs (mean of {runs} "
        f"run{'s'[: runs > 1]}), on one in {tuning.hold_out} of the training images of each class, which were held out "
        "of training. The test set was not touched."
    )
    for one in best:
        yield _verdict(tuning, one)
    yield from _against(tuning, best)
    tried = max((one.complete for one in best), default=0)
    if tried > 1:
        yield (f"The best of {tried} trials is also the luckiest: expect less of it on other images, and confirm it.")
    diverged = [r for r in results if r.state == "diverged"]
    if diverged:
        where = "; ".join(f"{r.method} trial {r.number} ({_values(r)})" for r in diverged)
        yield f"Diverged, and counted as worse than all others: {where}."
    running = [r for r in results if r.state == "running"]
    if running:
        yield f"In progress, or stopped: {len(running)} trial{'s'[: len(running) > 1]}; the same command goes on."


def _verdict(tuning: Tuning, best: Best) -> str:
    run = " %" if tuning.objective == "accuracy" else ""
    points = " points" if tuning.objective == "accuracy" else ""
    digits = 2 if tuning.objective == "accuracy" else 4
    text = f"{tuning.label(best.space, best.result)}: {_text(estimate(tuning.goal(best.result)), digits)}{run}"
    if not best.space.dimensions:
        return f"{text}."
    text += f", the best of {best.complete} trial{'s'[: best.complete > 1]} (trial {best.result.number})."
    if best.error is None:
        return f"{text} One run a trial says nothing of the noise: take --seeds 3 or more."
    if len(best.near) == 1:
        return f"{text} No other is within one standard error ({best.error:.{digits}f}{points})."
    names = [d.name for d in best.space.dimensions]
    if len(names) == 1:
        values = sorted((r.values[names[0]] for r in best.near), key=lambda v: (isinstance(v, str), v))
        told = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        where = f"{names[0]} {', '.join(told) if len(told) <= _NAMED else f'from {told[0]} to {told[-1]}'}"
    else:
        where = "; ".join(_values(r) for r in best.near[:_NAMED]) + ("; ..." if len(best.near) > _NAMED else "")
    flat = "The optimum is flat: " if 2 * len(best.near) >= best.complete and best.complete > 3 else ""
    return (
        f"{text} {flat}{len(best.near)} of {best.complete} trials are within one standard error "
        f"({best.error:.{digits}f}{points}) of the best: {where}."
    )


def _against(tuning: Tuning, best: Sequence[Best]) -> Iterator[str]:
    """Each method's best against that of the first, paired by seed."""
    if len(best) < 2:
        return
    reference, *others = best
    points = " points" if tuning.objective == "accuracy" else ""
    for one in others:
        pairs = zip(tuning.goal(one.result), tuning.goal(reference.result), strict=True)
        value = estimate([ours - theirs for ours, theirs in pairs])
        text = (
            f"{tuning.label(one.space, one.result)} against {tuning.label(reference.space, reference.result)}, on the "
            f"images it was chosen by: {value.mean:+.3g}{points}"
        )
        if value.half_width is None:
            yield f"{text} (one run: no verdict)."
            continue
        low, high = value.mean - value.half_width, value.mean + value.half_width
        verdict = "; not distinguishable from none" if value.sign == 0 else ""
        yield f"{text}, 95 % interval [{low:+.3g}, {high:+.3g}]{verdict}."


def _warnings(best: Sequence[Best]) -> Iterator[str]:
    for one in best:
        for dimension in one.space.dimensions:
            value = one.result.values[dimension.name]
            edge = dimension.edge(value)
            if edge is None or one.complete < 2:
                continue
            text = (
                f"{one.result.method}: the best {dimension.name}, {value}, lies at the {edge} edge of {dimension}, so "
                "a better one may lie beyond."
            )
            if isinstance(dimension, Range) and dimension.log:
                factor = 10.0 if edge == "upper" else 0.1
                low, high = float(f"{dimension.low * factor:.3g}"), float(f"{dimension.high * factor:.3g}")
                text += f" Search there, in another --out: --search {dimension.name}={low:g}..{high:g}"
            yield text


def _confirm(tuning: Tuning, winners: Sequence[Best], best: Sequence[Best]) -> list[str]:
    """The commands that compare the winners on the test set: one, or one each where the recipe's own options differ."""
    if not winners:
        return []
    recipe = tuning.recipe
    fresh: dict[str, Any] = {"first_seed": recipe.first_seed + recipe.seeds, "seeds": max(_CONFIRMING, recipe.seeds)}
    chosen = [one.space.at(one.result.values) for one in best]
    names = sorted({d.name for one in best for d in one.space.dimensions} - {"rho"})
    own = [{n: getattr(c, n) for n in names if n in {f.name for f in fields(Recipe)}} for c in chosen]
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for values, one in zip(own, chosen, strict=True):
        for known, methods in groups:
            if known == values:
                methods.append(one.methods[0])
                break
        else:
            groups.append((values, [one.methods[0]]))
    commands = []
    for number, (values, methods) in enumerate(groups, 1):
        suffix = "confirmed" if len(groups) == 1 else f"confirmed-{number}"
        out = tuning.path.with_name(f"{tuning.path.name}-{suffix}")
        confirmed = replace(recipe, methods=tuple(dict.fromkeys(methods)), out=out, **fresh, **values)
        if confirmed.base_momentum != chosen[0].base_momentum and "momentum" not in values:
            confirmed = replace(confirmed, momentum=chosen[0].base_momentum)
        commands.append(command_line(confirmed))
    return commands


def _tuned(best: Sequence[Best]) -> bool:
    return any(one.space.dimensions for one in best)


def _error(tuning: Tuning, order: Sequence[Result]) -> float | None:
    """The standard error of a trial's mean, pooled: three runs say too little of their own spread.

    Over the better half only: where training is about to break down, its noise is another one.
    """
    values = [goal for r in order[: max(1, -(-len(order) // 2))] if len(goal := tuning.goal(r)) > 1]
    if not values:
        return None
    return math.sqrt(fmean(variance(goal) for goal in values) / len(values[0]))


def _values(result: Result) -> str:
    return (
        ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.values.items()) or "as it is"
    )


def _text(value: Estimate, digits: int) -> str:
    return f"{value.mean:.{digits}f}" + ("" if value.sd is None else f"±{value.sd:.{digits}f}")
