from collections.abc import Sequence

import pytest

from steppe.experiments.analysis.advice import Candidate, advise
from steppe.experiments.analysis.metric_verdicts import (
    AVERAGED,
    BEST_HELD_OUT,
    EQUAL_COMPUTE,
    EQUAL_STEPS,
    BySeed,
    Control,
    judge,
)
from steppe.experiments.config.task_info import MetricInfo

ACCURACY = MetricInfo("accuracy", unit="%")
BASE = (84.0, 85.03, 84.5, 83.97)
NOISE = (0.5, -0.31, 0.42, -0.66)

CANDIDATES = {
    "sgd": Candidate("SGD", "sgd", 1.0, 10.0),
    "sam": Candidate("SAM", "sam", 2.0, 10.5, 0.05),
    "sam:rho=0.1": Candidate("SAM (rho 0.1)", "sam", 2.0, 10.5, 0.1),
    "sam:rho=0.2": Candidate("SAM (rho 0.2)", "sam", 2.0, 10.5, 0.2),
    "late_sam": Candidate("Late SAM", "late_sam", 1.25, 10.2, 0.05),
    "looksam": Candidate("LookSAM", "looksam", 1.2, 10.2, 0.05),
    "saf": Candidate("SAF", "saf", 1.0, 10.0),
    "arwp": Candidate("ARWP", "arwp", 1.0, 10.0, 0.01),
}


def by(gain: float, noise: float = 0.1, seeds: int = 4) -> BySeed:
    values = list(enumerate(zip(BASE, NOISE, strict=True)))[:seeds]
    return {seed: (value + gain + noise * change, value) for seed, (value, change) in values}


def advice(*, controls: dict[Control, float] | None = None, **gains: float | BySeed) -> list[str]:
    """The advice for methods by their gains; of SAM at rho 0.1 and 0.2 by `sam_1` and `sam_2`."""
    names = {"sam_1": "sam:rho=0.1", "sam_2": "sam:rho=0.2"}
    numbers = {names.get(name, name): by(gain) if isinstance(gain, float) else gain for name, gain in gains.items()}
    every = {EQUAL_COMPUTE: numbers} | {c: dict.fromkeys(numbers, by(gain)) for c, gain in (controls or {}).items()}
    return advise(judge(ACCURACY, "sgd", every), {name: CANDIDATES[name] for name in ("sgd", *numbers)})


def has(lines: Sequence[str], *beginnings: str) -> bool:
    return all(any(line.startswith(beginning) for line in lines) for beginning in beginnings)


def test_the_best_method_is_taken_and_its_price_and_certainty_are_stated() -> None:
    lines = advice(sam=0.5, sam_1=1.0, sam_2=0.4, controls={EQUAL_STEPS: 0.9})
    assert lines == [
        "Take SAM (rho 0.1): better than SGD at equal compute and at equal steps, in test accuracy by +1.00 points "
        "[+0.86, +1.14].",
        "A step of SAM (rho 0.1) makes 2.00 passes, one of SGD 1.00; at equal compute it trained 1.05 times as long.",
        "How sure: methods that do not differ are called different in at most 5 % of comparisons, over all 3 methods; "
        "this is one of 4 seeds.",
        "If the price of a step matters, compare with sgd+ema (averaged weights), saf (for classes; with lmbda=9.6 if "
        "labels may be wrong) and arwp:rho=0.04 (if labels may be wrong): no second pass is needed.",
    ]


def test_the_cheapest_of_the_best_is_taken() -> None:
    near = advice(sam=1.0, looksam=0.99)
    assert near[0].startswith("Take LookSAM:")
    assert not has(near, "If the price")
    averaged = advice(sam=1.0, controls={AVERAGED: 0.5})
    assert has(averaged, "If the price of a step matters, compare with saf (for classes;")
    assert has(advice(sam=1.0, saf=-1.0, controls={AVERAGED: 0.5}), "If the price of a step matters, compare with arwp")
    every = advice(sam=1.0, saf=-1.0, arwp=-1.0, controls={AVERAGED: 0.5})
    assert not has(every, "If the price"), "all were compared"
    assert advice(sam=1.5, looksam=1.0)[0].startswith("Take SAM:")


@pytest.mark.parametrize(
    ("control", "beginning"),
    [
        (EQUAL_STEPS, "After as many steps, SGD is"),
        (BEST_HELD_OUT, "At its best held-out measurement, SGD is"),
        (AVERAGED, "With averaged weights, SGD is"),
    ],
)
def test_a_control_that_does_as_well_is_named(control: Control, beginning: str) -> None:
    assert has(advice(sam=1.0, controls={control: 0.0}), "Take SAM:", f"{beginning} not distinguishable from SAM: ")
    assert not has(advice(sam=1.0, controls={control: 1.0}), beginning)
    opposite = advice(sam=1.0, controls={control: -1.0})
    assert has(opposite, f"Take SGD {control.phrase}: against it, SAM has -1.00 points", f"{beginning} better than SAM")


def test_the_base_is_kept_where_no_method_is_better() -> None:
    lines = advice(sam=by(0.2, 1.0), looksam=by(-1.0))
    assert lines[0] == "Keep SGD: no method was found to be better with 4 seeds."
    assert lines[1].startswith("SAM is ahead by +0.19 points [")
    assert advice(sam=-1.0)[0] == "Keep SGD: SAM is worse."
    assert advice(sam=-1.0, looksam=-1.0)[0] == "Keep SGD: all other methods are worse."
    assert not has(advice(sam=by(-0.2, 1.0)), "SAM is ahead")


def test_the_seeds_that_would_find_the_observed_difference_are_named() -> None:
    assert "--seeds 10 would find it in four of five comparisons" in advice(sam=by(0.6, 1.0))[1]
    assert "more than 50 seeds are needed" in advice(sam=by(0.1, 1.0))[1]


def test_one_seed_asks_for_more() -> None:
    assert advice(sam=by(1.0, seeds=1))[0] == (
        "Keep SGD for now: one seed cannot tell a difference from chance. Take --seeds 5."
    )
    lost = advice(sam={**by(1.0), 4: (float("nan"), 84.0)})
    assert lost[0].startswith("Keep SGD for now: runs ended with numbers that are not finite. Try a smaller rho")


def test_radii_beyond_the_best_one_are_suggested_at_the_ends_of_those_tried() -> None:
    assert has(
        advice(sam=0.5, sam_1=0.7, sam_2=1.0), "Try a larger radius, sam:rho=0.4: of those tried, the largest is"
    )
    assert has(
        advice(sam=1.0, sam_1=0.7, sam_2=0.5), "Try a smaller radius, sam:rho=0.025: of those tried, the smallest"
    )
    assert has(advice(sam=-1.0), "Try other radii: sam:rho=0.025 sam:rho=0.1, or steppe tune.")
    assert not has(advice(sam=0.5, sam_1=1.0, sam_2=0.7), "Try")


def test_no_methods_need_no_advice() -> None:
    assert advise([], CANDIDATES) == []


def test_the_radii_of_the_base_and_of_failed_runs_count_as_tried() -> None:
    numbers = {"sam:rho=0.1": by(-1.0), "sam:rho=0.2": by(-2.0)}
    of_base = advise(judge(ACCURACY, "sam", {EQUAL_COMPUTE: numbers}), CANDIDATES)
    assert has(of_base, "Try a smaller radius, sam:rho=0.025: of those tried, the smallest")
    better = advise(judge(ACCURACY, "sam", {EQUAL_COMPUTE: {"sam:rho=0.1": by(1.0)}}), CANDIDATES)
    assert not has(better, "Try"), "0.2 is in the folder, too, without a number"
    failed = dict.fromkeys(range(4), (float("nan"), 84.0))
    assert not has(advice(sam=0.5, sam_1=1.0, sam_2=failed), "Try a larger")
    assert has(advice(sam_1=1.0, sam_2=failed), "Try a smaller radius, sam:rho=0.05: of those tried, the smallest")


def test_other_radii_are_suggested_with_the_other_options_of_a_method() -> None:
    candidates = CANDIDATES | {
        "looksam:interval=2": Candidate("LookSAM (interval 2)", "looksam", 1.5, 10.2, 0.05, "interval=2"),
    }
    numbers = {"looksam:interval=2": by(0.5), "looksam": by(1.0)}
    lines = advise(judge(ACCURACY, "sgd", {EQUAL_COMPUTE: numbers}), candidates)
    assert has(
        lines,
        "Try other radii: looksam:rho=0.025,interval=2 looksam:rho=0.1,interval=2, or",
        "Try other radii: looksam:rho=0.025 looksam:rho=0.1, or",
    )


def test_the_averaged_base_is_suggested_with_its_options() -> None:
    candidates = CANDIDATES | {"asam:rho=0.5": Candidate("ASAM (rho 0.5)", "asam", 2.0, 10.0, 0.5)}
    lines = advise(judge(ACCURACY, "asam:rho=0.5", {EQUAL_COMPUTE: {"sam": by(1.0)}}), candidates)
    assert has(lines, "If the price of a step matters, compare with asam+ema:rho=0.5 (averaged weights)")
