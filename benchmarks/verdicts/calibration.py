"""The share of comparisons that call methods different, in simulation and from measured numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steppe.experiments.analysis.statistics import Pairs, decide, decide_together, estimate, power, seeds_needed
from steppe.flatness.families import FAMILIES, IN_VERDICT

Numbers = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Numbers]

BLOCKS = 10
"""Disjoint sets of runs, whose shares are independent and give the share its interval."""

EFFECTS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Differences in standard deviations of the paired differences."""


def _with_failures(rng: np.random.Generator, shape: tuple[int, ...]) -> Numbers:
    return rng.standard_normal(shape) - 8 * (rng.random(shape) < 0.1)


def _accuracy(samples: int) -> Draw:
    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Numbers:
        accuracies: Numbers = np.round(samples * rng.normal(0.9, 0.015, shape)) * 100 / samples
        return accuracies

    return draw


SHAPES: Mapping[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "skewed (exponential)": lambda rng, shape: rng.exponential(size=shape),
    "heavy tails (Student's t, 2 df)": lambda rng, shape: rng.standard_t(2, shape),
    "one run in ten fails by 8 standard deviations": _with_failures,
    "accuracy 90 ± 1.5 % on 1,000 samples": _accuracy(1000),
    "accuracy 90 ± 1.5 % on 100 samples": _accuracy(100),
    "accuracy 90 ± 1.5 % on 30 samples": _accuracy(30),
}
"""Distributions of a run's number. What the runs of a seed have in common cancels in their difference."""


def different(numbers: Numbers) -> bool:
    """Return True if any method is called different from the base: numbers (1 + methods, seeds), the base first."""
    return any(decision.sign for decision in decide(_pairs(numbers)))


FLATNESS = [name for family in IN_VERDICT for name in FAMILIES[family].measures]
"""The measures of flatness that have a verdict."""


def flatness_differs(numbers: Numbers) -> bool:
    """Return True if any measure of any method is called flatter or sharper: (measures, 1 + methods, seeds)."""
    return any(decision.sign for of in decide_together(list(map(_pairs, numbers))) for decision in of)


def _pairs(numbers: Numbers) -> list[Pairs]:
    """Return the pairs of each method and the base, which is the first one: numbers (1 + methods, seeds)."""
    base, *methods = numbers.tolist()
    return [list(zip(ours, base, strict=True)) for ours in methods]


def simulate_flatness(seeds: Sequence[int], comparisons: int) -> Iterator[dict[str, Any]]:
    """Yield the number of comparisons of equal methods that call any measure of flatness of any method different.

    The measures are log-normal, as measured ones nearly are, and their logarithms are correlated.
    """
    for methods, correlation in ((1, 0.0), (1, 0.5), (1, 0.9), (3, 0.9)):
        for n in seeds:
            rng = np.random.default_rng([methods, round(10 * correlation), n])
            own = rng.standard_normal((comparisons, len(FLATNESS), 1 + methods, n))
            common = rng.standard_normal((comparisons, 1, 1 + methods, n))
            numbers = np.exp(0.2 * (correlation**0.5 * common + (1 - correlation) ** 0.5 * own))
            found = sum(map(flatness_differs, numbers))
            yield {
                **{"seeds": n, "methods": methods, "correlation": correlation},
                **{"comparisons": comparisons, "different": found},
            }


def compare_same_reports(runs: Sequence[Mapping[str, float]], seeds: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Compare a method with itself by all that a report shows: test metric, gap, flatness, and any of them."""
    names = ["test", "gap", *FLATNESS]
    values = np.array([[run[name] for name in names] for run in runs])

    def claims(block: Numbers) -> Iterator[tuple[bool, ...]]:
        for start in range(0, len(block) - 2 * seeds + 1, 2 * seeds):
            test, gap, *flatness = block[start : start + 2 * seeds].T.reshape(len(names), 2, seeds)
            found = different(test), different(gap), flatness_differs(np.array(flatness))
            yield *found, any(found)

    found = _by_block(values, claims, rounds)
    shown = ("test accuracy", "generalization gap", "flatness, any measure", "any of these")
    for name, shares in zip(shown, np.transpose(found["shares"]).tolist(), strict=True):
        yield {"shown": name, "seeds": seeds, **found, "shares": shares}


def simulate_same(seeds: Sequence[int], methods: Sequence[int], comparisons: int) -> Iterator[dict[str, Any]]:
    """Yield the number of comparisons of equal methods that call any of them different, for each shape and size."""
    for i, (shape, draw) in enumerate(SHAPES.items()):
        for m in methods if shape == "normal" else methods[:1]:
            for n in seeds:
                rng = np.random.default_rng([i, n, m])
                found = sum(different(numbers) for numbers in draw(rng, (comparisons, 1 + m, n)))
                yield {"shape": shape, "seeds": n, "methods": m, "comparisons": comparisons, "different": found}


def simulate_unequal_shapes(seeds: Sequence[int], comparisons: int) -> Iterator[dict[str, Any]]:
    """Yield the same for methods of equal mean, of which one is normal and the other skewed."""
    for n in seeds:
        rng = np.random.default_rng(n)
        numbers = 0.1 * rng.standard_normal((comparisons, 2, n))
        numbers[:, 1] = 1 - rng.exponential(size=(comparisons, n))
        found = sum(map(different, numbers))
        yield {"seeds": n, "methods": 1, "comparisons": comparisons, "different": found}


def simulate_power(comparisons: int, share: float = 0.8) -> Iterator[dict[str, Any]]:
    """Yield the share of differences that are found with as many seeds as `seeds_needed` names."""
    for effect in EFFECTS:
        seeds = seeds_needed(effect, share)
        assert seeds is not None
        differences = np.random.default_rng(0).normal(effect, 1, (comparisons, seeds))
        signs = [decide([[(value, 0.0) for value in each]])[0].sign for each in differences.tolist()]
        yield {"effect": effect, "seeds": seeds, "comparisons": comparisons, "found": signs.count(1)}


def compare_same(values: Sequence[float], seeds: int, methods: int, rounds: int) -> dict[str, Any]:
    """Compare a method with itself, on disjoint groups of its runs, grouped anew in each round."""
    needed = seeds * (1 + methods)

    def called(block: Numbers) -> Iterator[bool]:
        for start in range(0, len(block) - needed + 1, needed):
            yield different(block[start : start + needed].reshape(1 + methods, seeds))

    return {"seeds": seeds, "methods": methods, **_by_block(np.array(values), called, rounds)}


def compare_different(ours: Sequence[float], theirs: Sequence[float], seeds: int, rounds: int) -> dict[str, Any]:
    """Return the share of comparisons that find the difference of two methods, and that of `power`."""
    pairs = np.array([ours, theirs]).T
    over_all = estimate((pairs[:, 0] - pairs[:, 1]).tolist())
    effect = over_all.mean / (over_all.sd or 1.0)

    def called(block: Numbers) -> Iterator[bool]:
        for start in range(0, len(block) - seeds + 1, seeds):
            yield different(block[start : start + seeds].T[::-1])

    found = _by_block(pairs, called, rounds)
    return {"seeds": seeds, "effect": effect, "expected": power(effect, seeds), **found}


def _by_block(
    values: Numbers, called: Callable[[Numbers], Iterator[bool] | Iterator[tuple[bool, ...]]], rounds: int
) -> dict[str, Any]:
    """Return the share of comparisons that call methods different, or of each claim, in each block of runs."""
    rng, shares, comparisons = np.random.default_rng(0), list[Any](), 0
    for block in np.array_split(values, BLOCKS):
        answers = [answer for _ in range(rounds) for answer in called(rng.permutation(block))]
        comparisons += len(answers)
        shares.append(np.mean(answers, axis=0).tolist())
    return {"comparisons": comparisons, "disjoint": comparisons // rounds, "shares": shares}
