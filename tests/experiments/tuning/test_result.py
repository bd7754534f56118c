import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny import recipe
from tuning_results import result, tuning_result

from steppe.experiments.commands import Compare, parse
from steppe.experiments.tuning.options import TuningOptions
from steppe.experiments.tuning.result import TrialResult, TuningResult
from steppe.experiments.tuning.search_space import spaces


def test_best_trial_is_named_with_those_within_one_standard_error() -> None:
    found = tuning_result(
        result(0, 0.0, 80.0, 81.0, 82.0, method="sgd"),
        result(0, 0.05, 84.0, 85.0, 86.0),
        result(1, 0.1, 84.2, 85.2, 86.2),
        result(2, 0.02, 82.0, 83.0, 84.0),
        result(3, 0.5, 60.0, 70.0, 80.0),
    )
    assert [best.result.number for best in found.best] == [0, 1]
    text = "\n".join(found.notes())
    # the standard deviation of a run is 1 point in the better half
    assert "SAM (rho 0.1): 85.20±1.00 %, the best of 4 trials (trial 1)." in text
    assert "2 of 4 trials are within one standard error (0.58 points) of the best: rho 0.05, 0.1." in text
    assert "The optimum is flat" in text
    assert (
        "SAM (rho 0.1) against SGD, on the images it was chosen by: +4.20 points, 95 % interval [+2.11, +6.29]: better."
    ) in text
    assert "corrected for the 4 pairs of trials" in text
    assert not [*found.warnings()]
    assert json.loads(json.dumps(found.json()))["best"][1]["spec"] == "sam:rho=0.1"


def test_differences_of_the_best_trials_are_corrected_for_all_that_could_have_been_chosen() -> None:
    base, sam = result(0, 0.0, 80.0, 81.0, 82.0, method="sgd"), result(0, 0.05, 82.0, 83.4, 83.9)
    alone = "\n".join(tuning_result(base, sam).notes())
    assert "+2.10 points, 95 % interval [+1.27, +2.93]: better." in alone
    assert "corrected" not in alone
    worse = [result(i, 0.05 + i / 100, 60.0, 61.0, 62.0) for i in range(1, 20)]
    among = "\n".join(tuning_result(base, sam, *worse).notes())
    assert "SAM (rho 0.05) against SGD" in among
    assert ": not distinguishable." in among
    assert "corrected for the 20 pairs of trials" in among


@pytest.mark.parametrize(
    ("rho", "warning"),
    [
        (0.98, "the best rho, 0.98, lies at the upper edge of rho=0.01..1, .* --search rho=0.1..10"),
        (0.01, "lies at the lower edge .* --search rho=0.001..0.1"),
        (0.7, None),
    ],
)
def test_best_value_at_an_edge_gives_a_warning(rho: float, warning: str | None) -> None:
    warnings = [*tuning_result(result(0, 0.1, 80.0, 81.0, 82.0), result(1, rho, 84.0, 85.0, 86.0)).warnings()]
    assert bool(warnings) == (warning is not None)
    if warning is not None:
        with pytest.raises(Warning, match=warning):
            raise Warning(warnings[0])


def test_the_range_that_is_suggested_begins_where_the_best_value_lies() -> None:
    found = tuning_result(result(0, 0.1, 80.0, 81.0, 82.0), result(1, 0.2, 84.0, 85.0, 86.0), low=0.05, high=0.2)
    assert next(found.warnings()).endswith(" Search there, in another --out: --search rho=0.1..0.4")


def test_no_range_is_suggested_that_the_method_cannot_take() -> None:
    given = recipe(seeds=3, methods=["sgd", "random_sam"])
    trials = [
        replace(result(number, 0.1, *accuracies, method="random_sam"), values={"p": p})
        for number, (p, accuracies) in enumerate([(0.6, (80.0, 81.0, 82.0)), (0.9, (84.0, 85.0, 86.0))])
    ]
    found = TuningResult(given, TuningOptions(), spaces(given, ["p=0.5..0.9"], baseline=True), Path("t"), trials)
    (warning,) = found.warnings()
    assert warning.endswith("lies at the upper edge of p=0.5..0.9, so a better one may lie beyond.")


def test_single_runs_give_no_verdict() -> None:
    text = "\n".join(tuning_result(result(0, 0.1, 80.0), result(1, 0.2, 84.0), seeds=1).notes())
    assert "take --seeds 3 or more" in text
    assert "within one standard error" not in text


def test_two_seeds_show_their_differences_and_give_no_verdict() -> None:
    worse = [result(i, 0.05 + i / 100, 60.0, 61.0) for i in range(1, 4)]
    found = tuning_result(result(0, 0.0, 80.0, 81.0, method="sgd"), result(0, 0.05, 82.0, 83.5), *worse, seeds=2)
    text = "\n".join(found.notes())
    assert (
        "SAM (rho 0.05) against SGD, on the images it was chosen by: +2.25 points (+2.00 and +2.50), without a "
        "verdict, which takes 3 seeds or more."
    ) in text
    assert "interval" not in text
    assert "corrected" not in text
    assert " --seeds 3 " in f"{next(iter(found.commands()))} "
    (lost,) = tuning_result(
        result(0, 0.0, 80.0, 81.0, method="sgd"), result(0, 0.05, 82.0, float("nan")), seeds=2
    )._differences()
    assert "1 not finite: no verdict" in lost


def test_confirmation_uses_fresh_seeds_and_can_be_parsed() -> None:
    found = tuning_result(result(0, 0.0, 80.0, 81.0, 82.0, method="sgd"), result(0, 0.123, 84.0, 85.0, 86.0))
    (line,) = found.commands()
    verb = parse(line.split()[1:])
    assert isinstance(verb, Compare)
    assert [*map(str, verb.recipe.comparison.methods)] == ["sgd", "sam:rho=0.123"]
    assert (verb.recipe.comparison.first_seed, verb.recipe.comparison.seeds, verb.recipe.model.width) == (3, 3, 2)
    assert verb.recipe.output.out == Path("runs/demo-tune-confirmed")


def test_methods_with_different_options_are_confirmed_separately() -> None:
    given = recipe(seeds=3)
    found = spaces(given, ["lr=0.01,0.1"], baseline=True)
    runs = result(0, 0.1, 80.0, 81.0, 82.0).runs
    results = [
        TrialResult("sgd", 0, {"lr": 0.1}, "complete", runs),
        TrialResult("sam", 0, {"lr": 0.01}, "complete", runs),
    ]
    tuned = TuningResult(given, TuningOptions(), found, Path("runs/x"), results)
    one, two = tuned.commands()
    assert "--methods sgd " in one
    assert "--lr 0.1" in one
    assert "--methods sam " in two
    assert "--lr 0.01" in two
    assert one.split()[-1] != two.split()[-1]
    (limit,) = tuned.limits()
    assert limit.startswith("These 2 comparisons have folders of their own, as the best lr of methods differ, and no")
    assert tuned.markdown().rstrip().endswith(limit)
    assert tuned.json()["limits"] == [limit]
    console = Console(file=io.StringIO(), width=10_000)
    tuned.show(console)
    assert console.file.getvalue().rstrip().endswith(limit)  # type: ignore[attr-defined]
    same = [*results[:1], TrialResult("sam", 0, {"lr": 0.1}, "complete", runs)]
    assert not [*TuningResult(given, TuningOptions(), found, Path("runs/x"), same).limits()]
