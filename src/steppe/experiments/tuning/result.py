"""The result of a search: the best values of each method, their uncertainty, and the commands that confirm them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, variance
from typing import Any, Literal, Self, get_args

from rich.console import Console

from steppe.experiments.analysis.metric_verdicts import EQUAL_COMPUTE, Comparison
from steppe.experiments.analysis.statistics import Decision, Pairs, decide, estimate, is_usable, rank
from steppe.experiments.analysis.summary import SummaryFiles, setting
from steppe.experiments.analysis.tables import Table, bullets
from steppe.experiments.analysis.words import word
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.presets import command_line
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.task_info import LOSS, MetricInfo, difference
from steppe.experiments.execution.progress import print_line
from steppe.experiments.storage.records import Record, parse_record
from steppe.experiments.tuning.options import TuningOptions, field_of
from steppe.experiments.tuning.search_space import Range, Space, Values

_SHOWN = 5  # trials of a method on the terminal; the files have them all
_LISTED = 6  # values within one standard error that are listed; of more, the ends only
_CONFIRMING_RUNS = 3  # the minimum for a verdict: an interval of two runs is 13 times their standard error, and wider


_State = Literal["complete", "diverged", "running"]


@dataclass(frozen=True)
class TrialResult:
    """The state of a trial, and the last measurement of each of its runs."""

    method: str
    number: int
    values: Values
    state: _State
    runs: Sequence[Record] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "runs": [run.to_json() for run in self.runs]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned; any error if it is something else."""
        trial = cls(**{**values, "runs": tuple(parse_record(run) for run in values["runs"])})
        if isinstance(trial.number, bool) or not isinstance(trial.number, int) or not isinstance(trial.reason, str):
            raise TypeError(f"number {trial.number!r} and reason {trial.reason!r} are not those of a trial")
        if trial.state not in get_args(_State):
            raise ValueError(f"state is {trial.state!r}")
        return trial

    def measured(self, field: str) -> list[float]:
        """Return one field of the last measurement of each run."""
        return [run[field] for run in self.runs]

    def __str__(self) -> str:
        return ", ".join(_text(self.values)) or "as it is"


def read_trial(spaces: Sequence[Space], values: Mapping[str, Any]) -> TrialResult:
    """Read a trial of one of the spaces; any error if it is none."""
    trial = TrialResult.from_json(values)
    (space,) = [space for space in spaces if str(space.spec) == trial.method]
    searched = {dimension.name for dimension in space.dimensions}
    if trial.values.keys() != searched and (trial.state != "running" or trial.values.keys() - searched):
        raise ValueError(f"trial {trial.number} of {trial.method} has values of {', '.join(trial.values) or 'nothing'}")
    if trial.state == "complete" and len(trial.runs) != space.recipe.comparison.seeds:
        raise ValueError(f"trial {trial.number} of {trial.method} has {len(trial.runs)} runs")
    space.at(trial.values)  # ValueError for a value that the method cannot take
    return trial


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
    def recipe(self) -> Recipe:
        """The recipe with the method at its best values."""
        return self.space.at(self.result.values)

    def label(self, trial: TrialResult) -> str:
        """Return the label of the method at a trial's values, including values of the recipe's options."""
        method = self.space.at(trial.values).comparison.methods[0]
        return ", ".join([method.label, *_text(self.space.options(trial.values))])


@dataclass(frozen=True)
class TuningResult(SummaryFiles):
    """A search and its trials, as the terminal, summary.md and summary.json show them."""

    recipe: Recipe
    options: TuningOptions
    spaces: Sequence[Space]
    path: Path
    trials: Sequence[TrialResult]
    has_validation: bool = False
    """True if the task has validation data of its own, so that nothing is held out of training."""

    @property
    def metric(self) -> MetricInfo:
        """The metric that trials are judged by."""
        return self.options.metric(self.recipe)

    @property
    def data_in_short(self) -> str:
        """The data that trials are judged on, in a few words."""
        if self.has_validation:
            return "the task's validation data"
        return f"one in {self.options.hold_out} training {self._samples}, held out"

    @property
    def _samples(self) -> str:
        return "samples" if self.recipe.data.task else "images"

    @property
    def title(self) -> str:
        return f"{self.recipe.name}, tuned: {setting(self.recipe)}"

    def goal(self, trial: TrialResult) -> list[float]:
        """Return the value that a trial is judged by, for each of its runs."""
        return trial.measured(field_of(self.metric))

    def score(self, trial: TrialResult) -> float:
        """Return the mean of the goal, with the sign for which higher is better."""
        return rank(estimate(self.goal(trial)).mean * self.metric.better)

    @cached_property
    def best(self) -> list[Best]:
        """The best trial of each method that has a complete one."""
        best = []
        for space in self.spaces:
            complete = [trial for trial in self.trials if trial.method == str(space.spec) and trial.state == "complete"]
            if complete:
                ranked = sorted(complete, key=self.score, reverse=True)
                error = self._standard_error(ranked)
                near = [trial for trial in ranked if self.score(trial) >= self.score(ranked[0]) - (error or 0.0)]
                best.append(Best(space, ranked, error, near))
        return best

    def _standard_error(self, ranked: Sequence[TrialResult]) -> float | None:
        """Return the standard error of a trial's mean, pooled, as three runs estimate their own variance poorly.

        Only over the better half: where training is about to diverge, the noise is larger.
        """
        goals = [self.goal(trial) for trial in ranked[: math.ceil(len(ranked) / 2)]]
        values = [goal for goal in goals if len(goal) > 1 and all(map(is_usable, goal))]
        return math.sqrt(fmean(map(variance, values)) / len(values[0])) if values else None

    def rows(self, limit: int | None = None) -> Iterator[list[str]]:
        """Yield the rows of the table, for at most `limit` trials of a method."""
        for best in self.best:
            for trial in best.ranked[:limit]:
                cells = [_cell(trial.measured(field), form) for field, _, form in self._columns()]
                yield [f"{trial.number}: {best.label(trial)}", *cells, str(len(trial.runs))]

    def _columns(self) -> Iterator[tuple[str, str, str]]:
        """Yield the measures in the table: the field of a record, the heading, and the format."""
        task = self.recipe.task
        judged_by = self.metric
        if judged_by not in (*task.measured, LOSS):
            yield field_of(judged_by), f"validation\n{judged_by.name} {judged_by.unit}".rstrip(), judged_by.form
        for metric in task.measured:
            yield field_of(metric), f"validation\n{metric.name} {metric.unit}".rstrip(), metric.form
        if LOSS not in task.measured:
            yield field_of(LOSS), "validation\nloss", LOSS.form if self.recipe.data.task else ".3f"
        deciding = task.deciding
        yield f"train_{deciding.name}", f"train\n{deciding.name} {deciding.unit}".rstrip(), deciding.form
        unit = deciding.unit_of_change
        yield "gap", f"gap,\n{unit}" if unit else "gap", deciding.form

    def table(self, limit: int | None = None) -> Table:
        headings = ("trial", *(heading for _, heading, _ in self._columns()), "runs")
        return Table(headings, {"": list(self.rows(limit))}, title=self.title)

    def notes(self) -> Iterator[str]:
        runs = self.recipe.comparison.seeds
        what = f"{'highest' if self.metric.higher_is_better else 'lowest'} validation {self.metric.name}"
        if self.has_validation:
            where = "the task's own validation data. The test data were not used."
        elif self.recipe.data.task:
            where = (
                f"one in {self.options.hold_out} of the training samples, which were held out of training. The test "
                "data were not used."
            )
        else:
            where = (
                f"one in {self.options.hold_out} of the training images of each class, which were held out of "
                "training. The test set was not used."
            )
        yield (
            f"Chosen by the {what} after {self.recipe.comparison.epochs} standardized epochs (mean of {runs} "
            f"run{'s'[: runs > 1]}), on {where}"
        )
        yield from map(self._best_note, self.best)
        yield from self._differences()
        tried = max((len(one.ranked) for one in self.best), default=0)
        if tried > 1:
            worse = "lower" if self.metric.higher_is_better else "higher"
            yield (
                f"The best of {tried} trials is partly luck: expect a {worse} value on other {self._samples}, and "
                "confirm it on the test set."
            )
        diverged = [f"{r.method} trial {r.number} ({r})" for r in self.trials if r.state == "diverged"]
        if diverged:
            yield f"Diverged, and counted as worse than all others: {'; '.join(diverged)}."
        running = sum(trial.state == "running" for trial in self.trials)
        if running:
            yield f"In progress, or stopped: {running} trial{'s'[: running > 1]}; the same command resumes them."

    def _best_note(self, best: Best) -> str:
        form, unit = self._form, f" {self.metric.unit}" if self.metric.unit else ""
        text = f"{best.label(best.result)}: {_cell(self.goal(best.result), form)}{unit}"
        if not best.space.dimensions:
            return f"{text}."
        complete, near = len(best.ranked), len(best.near)
        text += f", the best of {complete} trial{'s'[: complete > 1]} (trial {best.result.number})."
        if best.error is None:
            return f"{text} One run per trial gives no measure of the noise: take --seeds 3 or more."
        error = f"one standard error ({best.error:{form}}{self._points})"
        if near == 1:
            return f"{text} No other is within {error}."
        if len(best.space.dimensions) == 1:
            name = best.space.dimensions[0].name
            values = sorted((trial.values[name] for trial in best.near), key=lambda v: (isinstance(v, str), v))
            listed = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
            where = f"{name} {', '.join(listed) if near <= _LISTED else f'from {listed[0]} to {listed[-1]}'}"
        else:
            where = "; ".join(map(str, best.near[:_LISTED])) + ("; ..." if near > _LISTED else "")
        flat = "The optimum is flat: " if 2 * near >= complete > 3 else ""
        return f"{text} {flat}{near} of {complete} trials are within {error} of the best: {where}."

    def _differences(self) -> Iterator[str]:
        """Describe the difference between each method and the first one, both at their best, paired by seed.

        Each best trial was chosen by the same numbers. So the decisions are corrected for all pairs of trials of which
        one could have been chosen.
        """
        if len(self.best) < 2:
            return
        reference, *others = self.best
        theirs = self.goal(reference.result)
        pairs = [list(zip(self.goal(best.result), theirs, strict=True)) for best in others]
        possible = sum(len(best.ranked) for best in others) * len(reference.ranked)
        is_judged = self.recipe.comparison.seeds >= _CONFIRMING_RUNS
        for best, of_best, decision in zip(others, pairs, decide(pairs, chosen_from=possible), strict=True):
            found = Comparison(EQUAL_COMPUTE, decision, word(decision, better=self.metric.better))
            is_described = len(of_best) > 1 and decision.lost == 0 and not is_judged
            yield (
                f"{best.label(best.result)} against {reference.label(reference.result)}, on the {self._samples} it was "
                f"chosen by: {self._described(decision, of_best) if is_described else found.statement(self.metric)}."
            )
        if possible > 1 and is_judged:
            yield (
                f"These verdicts are corrected for the {possible} pairs of trials that could have been the best ones. "
                "That takes many seeds; the confirmation below, with fresh seeds, needs fewer."
            )

    def _described(self, mean: Decision, pairs: Pairs) -> str:
        """Return the mean difference and that of each seed, where there are too few for a useful interval."""
        each = " and ".join(f"{difference(*pair):+{self._form}}" for pair in pairs)
        return (
            f"{mean.mean:+{self._form}}{self._points} ({each}), without a verdict, which takes {_CONFIRMING_RUNS} "
            "seeds or more"
        )

    @property
    def _form(self) -> str:
        """The format of the metric in sentences."""
        return ".4f" if self.metric is LOSS and not self.recipe.data.task else self.metric.form

    @property
    def _points(self) -> str:
        """The unit of a difference, as it follows a number."""
        unit = self.metric.unit_of_change
        return f" {unit}" if unit else ""

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for each best value at an edge of its range."""
        for best in self.best:
            for dimension in best.space.dimensions:
                value = best.result.values[dimension.name]
                edge = dimension.edge(value)
                if edge is None or len(best.ranked) < 2:
                    continue
                text = (
                    f"{best.result.method}: the best {dimension.name}, {value}, lies at the {edge} edge of "
                    f"{dimension}, so a better one may lie beyond."
                )
                if isinstance(dimension, Range) and dimension.log:
                    beyond = dimension.beyond(edge)
                    if all(best.space.takes({**best.result.values, dimension.name: end}) for end in beyond.values):
                        text += f" Search there, in another --out: --search {beyond}"
                yield text

    @cached_property
    def _groups(self) -> Mapping[tuple[tuple[str, object], ...], Sequence[MethodSpec]]:
        """The methods at their best, by the best options of the recipe: only those of a group are compared."""
        groups: dict[tuple[tuple[str, object], ...], list[MethodSpec]] = {}
        for best in self.best:
            options = tuple(best.space.options(best.result.values).items())
            groups.setdefault(options, []).append(best.recipe.comparison.methods[0])
        return groups

    def limits(self) -> Iterator[str]:
        """Yield what the commands do not do, where they are several."""
        if len(self._groups) < 2:
            return
        names = list(dict.fromkeys(name for options in self._groups for name, _ in options))
        yield (
            f"These {len(self._groups)} comparisons have folders of their own, as the best {' and '.join(names)} of "
            f"methods differ, and no verdict compares them. Read the test {self.metric.name} in their tables: runs of "
            "a seed are pairs, with the same initial weights and batches. For a verdict, give all methods the same "
            f"{' and '.join(names)}, or compare a function of your own that sets the values of its base."
        )

    def commands(self) -> Iterator[str]:
        """Yield the commands that compare the methods at their best on the test set, with fresh seeds.

        There is one for all methods that have the same best options of the recipe.
        """
        comparison = self.recipe.comparison
        for number, (options, methods) in enumerate(self._groups.items(), 1):
            suffix = "confirmed" if len(self._groups) == 1 else f"confirmed-{number}"
            confirmed = self.recipe.replace(
                methods=tuple(dict.fromkeys(methods)),
                out=self.path.with_name(f"{self.path.name}-{suffix}"),
                first_seed=comparison.first_seed + comparison.seeds,
                seeds=max(_CONFIRMING_RUNS, comparison.seeds),
                **dict(options),
            )
            # a comparison of fewer methods may choose another momentum than the search
            momentum = self.spaces[0].recipe.base_momentum
            if confirmed.base_momentum != momentum and "momentum" not in dict(options):
                confirmed = confirmed.replace(momentum=momentum)
            yield command_line(confirmed)

    def markdown(self) -> str:
        notes = bullets([*self.notes(), *(f"**{warning}**" for warning in self.warnings())])
        commands = [*self.commands()]
        confirm = ["", "To confirm on the test set:", "", "```", *commands, "```"] if commands else []
        limits = ["", *self.limits()] if len(commands) > 1 else []
        return "\n".join([f"# {self.title}", "", *self.table().markdown(), "", *notes, *confirm, *limits, ""])

    def json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "objective": f"validation {self.metric.name}",
            "higher_is_better": self.metric.higher_is_better,
            "best": [
                {
                    "method": best.result.method,
                    "trial": best.result.number,
                    "values": dict(best.result.values),
                    "spec": str(best.recipe.comparison.methods[0]),
                    "validation": asdict(estimate(self.goal(best.result))),
                    "standard_error": best.error,
                    "within_one_standard_error": [dict(trial.values) for trial in best.near],
                    "complete_trials": len(best.ranked),
                }
                for best in self.best
            ],
            "notes": [*self.notes()],
            "warnings": [*self.warnings()],
            "confirm": [*self.commands()],
            "limits": [*self.limits()],
        }

    def show(self, console: Console) -> None:
        notes = [*self.notes(), *(f"Warning: {warning}" for warning in self.warnings())]
        self.table(_SHOWN).show(console, notes)
        if commands := [*self.commands()]:
            print_line(console, "To confirm on the test set:")
        for command in commands:
            print_line(console, f"  {command}")
        for sentence in self.limits():
            print_line(console, sentence)


def _cell(values: Sequence[float], form: str) -> str:
    """Return the mean and the standard deviation, which has fewer digits where the format counts significant ones."""
    return estimate(values).text(form, None if form.endswith("f") else ".2g")


def _text(values: Values) -> list[str]:
    return [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()]
