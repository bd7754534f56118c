import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats

from steppe.experiments.analysis.statistics import decide, estimate, power, seeds_needed, t_quantile
from steppe.experiments.config.task_info import MetricInfo


@pytest.mark.parametrize("df", [*range(1, 31), 31, 40, 60, 100, 1000, 10**6])
def test_quantiles_are_students(df: int) -> None:
    assert t_quantile(df) == pytest.approx(scipy.stats.t.ppf(0.975, df), abs=1e-4)


def test_no_quantile_without_spread() -> None:
    with pytest.raises(ValueError, match="one run has no spread"):
        t_quantile(0)


def test_an_interval_is_scipys() -> None:
    values = [0.3, 1.1, -0.2, 0.9]
    ours = estimate(values)
    low, high = scipy.stats.t.interval(0.95, 3, loc=ours.mean, scale=scipy.stats.sem(values))
    assert ours.half_width is not None
    assert (ours.mean - ours.half_width, ours.mean + ours.half_width) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "sign"), [([1.0, 1.1, 0.9], 1), ([-1.0, -1.1, -0.9], -1), ([1.0, -1.0, 0.5], 0), ([1.0], None)]
)
def test_sign_is_what_the_interval_allows_to_say(values: list[float], sign: int | None) -> None:
    assert estimate(values).sign == sign


def test_values_that_are_not_finite_have_no_sign() -> None:
    for values in ([1.0, math.nan], [1.0, math.inf, 2.0], [math.nan], [-math.inf, -math.inf]):
        assert estimate(values).sign is None


def pairs_of(differences: Sequence[float]) -> list[tuple[float, float]]:
    return [(100 + difference, 100.0) for difference in differences]


CLEAR, SMALL, NONE = (1.0, 1.13, 0.91, 1.07), (1.0, 0.61, 0.43, 0.317), (0.523, -0.31, 0.427, -0.666)


def test_a_decision_on_one_method_is_the_paired_t_test() -> None:
    (decision,) = decide([pairs_of(SMALL)])
    test = scipy.stats.ttest_1samp(SMALL, 0)
    # but for the resolution, 0.113, which is a part of the error
    assert decision.p is not None
    assert test.pvalue < decision.p < 1.2 * test.pvalue
    (fine,) = decide([pairs_of([*SMALL, 0.3171])])
    assert fine.p == pytest.approx(scipy.stats.ttest_1samp([*SMALL, 0.3171], 0).pvalue, rel=1e-3)
    interval = scipy.stats.ttest_1samp([*SMALL, 0.3171], 0).confidence_interval()
    assert fine.interval == pytest.approx((interval.low, interval.high), rel=1e-3)


def test_several_methods_are_corrected_by_holm() -> None:
    fine = [0.0, 1e-5]  # makes the resolution negligible
    several = decide([pairs_of(NONE), pairs_of(CLEAR), pairs_of(SMALL), pairs_of(fine)])
    # of p-values in ascending order, the first is multiplied by the number of methods, the next by one less
    raw = [scipy.stats.ttest_1samp(each, 0).pvalue for each in (CLEAR, SMALL, fine, NONE)]
    expected = list(itertools.accumulate((min(1.0, p * (4 - i)) for i, p in enumerate(sorted(raw))), max))
    assert sorted(d.p or 0.0 for d in several) == pytest.approx(expected, rel=1e-3)
    assert [d.comparisons for d in several] == [4] * 4


def test_intervals_of_several_methods_hold_at_once() -> None:
    (alone,), several = decide([pairs_of(CLEAR)]), decide([pairs_of(CLEAR)] * 3)
    assert alone.half_width is not None
    ratio = scipy.stats.t.ppf(1 - 0.05 / 6, 3) / scipy.stats.t.ppf(0.975, 3)
    assert [each.half_width for each in several] == pytest.approx([alone.half_width * ratio] * 3)


def test_an_interval_ends_at_zero_where_only_holm_finds_the_difference() -> None:
    clear = pairs_of(CLEAR)
    barely = pairs_of(SMALL)
    found = decide([clear, barely])[1]
    assert found.half_width is not None
    assert found.interval is not None
    assert found.sign == 1
    assert found.mean - found.half_width < 0
    assert found.interval == (0.0, found.mean + found.half_width)
    down = decide([clear, [(b, a) for a, b in barely]])[1]
    assert (down.sign, down.interval) == (-1, pytest.approx((-found.interval[1], 0.0)))


def test_equal_differences_of_coarse_numbers_are_not_certain() -> None:
    # accuracies on thirty samples; without the resolution the spread would be 0, and anything certain
    (coarse,) = decide([[(90.0, 86.667), (93.333, 90.0)]])
    assert (coarse.sd, coarse.sign) == (pytest.approx(0.0, abs=1e-3), 0)
    (many,) = decide([[(90.0 + i, 86.667 + i) for i in (0.0, 3.333, 3.333, 6.667, 0.0, 3.333)]])
    assert many.sign == 1


def test_equal_numbers_are_not_different() -> None:
    (equal,) = decide([[(84.0, 84.0)] * 3])
    assert (equal.sign, equal.interval, equal.p) == (0, (0.0, 0.0), 1.0)
    (nearly,) = decide([[(0.1 + 0.2, 0.3)] * 3])
    assert nearly.sign == 0


def test_one_pair_and_lost_pairs_have_no_decision_and_do_not_count_as_methods() -> None:
    single, lost, clear = decide([[(85.0, 84.0)], [*pairs_of(CLEAR), (math.nan, 84.0)], pairs_of(CLEAR)])
    assert (single.sign, single.half_width, single.interval) == (None, None, None)
    assert (lost.sign, lost.lost, lost.n) == (None, 1, 4)
    assert (clear.sign, clear.comparisons) == (1, 1)
    assert decide([]) == []


@pytest.mark.parametrize(("effect", "seeds", "comparisons"), [(1.0, 10, 1), (2.0, 4, 3), (0.5, 40, 1)])
def test_power_is_the_share_of_simulated_tests(effect: float, seeds: int, comparisons: int) -> None:
    values = np.random.default_rng(0).normal(effect, 1, (20_000, seeds))
    p = scipy.stats.ttest_1samp(values, 0, axis=1).pvalue
    assert power(effect, seeds, comparisons) == pytest.approx((p < 0.05 / comparisons).mean(), abs=0.015)
    assert power(-effect, seeds) == power(effect, seeds)


def test_power_of_very_large_effects_is_one() -> None:
    assert power(1e6, 5) == pytest.approx(1.0)
    assert seeds_needed(1e6) == 2


def test_seeds_needed_is_the_smallest_number() -> None:
    seeds = seeds_needed(0.8, share=0.9)
    assert seeds is not None
    assert power(0.8, seeds - 1) < 0.9 <= power(0.8, seeds)
    assert seeds_needed(0.8, share=0.9, most=seeds - 1) is None


def test_estimate_of_infinite_values_is_not_finite_and_does_not_raise() -> None:
    assert math.isnan(estimate([math.inf, -math.inf]).mean)
    assert estimate([math.inf, 1.0]).mean == math.inf
    assert math.isnan(estimate([math.nan, 1.0]).mean)


def test_what_only_rounding_separates_is_equal() -> None:
    third = 1 / 3
    pairs = [(0.9, 0.8999999762), (third * 3e3, 1e3 + 1e-10), (0.1 + 0.2, 0.3)]
    (decision,) = decide([pairs])
    assert (decision.mean, decision.sd, decision.sign) == (0.0, 0.0, 0)
    assert estimate([0.3, -0.1, -0.2]).mean == 0.0
    assert estimate([0.9, 0.8999999762]).sd == 0.0
    (clear,) = decide([[(1e-9, 2e-9), (1.1e-9, 2.2e-9), (1.2e-9, 2.1e-9)]])
    assert clear.mean == pytest.approx(-1e-9)


@pytest.mark.parametrize("better", [True, False])
def test_gap_between_numbers_that_only_rounding_separates_is_zero(better: bool) -> None:
    metric = MetricInfo("accuracy", higher_is_better=better)
    assert f"{metric.advantage(0.56, 0.5600000024):{metric.form}}" == "0"
    assert metric.advantage(2.0, 1.5) == (0.5 if better else -0.5)
    assert math.isnan(metric.advantage(math.inf, math.inf))
    assert math.isinf(metric.advantage(1.0, math.inf))
