"""Advice after a comparison: which method to take, at what price, how sure that is, and what to try next."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from steppe.experiments.analysis.metric_verdicts import (
    AVERAGED,
    BEST_HELD_OUT,
    EQUAL_STEPS,
    Control,
    MetricVerdict,
    with_interval,
)
from steppe.experiments.analysis.statistics import ERROR, seeds_needed
from steppe.experiments.analysis.words import BETTER, NO_VERDICT, NOT_DISTINGUISHABLE, WORSE
from steppe.experiments.storage.records import AVERAGE

_MANY_SEEDS = 50  # from which on a difference is too small for its search to pay
_USUAL_SEEDS = 5
_CHEAP = 1.5  # passes a step, up to which a method counts as a cheap one
_OF_ONE_PASS = {
    "saf": "saf (for classes; with lmbda=9.6 if labels may be wrong)",
    "arwp": "arwp:rho=0.04 (if labels may be wrong)",
}  # each with its options: what was found to do as well as SAM, or nearly, in docs/which-method.md

_INSTEAD: Mapping[Control, str] = {
    EQUAL_STEPS: "After as many steps, {base} is {relation} {ours}: training for a shorter time {may} do as well.",
    BEST_HELD_OUT: "At its best held-out measurement, {base} is {relation} {ours}: stopping early {may} do as well.",
    AVERAGED: "With averaged weights, {base} is {relation} {ours}: they {may} do as well, and need no further pass.",
}

_NOT_FINITE = "runs ended with numbers that are not finite. Try a smaller rho or learning rate."
_NO_METRIC = (
    "test {} is not finite where the loss is. So the metric has no value there, whichever the method: let its function "
    "return a number for such outputs, or give other test data."
)


@dataclass(frozen=True)
class Candidate:
    """A method that was compared, and its costs."""

    label: str
    name: str
    """The method without its options."""
    passes: float
    """Forward-backward passes of a step."""
    seconds: float
    """Training time of a run at equal compute."""
    rho: float | None = None
    options: str = ""
    """Its options but for rho, as a spec has them."""
    metric_fails: bool = False
    """True if the deciding metric of a run is not finite where its loss is: then the training is not the reason."""

    @property
    def family(self) -> tuple[str, str]:
        """What all radii of a method have in common."""
        return self.name, self.options

    def with_rho(self, rho: float) -> str:
        """Return the spec of the method with another radius."""
        return f"{self.name}:rho={rho:.3g}" + (f",{self.options}" if self.options else "")


Candidates = Mapping[str, Candidate]
"""By method, as the verdicts name them; the base is among them."""


def advise(verdicts: Sequence[MetricVerdict], candidates: Candidates) -> list[str]:
    """Return sentences: the method to take and its price, how sure that is, and what to try next.

    Args:
        verdicts: The verdicts on the deciding metric against one base, in the order of the methods.
        candidates: The methods and their costs.
    """
    judged = [verdict for verdict in verdicts if verdict.word != NO_VERDICT]
    if not judged:
        return [*_without_verdicts(verdicts, candidates), *_next_radius(verdicts, candidates)]
    winners = [verdict for verdict in judged if verdict.word == BETTER]
    if not winners:
        return [*_keep_base(judged, candidates), *_diverged(verdicts, candidates), *_next_radius(judged, candidates)]
    best = _cheapest_of_the_best(winners, candidates)
    return [
        *_take(best, candidates),
        *_diverged(verdicts, candidates),
        *_held(best, candidates),
        _certainty(judged),
        *_next_radius(judged, candidates),
        *_cheaper(best, candidates),
    ]


def _without_verdicts(verdicts: Sequence[MetricVerdict], candidates: Candidates) -> Iterator[str]:
    if not verdicts:
        return
    base = candidates[verdicts[0].base].label
    if lost := _lost(verdicts, candidates):
        yield f"Keep {base} for now: {' '.join(lost)}"
    else:
        yield f"Keep {base} for now: one seed cannot tell a difference from chance. Take --seeds {_USUAL_SEEDS}."


def _diverged(verdicts: Sequence[MetricVerdict], candidates: Candidates) -> Iterator[str]:
    """Name the methods without a verdict because numbers of their runs, or of the base's, are not finite."""
    for reason, labels in _lost(verdicts, candidates).items():
        yield f"Nothing is said of {_enumerated(labels)}: {reason}"


def _lost(verdicts: Sequence[MetricVerdict], candidates: Candidates) -> dict[str, list[str]]:
    """Return the methods for which numbers are not finite, by the reason and what to do about it."""
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.first.difference.lost:
            metric_fails = any(candidates[name].metric_fails for name in (verdict.method, verdict.base))
            reason = _NO_METRIC.format(verdict.metric.name) if metric_fails else _NOT_FINITE
            found.setdefault(reason, []).append(_label(verdict, candidates))
    return found


def _keep_base(judged: Sequence[MetricVerdict], candidates: Candidates) -> Iterator[str]:
    base = candidates[judged[0].base].label
    if all(verdict.word == WORSE for verdict in judged):
        others = f"{_label(judged[0], candidates)} is" if len(judged) == 1 else "all other methods are"
        yield f"Keep {base}: {others} worse."
        return
    yield f"Keep {base}: no method was found to be better with {_seeds(judged)} seeds."
    best = max(judged, key=_gain)
    if _gain(best) > 0:
        yield _more_seeds(best, candidates)


def _more_seeds(verdict: MetricVerdict, candidates: Candidates) -> str:
    """Name the seeds that would find the observed difference."""
    difference = verdict.first.difference
    spread = math.sqrt((difference.sd or 0.0) ** 2 + difference.step**2 / 6)
    needed = seeds_needed(difference.mean / spread, comparisons=difference.comparisons, most=_MANY_SEEDS)
    about = f"{_label(verdict, candidates)} is ahead by {with_interval(difference, verdict.metric)}"
    if needed is None:
        return f"{about}: if that is the difference, more than {_MANY_SEEDS} seeds are needed to find it."
    needed = max(needed, difference.n + 1)
    return f"{about}: if that is the difference, --seeds {needed} would find it in four of five comparisons."


def _take(best: MetricVerdict, candidates: Candidates) -> Iterator[str]:
    ours, base = candidates[best.method], candidates[best.base]
    stronger = next((each for each in best.comparisons if each.word == WORSE), None)
    if stronger is None:
        yield f"Take {ours.label}: {_relative(best, base.label)}."
    else:
        numbers = stronger.numbers(best.metric)
        yield (
            f"Take {base.label} {stronger.control.phrase}: against it, {ours.label} has {numbers} of test "
            f"{best.metric.name}, though it is {_relative(best, base.label)}."
        )
    price = f"A step of {ours.label} makes {ours.passes:.2f} passes, one of {base.label} {base.passes:.2f}"
    if base.seconds > 0 and ours.seconds > 0:
        price += f"; at equal compute it trained {ours.seconds / base.seconds:.2f} times as long"
    yield f"{price}."


def _relative(best: MetricVerdict, base: str) -> str:
    first = best.first
    held = [each.control.phrase for each in best.comparisons[1:] if each.word == best.word]
    phrases = " and ".join([first.control.phrase, *held])
    return f"better than {base} {phrases}, in test {best.metric.name} by {first.numbers(best.metric)}"


def _held(best: MetricVerdict, candidates: Candidates) -> Iterator[str]:
    """Name the controls beside which the difference was not found."""
    words = {NOT_DISTINGUISHABLE: ("not distinguishable from", "may"), WORSE: ("better than", "would")}
    names = {"base": candidates[best.base].label, "ours": candidates[best.method].label}
    for control, sentence in _INSTEAD.items():
        comparison = best.control(control)
        if comparison is not None and comparison.word in words:
            relation, may = words[comparison.word]
            yield sentence.format(relation=relation, may=may, **names)


def _certainty(judged: Sequence[MetricVerdict]) -> str:
    seeds = _seeds(judged)
    over = f", over all {len(judged)} methods" if len(judged) > 1 else ""
    share = f"{100 * ERROR:g} % of comparisons{over}"
    text = (
        f"How sure: methods that do not differ are called different in at most {share}; this is one of {seeds} seeds."
    )
    return text if min(v.first.difference.n for v in judged) >= 3 else f"{text} Two seeds give wide intervals."


def _next_radius(verdicts: Sequence[MetricVerdict], candidates: Candidates) -> Iterator[str]:
    """Suggest radii beyond the best one where it is at an end of those tried, the base's and failed ones included."""
    gains: dict[tuple[str, str], dict[float, float]] = {}
    for verdict in verdicts:
        method = candidates[verdict.method]
        if method.rho and not verdict.first.difference.lost:
            gains.setdefault(method.family, {})[method.rho] = _gain(verdict)
    base = candidates[verdicts[0].base] if verdicts else None
    if base is not None and base.rho and base.family in gains:
        gains[base.family][base.rho] = 0.0
    for family, by_radius in gains.items():
        tried = {each.rho: each for each in candidates.values() if each.family == family and each.rho}
        best = max(by_radius, key=by_radius.__getitem__)
        smaller, larger = (tried[best].with_rho(rho) for rho in (best / 2, best * 2))
        if len(tried) == 1:
            yield f"Try other radii: {smaller} {larger}, or steppe tune."
        elif best == min(tried):
            yield f"Try a smaller radius, {smaller}: of those tried, the smallest is the best one."
        elif best == max(tried):
            yield f"Try a larger radius, {larger}: of those tried, the largest is the best one."


def _cheaper(best: MetricVerdict, candidates: Candidates) -> Iterator[str]:
    """Suggest what was not compared and may do as well without a second pass."""
    if candidates[best.method].passes <= _CHEAP:
        return
    tried = {candidate.name for candidate in candidates.values()}
    untried = [spec for name, spec in _OF_ONE_PASS.items() if name not in tried]
    if best.control(AVERAGED) is None:
        name = candidates[best.base].name
        untried.insert(0, f"{name}+{AVERAGE}{best.base.removeprefix(name)} (averaged weights)")
    if untried:
        yield f"If the price of a step matters, compare with {_enumerated(untried)}: no second pass is needed."


def _cheapest_of_the_best(winners: Sequence[MetricVerdict], candidates: Candidates) -> MetricVerdict:
    """Return the method with the fewest passes among those within one standard error of the best."""
    best = max(winners, key=_gain)
    difference = best.first.difference
    error = (difference.sd or 0.0) / math.sqrt(difference.n)
    near = [verdict for verdict in winners if _gain(verdict) >= _gain(best) - error]
    return min(near, key=lambda verdict: (round(candidates[verdict.method].passes, 2), -_gain(verdict)))


def _gain(verdict: MetricVerdict) -> float:
    """Return the mean improvement."""
    return verdict.metric.better * verdict.first.difference.mean


def _enumerated(names: Sequence[str]) -> str:
    """Return the names with commas, and "and" before the last one."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _label(verdict: MetricVerdict, candidates: Candidates) -> str:
    return candidates[verdict.method].label


def _seeds(verdicts: Sequence[MetricVerdict]) -> str:
    counts = sorted({verdict.first.difference.n for verdict in verdicts})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
