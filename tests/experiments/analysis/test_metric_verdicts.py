import json
import math

import pytest

from steppe.experiments.analysis.metric_verdicts import (
    AVERAGED,
    EQUAL_COMPUTE,
    EQUAL_STEPS,
    BySeed,
    MetricVerdict,
    judge,
)
from steppe.experiments.config.task_info import MetricInfo

ACCURACY = MetricInfo("accuracy", unit="%")
ERROR = MetricInfo("error", higher_is_better=False)
LABELS = {"sam": "SAM", "sgd": "SGD", "asam": "ASAM"}
BASE = (84.0, 85.03, 84.5, 83.97)
UNCLEAR = (0.5, -0.31, 0.42, -0.66)


def better_by(gain: float, base: tuple[float, ...] = BASE) -> BySeed:
    """By nearly the same in each seed."""
    return {seed: (value + gain + 0.1 * (-1) ** seed, value) for seed, value in enumerate(base)}


def unclear() -> BySeed:
    return {seed: (value + change, value) for seed, (value, change) in enumerate(zip(BASE, UNCLEAR, strict=True))}


def one(verdicts: list[MetricVerdict]) -> MetricVerdict:
    (verdict,) = verdicts
    return verdict


@pytest.mark.parametrize(
    ("metric", "gain", "word"),
    [(ACCURACY, 1.0, "better"), (ACCURACY, -1.0, "worse"), (ERROR, 1.0, "worse"), (ERROR, -1.0, "better")],
)
def test_direction_of_the_metric_decides_what_is_better(metric: MetricInfo, gain: float, word: str) -> None:
    assert one(judge(metric, "sgd", {EQUAL_COMPUTE: {"sam": better_by(gain)}})).word == word


def test_verdict_names_its_controls() -> None:
    same = {EQUAL_COMPUTE: {"sam": better_by(1.0)}, EQUAL_STEPS: {"sam": better_by(2.0)}, AVERAGED: {"sam": unclear()}}
    verdict = one(judge(ACCURACY, "sgd", same))
    assert [comparison.word for comparison in verdict.comparisons] == ["better", "better", "not distinguishable"]
    assert verdict.sentence(LABELS) == (
        "SAM is better than SGD at equal compute (test accuracy +1.00 points [+0.82, +1.18], 4 seeds) and at equal "
        "steps (+2.00 points [+1.82, +2.18]), but not distinguishable from SGD with averaged weights (-0.01 points "
        "[-0.91, +0.89])."
    )
    assert verdict.control(AVERAGED) == verdict.comparisons[2]


def test_controls_of_a_method_that_does_not_differ_are_described_without_a_verdict() -> None:
    verdict = one(judge(ACCURACY, "sgd", {EQUAL_COMPUTE: {"sam": unclear()}, EQUAL_STEPS: {"sam": better_by(2.0)}}))
    assert [comparison.word for comparison in verdict.comparisons] == ["not distinguishable", ""]
    assert verdict.sentence(LABELS).endswith("; without a verdict, at equal steps (+2.00 points [+1.82, +2.18]).")


def test_controls_with_the_same_verdict_are_named_together() -> None:
    numbers = {EQUAL_COMPUTE: {"sam": better_by(1.0)}, EQUAL_STEPS: {"sam": unclear()}, AVERAGED: {"sam": unclear()}}
    sentence = one(judge(ACCURACY, "sgd", numbers)).sentence(LABELS)
    assert sentence.count("but not distinguishable from SGD at equal steps (") == 1
    assert sentence.count(") and with averaged weights (") == 1


def test_control_can_be_the_opposite() -> None:
    numbers = {EQUAL_COMPUTE: {"sam": better_by(1.0)}, AVERAGED: {"sam": better_by(-1.0)}}
    assert "), but worse than SGD with averaged weights (-1.00" in one(judge(ACCURACY, "sgd", numbers)).sentence(LABELS)


def test_several_methods_are_corrected() -> None:
    # alone, this difference is found
    gains = {0: 1.0, 1: 0.6, 2: 0.4, 3: 0.3}
    small = {seed: (value + gains[seed], value) for seed, value in enumerate(BASE)}
    assert one(judge(ACCURACY, "sgd", {EQUAL_COMPUTE: {"sam": small}})).word == "better"
    among = judge(ACCURACY, "sgd", {EQUAL_COMPUTE: {"sam": small, "asam": unclear(), "gsam": unclear()}})
    assert [verdict.word for verdict in among] == ["not distinguishable"] * 3
    assert ", 4 seeds, corrected for 3 comparisons)" in among[0].sentence(LABELS)


def test_one_seed_gives_no_verdict() -> None:
    verdict = one(judge(ACCURACY, "sgd", {EQUAL_COMPUTE: {"sam": {0: (85.0, 84.0)}}}))
    assert verdict.word == "no verdict"
    assert verdict.sentence(LABELS) == (
        "No verdict on SAM against SGD at equal compute (test accuracy +1.00 points, 1 seed): one seed has no spread, "
        "and chance alone may explain the difference."
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_gives_no_verdict(bad: float) -> None:
    for pair in ((bad, 84.0), (84.0, bad)):
        lost = {**better_by(1.0), 4: pair}
        verdict = one(judge(ACCURACY, "sgd", {EQUAL_COMPUTE: {"sam": lost}}))
        assert verdict.word == "no verdict"
        assert verdict.sentence(LABELS).endswith(": in 1 of 5 pairs of runs a number is not finite.")
    only = one(judge(ACCURACY, "sgd", {EQUAL_COMPUTE: {"sam": {0: (bad, 84.0)}}}))
    assert only.word == "no verdict"


def test_method_without_seeds_is_left_out() -> None:
    numbers = {EQUAL_COMPUTE: {"sam": better_by(1.0), "asam": {}}, EQUAL_STEPS: {"asam": better_by(1.0), "sam": {}}}
    verdict = one(judge(ACCURACY, "sgd", numbers))
    assert (verdict.method, len(verdict.comparisons)) == ("sam", 1)
    assert judge(ACCURACY, "sgd", {}) == []


def test_json_has_the_words_and_the_intervals() -> None:
    values = one(judge(ACCURACY, "sgd", {EQUAL_COMPUTE: {"sam": better_by(1.0)}, AVERAGED: {"sam": unclear()}})).json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    first, second = values["comparisons"]
    assert (first["control"], first["verdict"], second["verdict"]) == ("equal_compute", "better", "not distinguishable")
    low, high = first["difference"]["interval_95"]
    assert (low + high) / 2 == pytest.approx(first["difference"]["mean"]) == pytest.approx(1.0)
