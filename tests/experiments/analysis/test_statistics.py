import pytest
import scipy.stats

from steppe.experiments.analysis.statistics import estimate, t_quantile


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
