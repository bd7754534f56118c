"""Estimates from a few runs, decisions between methods, and the number of seeds that a decision needs."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise

from scipy.special import nctdtr, stdtr, stdtrit  # type: ignore[import-untyped]

from steppe.experiments.config.task_info import EQUAL, difference

ERROR = 0.05
"""Largest share of comparisons in which a method is called different though it is not."""

POWER = 0.8
"""Usual share of comparisons in which a difference that exists is to be found."""

_LARGEST = 1e150  # the squares of larger numbers are not finite

Pairs = Sequence[tuple[float, float]]
"""For each seed, the number of a method and that of the method it is compared with."""


def t_quantile(df: int, comparisons: int = 1) -> float:
    """Return the quantile of Student's t for a two-sided 95 % interval, or for one of several such intervals.

    With `comparisons` above 1, all of them hold at once with 95 % (Bonferroni).

    >>> round(t_quantile(2), 4), round(t_quantile(2, comparisons=3), 4)
    (4.3027, 7.6488)
    """
    if df < 1:
        raise ValueError(f"df={df}: one run has no spread, so it has no confidence interval; take two or more")
    return float(stdtrit(df, 1 - ERROR / (2 * comparisons)))


def is_usable(value: float) -> bool:
    """True if a number is finite, and so small that the variance of such numbers is finite too."""
    return abs(value) < _LARGEST


def rank(value: float) -> float:
    """Return a number to order results by, of which more is better: one that is not usable is worse than all others.

    >>> max([math.nan, 1.0, 2.0], key=rank)
    2.0
    """
    return value if is_usable(value) else -math.inf


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation of `n` values; `sd` and `half_width` are None for a single one."""

    n: int
    mean: float
    sd: float | None

    @property
    def half_width(self) -> float | None:
        """Half the 95 % confidence interval of the mean, by Student's t."""
        return None if self.sd is None else t_quantile(self.n - 1) * self.sd / math.sqrt(self.n)

    @property
    def sign(self) -> int | None:
        """1 or -1 when the interval lies above or below 0; 0 when it holds 0; None without a finite interval."""
        if self.half_width is None or not math.isfinite(self.half_width):
            return None
        return 0 if abs(self.mean) <= self.half_width else int(math.copysign(1, self.mean))

    def text(self, form: str, form_of_sd: str | None = None, sign: str = "±") -> str:
        """Return mean and standard deviation, both formatted by `form` unless another is given for the latter."""
        return f"{self.mean:{form}}" + ("" if self.sd is None else f"{sign}{self.sd:{form_of_sd or form}}")


def estimate(values: Sequence[float]) -> Estimate:
    """Summarize at least one value; those that are not usable give no finite standard deviation.

    A mean or a standard deviation that only rounding separates from 0 is 0.

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(n=3, mean=2.0, sd=1.0)
    """
    if len(values) == 1:
        return Estimate(1, float(values[0]), None)
    if not all(map(is_usable, values)):
        return Estimate(len(values), sum(values) / len(values), math.nan)  # fmean refuses inf beside -inf
    rounding = EQUAL * max(map(abs, values))
    mean, sd = (
        0.0 if abs(found) <= rounding else found for found in (statistics.fmean(values), statistics.stdev(values))
    )
    return Estimate(len(values), mean, sd)


@dataclass(frozen=True)
class Decision(Estimate):
    """The mean of paired differences, and what may be said of it beside the others of its family.

    The intervals of all decisions of a family hold at once with 95 %. `sign` is the decision by Holm's or Hochberg's
    procedure, which finds more than these intervals do: of all that do not differ, any is called different in at most
    5 % of families.
    """

    comparisons: int = 1
    """Number of comparisons in the family, for all of which this one is corrected."""
    lost: int = 0
    """Pairs that are left out because a number is not finite; with any, there is no decision."""
    step: float = 0.0
    """Resolution of the numbers: the smallest difference between two of them."""
    p: float | None = None
    """The adjusted p-value; None without a decision."""

    @property
    def half_width(self) -> float | None:
        """Half the interval of the mean, of which all `comparisons` hold at once with 95 %."""
        if self.p is None:
            return None
        return t_quantile(self.n - 1, self.comparisons) * _standard_error(self)

    @property
    def sign(self) -> int | None:
        """1 or -1 for a difference, 0 where none is found, None without a decision."""
        if self.p is None:
            return None
        return int(math.copysign(1, self.mean)) if self.p <= ERROR else 0

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the interval; 0 is outside of it, or its end, where a difference is found."""
        if self.half_width is None:
            return None
        low, high = difference(self.mean, self.half_width), difference(self.mean, -self.half_width)
        return max(low, 0.0) if self.sign == 1 else low, min(high, 0.0) if self.sign == -1 else high


def decide(pairs: Sequence[Pairs], chosen_from: int = 0) -> list[Decision]:
    """Decide for each of several methods if it differs from the one it is compared with.

    A paired t-test over the seeds, corrected for the number of methods by Holm's procedure. Numbers with a coarse
    resolution, such as the accuracy on few samples, often have nearly equal differences by chance. So the variance
    of a difference includes that of rounding its two numbers to the resolution, step^2 / 12 each.

    Args:
        pairs: For each method, its pairs of numbers; at least one pair each.
        chosen_from: Number of comparisons that these were chosen from, looking at their numbers. They are corrected
            for all of those.

    References:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).

    >>> better, unclear = decide([[(85.0, 84.0), (86.1, 84.9), (85.4, 84.3)], [(84.0, 84.0), (85.2, 84.9)]])
    >>> better.sign, unclear.sign
    (1, 0)
    """
    return _decide([pairs], _holm, chosen_from)[0]


def decide_together(measures: Sequence[Sequence[Pairs]]) -> list[list[Decision]]:
    """Decide likewise for several measures of the same runs, each with its own resolution, corrected for all of them.

    The measures move together. So the correction is that of Hochberg, which finds more than Holm's: if all differences
    would be found alone, all are found.

    Args:
        measures: For each measure, and for each method, the pairs of numbers.

    References:
        Hochberg, "A sharper Bonferroni procedure for multiple tests of significance", Biometrika 75 (1988). It holds
        for tests with positive dependence: Sarkar, Annals of Statistics 26 (1998).

    >>> clear, barely = [(85.0, 84.0), (86.1, 84.9), (85.4, 84.3)], [(85.0, 84.6), (86.1, 85.5), (85.4, 84.9)]
    >>> (first,), (second,) = decide_together([[clear], [barely]])
    >>> [round(p, 4) for p in (first.p, second.p)]
    [0.0064, 0.0152]
    """
    return _decide(measures, _hochberg, 0)


def _decide(
    measures: Sequence[Sequence[Pairs]], adjust: Callable[[Sequence[float], int], list[float]], chosen_from: int
) -> list[list[Decision]]:
    described = [[_describe(of, step) for of in pairs] for pairs in measures for step in [_resolution_of(pairs)]]
    p_values = [_p_value(value) for of in described for value in of]
    tested = [i for i, p in enumerate(p_values) if p is not None]
    comparisons = max(chosen_from, len(tested), 1)
    adjusted = dict(zip(tested, adjust([p for p in p_values if p is not None], comparisons), strict=True))
    numbers = count()
    return [
        [replace(value, comparisons=comparisons, p=adjusted.get(next(numbers))) for value in of] for of in described
    ]


def power(effect: float, seeds: int, comparisons: int = 1) -> float:
    """Return the share of comparisons that find a difference, for normally distributed differences.

    Args:
        effect: The difference, in standard deviations of the paired differences.
        seeds: Runs of each method.
        comparisons: Methods that are compared with the same one; the share is that of the first that is found.

    >>> round(power(1.0, seeds=10), 2)
    0.8
    """
    found = 1 - float(nctdtr(seeds - 1, abs(effect) * math.sqrt(seeds), t_quantile(seeds - 1, comparisons)))
    return 1.0 if math.isnan(found) else found  # scipy has no value for very large effects


def seeds_needed(effect: float, share: float = POWER, comparisons: int = 1, most: int = 1000) -> int | None:
    """Return the number of seeds that find a difference with this power; None if more than `most`.

    >>> seeds_needed(1.0), seeds_needed(2.0), seeds_needed(0.0)
    (10, 5, None)
    """
    return next((seeds for seeds in range(2, most + 1) if power(effect, seeds, comparisons) >= share), None)


def _describe(pairs: Pairs, step: float) -> Decision:
    """Return the difference of the finite pairs, without a decision."""
    finite = _finite(pairs)
    value = estimate([difference(ours, theirs) for ours, theirs in finite] or [math.nan])
    return Decision(len(finite), value.mean, value.sd, lost=len(pairs) - len(finite), step=step)


def _finite(pairs: Pairs) -> list[tuple[float, float]]:
    return [pair for pair in pairs if all(map(is_usable, pair))]


def _standard_error(of: Decision) -> float:
    return math.sqrt(((of.sd or 0.0) ** 2 + of.step**2 / 6) / of.n)


def _p_value(of: Decision) -> float | None:
    """Return the p-value of a single comparison; None without a decision."""
    if of.sd is None or of.lost:
        return None
    error = _standard_error(of)
    return 2 * float(stdtr(of.n - 1, -abs(of.mean) / error)) if error else 1.0


def _holm(p_values: Sequence[float], comparisons: int) -> list[float]:
    """Return the adjusted p-values of some of so many comparisons, as if all others had larger ones."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for smaller, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (comparisons - smaller) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _hochberg(p_values: Sequence[float], comparisons: int) -> list[float]:
    """Return the adjusted p-values likewise."""
    adjusted, smallest, fewer = [0.0] * len(p_values), 1.0, comparisons - len(p_values)
    for larger, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i], reverse=True)):
        smallest = min(smallest, (fewer + larger + 1) * p_values[i])
        adjusted[i] = smallest
    return adjusted


def _resolution_of(pairs: Sequence[Pairs]) -> float:
    return _resolution([value for of in pairs for pair in _finite(of) for value in pair])


def _resolution(values: Sequence[float]) -> float:
    """Return the smallest difference between two values that are not equal; 0 if all are."""
    tolerance = EQUAL * max(map(abs, values), default=0.0)
    return min((b - a for a, b in pairwise(sorted(values)) if b - a > tolerance), default=0.0)
