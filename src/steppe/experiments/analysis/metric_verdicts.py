"""Verdicts on a metric: is a method better than the base, and is it still, beside each control?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steppe.experiments.analysis.statistics import Decision, Pairs, decide, decide_together
from steppe.experiments.analysis.words import BETTER, NO_VERDICT, NOT_DISTINGUISHABLE, WORSE, word
from steppe.experiments.config.task_info import MetricInfo


@dataclass(frozen=True)
class Control:
    """A form of the base that methods are compared with."""

    name: str
    phrase: str
    """As it follows the base's name in a sentence: better than SGD *at equal compute*."""


EQUAL_COMPUTE = Control("equal_compute", "at equal compute")
EQUAL_STEPS = Control("equal_steps", "at equal steps")
BEST_HELD_OUT = Control("best_held_out", "at its best held-out measurement")
AVERAGED = Control("averaged_weights", "with averaged weights")
BEST_AVERAGED = Control("best_averaged", "with averaged weights at their best held-out measurement")

CONTROLS: Mapping[str, Control] = {
    control.name: control for control in (EQUAL_COMPUTE, EQUAL_STEPS, BEST_HELD_OUT, AVERAGED, BEST_AVERAGED)
}
"""The controls that `steppe compare` knows, by name; the first one decides."""

BySeed = Mapping[int, tuple[float, float]]
"""The numbers of a method and of the base, by seed."""


@dataclass(frozen=True)
class Comparison:
    """A method against the base in the form of one control."""

    control: Control
    difference: Decision
    """Method minus base, in the unit of the metric."""
    word: str
    """"better", "worse" or "not distinguishable"; "no verdict" where there is none; "" where it is only described."""

    def numbers(self, metric: MetricInfo) -> str:
        """Return the difference and its interval as text."""
        return with_interval(self.difference, metric)

    def statement(self, metric: MetricInfo) -> str:
        """Return the difference, its interval and the word, as they follow the name of the metric."""
        difference, unit = self.difference, f" {metric.unit_of_change}" if metric.unit else ""
        mean = f"{difference.mean:+{metric.form}}{unit}"
        if difference.interval is None:
            reason = f"{difference.lost} not finite" if difference.lost else "one run"
            return f"{mean} ({reason}: {NO_VERDICT})"
        low, high = difference.interval
        return f"{mean}, 95 % interval [{low:+{metric.form}}, {high:+{metric.form}}]: {self.word}"


@dataclass(frozen=True)
class MetricVerdict:
    """A method against the base in one metric; the first comparison decides, the others are its controls."""

    method: str
    base: str
    metric: MetricInfo
    comparisons: Sequence[Comparison]

    @property
    def word(self) -> str:
        """The verdict of the first comparison."""
        return self.comparisons[0].word

    @property
    def first(self) -> Comparison:
        return self.comparisons[0]

    def control(self, control: Control) -> Comparison | None:
        """Return the comparison with a control, if there is one."""
        return next((each for each in self.comparisons if each.control == control), None)

    def sentence(self, labels: Mapping[str, str] | None = None) -> str:
        """Return the verdict in words; `labels` are names of methods for readers."""
        ours, theirs = ((labels or {}).get(name, name) for name in (self.method, self.base))
        first, *others = self.comparisons
        about = f"test {self.metric.name} {first.numbers(self.metric)}, {_runs(first.difference)}"
        if self.word == NO_VERDICT:
            reason = _reason(first.difference)
            return f"No verdict on {ours} against {theirs} {first.control.phrase} ({about}): {reason}."
        subject = f"{ours} is {_relation(self.word)} {theirs} {first.control.phrase} ({about})"
        described = [each for each in others if each.word in ("", NO_VERDICT)]
        by_word: dict[str, list[Comparison]] = {self.word: []}
        for each in others:
            if each.word not in ("", NO_VERDICT):
                by_word.setdefault(each.word, []).append(each)
        alike = by_word.pop(self.word)
        parts = [subject + "".join(f" and {self._with_numbers(each)}" for each in alike)]
        parts += [
            f", but {_relation(word)} {theirs} {' and '.join(map(self._with_numbers, found))}"
            for word, found in by_word.items()
        ]
        if described:
            parts.append(f"; without a verdict, {' and '.join(map(self._with_numbers, described))}")
        return "".join(parts) + "."

    def controls_sentence(self) -> str:
        """Return what was found beside the controls, as it follows the method's name; empty without controls."""
        found = []
        for each in self.comparisons[1:]:
            word = f": {each.word}" if each.word else ""
            found.append(f"{each.control.phrase} {each.numbers(self.metric)}{word}")
        return "; ".join(found)

    def json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "base": self.base,
            "metric": asdict(self.metric),
            "verdict": self.word,
            "comparisons": [
                {
                    "control": each.control.name,
                    "difference": decision_json(each.difference),
                    "verdict": each.word,
                }
                for each in self.comparisons
            ],
            "sentence": self.sentence(),
        }

    def _with_numbers(self, comparison: Comparison) -> str:
        return f"{comparison.control.phrase} ({comparison.numbers(self.metric)})"


def judge(metric: MetricInfo, base: str, numbers: Mapping[Control, Mapping[str, BySeed]]) -> list[MetricVerdict]:
    """Compare methods with a base in one metric.

    The first control decides which methods differ from the base. For those, the other controls say if that holds
    beside them as well; for the others, they are only described. Each control is corrected for all methods, so each
    question ("at equal compute?", "at equal steps, too?") is answered falsely in at most 5 % of comparisons.

    Args:
        metric: The metric, with its direction.
        base: The method that the others are compared with.
        numbers: For each control, and each method that has it, the numbers of the method and of the base by seed.
            Methods without a seed under the first control have no verdict.

    Example:
        >>> numbers = {
        ...     EQUAL_COMPUTE: {"sam": {0: (85.0, 84.0), 1: (86.1, 84.9), 2: (85.4, 84.3)}},
        ...     EQUAL_STEPS: {"sam": {0: (85.0, 84.5), 1: (86.1, 86.7), 2: (85.4, 84.3)}},
        ... }
        >>> (verdict,) = judge(MetricInfo("accuracy", unit="%"), "sgd", numbers)
        >>> verdict.word
        'better'
        >>> print(verdict.sentence({"sam": "SAM", "sgd": "SGD"}))
        SAM is better than SGD at equal compute (test accuracy +1.10 points [+0.83, +1.37], 3 seeds), but not \
distinguishable from SGD at equal steps (+0.33 points [-1.82, +2.48]).
    """
    by_metric = {control: {metric: by_method} for control, by_method in numbers.items()}
    return _judge(base, by_metric, lambda measures: [decide(measures[0])]).get(metric, [])


def judge_together(
    base: str, numbers: Mapping[Control, Mapping[MetricInfo, Mapping[str, BySeed]]]
) -> dict[MetricInfo, list[MetricVerdict]]:
    """Compare methods with a base in several metrics, as `judge` does; each control is corrected for all of them.

    Args:
        base: The method that the others are compared with.
        numbers: For each control, metric and method the numbers of the method and of the base by seed, one at least.
    """
    return _judge(base, numbers, decide_together)


def _judge(
    base: str,
    numbers: Mapping[Control, Mapping[MetricInfo, Mapping[str, BySeed]]],
    decide_all: Callable[[Sequence[Sequence[Pairs]]], list[list[Decision]]],
) -> dict[MetricInfo, list[MetricVerdict]]:
    """Compare methods with a base; the first control decides, and the others describe or confirm what it found."""
    found: dict[MetricInfo, dict[str, list[Comparison]]] = {metric: {} for of in numbers.values() for metric in of}
    for i, (control, by_metric) in enumerate(numbers.items()):
        measured = {
            metric: {name: by_seed for name, by_seed in of.items() if by_seed and (i == 0 or name in found[metric])}
            for metric, of in by_metric.items()
        }
        decided = decide_all([[list(by_seed.values()) for by_seed in of.values()] for of in measured.values()])
        for (metric, of), decisions in zip(measured.items(), decided, strict=True):
            for method, difference in zip(of, decisions, strict=True):
                comparisons = found[metric].setdefault(method, [])
                differs = not comparisons or comparisons[0].word in (BETTER, WORSE)
                text = word(difference, better=metric.better) if differs else ""
                comparisons.append(Comparison(control, difference, text))
    return {
        metric: [MetricVerdict(method, base, metric, comparisons) for method, comparisons in of.items()]
        for metric, of in found.items()
    }


def controls_of(verdicts: Iterable[MetricVerdict]) -> list[Control]:
    """Return the controls that some verdicts have, in the order of `CONTROLS`."""
    found = {each.control for verdict in verdicts for each in verdict.comparisons}
    return [control for control in CONTROLS.values() if control in found]


def with_interval(difference: Decision, metric: MetricInfo) -> str:
    """Return the mean difference and its interval, the latter only where there is one.

    >>> with_interval(decide([[(85.0, 84.0), (86.1, 84.9), (85.4, 84.3)]])[0], MetricInfo("accuracy", unit="%"))
    '+1.10 points [+0.83, +1.37]'
    """
    form, unit = f"+{metric.form}", f" {metric.unit_of_change}" if metric.unit else ""
    text = f"{difference.mean:{form}}{unit}"
    if difference.interval is None:
        return text
    low, high = difference.interval
    return f"{text} [{low:{form}}, {high:{form}}]"


def decision_json(difference: Decision) -> dict[str, Any]:
    """Return a decision with its interval, for a summary's JSON."""
    interval = None if difference.interval is None else list(difference.interval)
    return asdict(difference) | {"half_width_95": difference.half_width, "interval_95": interval}


def _relation(word: str) -> str:
    return f"{word} {'from' if word == NOT_DISTINGUISHABLE else 'than'}"


def _runs(difference: Decision) -> str:
    seeds = difference.n + difference.lost
    corrected = f", corrected for {difference.comparisons} comparisons" if difference.comparisons > 1 else ""
    return f"{seeds} seed{'s'[: seeds > 1]}{corrected if difference.p is not None else ''}"


def _reason(difference: Decision) -> str:
    if difference.lost:
        return f"in {difference.lost} of {difference.n + difference.lost} pairs of runs a number is not finite"
    return "one seed has no spread, and chance alone may explain the difference"
