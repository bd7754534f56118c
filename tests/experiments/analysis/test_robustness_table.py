import io
import json

import pytest
from rich.console import Console
from tiny import recipe

from steppe.experiments.analysis.robustness import TITLE, Robustness, robustness_of
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results

NOISE, MEAN, ERROR, FOUR = (
    *("test_accuracy under gaussian_noise", "test_accuracy under corruptions"),
    *("test_calibration error", "test_accuracy at 4 bits"),
)


def results(**by_method: list[tuple[float, float, float, float] | None]) -> Results:
    """Runs of four epochs that end with these measures, by method and seed; None where they were not made."""
    comparison = recipe(methods=tuple(by_method), seeds=len(next(iter(by_method.values()))))
    found = {}
    for run in comparison.runs():
        usual = {"train_loss": 0.1, "train_accuracy": 99.0, "test_loss": 0.5, "test_accuracy": 80.0, "gap": 19.0}
        values = by_method[str(run.method)][run.seed]
        robust = {} if values is None else dict(zip((NOISE, MEAN, ERROR, FOUR), values, strict=True))
        found[run] = [
            Record(2, 2.0, 10, 144, 1.0, usual, 1.0, 72.0),
            Record(4, 4.0, 20, 288, 1.0, usual | robust, 2.0, 72.0),
        ]
    return found


@pytest.fixture(scope="module")
def robust() -> Robustness:
    found = results(
        sgd=[(70.0, 60.0, 9.0, 40.0), (71.0, 61.0, 9.2, 50.0), (70.5, 60.4, 9.1, 30.0)],
        sam=[(75.0, 64.1, 5.0, 41.0), (76.1, 65.0, 5.3, 49.0), (75.4, 64.6, 5.1, 33.0)],
    )
    made = robustness_of(next(iter(found)).recipe, found)
    assert made is not None
    return made


def test_the_table_has_means_and_deviations_of_each_method(robust: Robustness) -> None:
    assert robust.table().markdown() == [
        "| method | all corrupted | gaussian noise | calibration error | 4-bit weights |",
        "|---|---:|---:|---:|---:|",
        "| SGD | 60.47±0.50 | 70.50±0.50 | 9.10±0.10 | 40.00±10.00 |",
        "| SAM | 64.57±0.45 | 75.50±0.56 | 5.13±0.15 | 41.00±8.00 |",
    ]


def test_verdicts_are_paired_and_less_calibration_error_is_better(robust: Robustness) -> None:
    assert {name: [v.word for v in verdicts] for name, verdicts in robust.verdicts.items()} == {
        "accuracy under corruptions": ["better"],
        "accuracy under gaussian_noise": ["better"],
        "calibration error": ["better"],
        "accuracy at 4 bits": ["not distinguishable"],
    }


def test_the_main_measures_have_sentences(robust: Robustness) -> None:
    corruptions, error, bits, units = robust.notes()
    assert corruptions.startswith(
        "SAM is better than SGD at equal compute (test accuracy under corruptions +4.10 points"
    )
    assert error.startswith("SAM is better than SGD at equal compute (test calibration error -3.97 points")
    assert bits.startswith("SAM is not distinguishable from SGD at equal compute (test accuracy at 4 bits +1.00")
    assert "percent" in units


def test_json_holds_every_verdict(robust: Robustness) -> None:
    values = json.loads(json.dumps(robust.json()))
    assert [verdict["metric"]["name"] for verdict in values] == list(robust.verdicts)
    assert [verdict["method"] for verdict in values] == ["sam"] * 4


def test_a_narrow_console_shows_the_main_measures(robust: Robustness) -> None:
    text = io.StringIO()
    robust.show(Console(file=text, width=48))
    assert "calibration" in text.getvalue()
    assert "gaussian" not in text.getvalue()
    assert TITLE.split()[0] in text.getvalue()
    assert TITLE in robust.markdown()


def test_runs_without_measures_are_left_out_of_pairs() -> None:
    found = results(
        sgd=[(70.0, 60.0, 9.0, 40.0), None, (70.5, 60.4, 9.1, 30.0)],
        sam=[(75.0, 64.1, 5.0, 41.0), (76.1, 65.0, 5.3, 49.0), None],
    )
    made = robustness_of(next(iter(found)).recipe, found)
    assert made is not None
    assert made.values["sam"]["accuracy under gaussian_noise"].n == 2
    ((verdict,), *_) = made.verdicts.values()
    assert verdict.word == "no verdict"


def test_methods_are_compared_with_the_first_one_only_if_it_was_measured() -> None:
    found = results(sgd=[None], sam=[(75.0, 64.1, 5.0, 41.0)])
    made = robustness_of(next(iter(found)).recipe, found)
    assert made is not None
    assert [row[0] for row in made.table().sections[""]] == ["SAM"]
    assert not made.verdicts


def test_a_comparison_without_measures_has_no_table() -> None:
    found = results(sgd=[None], sam=[None])
    assert robustness_of(next(iter(found)).recipe, found) is None


def with_controls(of: Recipe) -> Results:
    """Runs in which the first method has been measured after as many steps, and with averaged weights."""
    found: dict[Run, list[Record]] = {}
    for run in of.runs():
        small = 0.1 * run.seed
        usual = {"train_loss": 0.1, "train_accuracy": 99.0, "test_loss": 0.5, "test_accuracy": 80.0, "gap": 19.0}
        if str(run.method) == "sam":
            measures = [{}, {MEAN: 64.0 + 2 * small}]
        elif run.method.share == 1:
            prefix = {MEAN: 62.0 + small} if of.training.is_constant else {}
            measures = [prefix, {MEAN: 60.0 + small, f"{MEAN} (ema)": 66.0 + small}]
        else:
            measures = [{MEAN: 63.0 + small}]
        found[run] = [
            Record(2 * i, 2.0 * i, 10, 144, 1.0, usual | extra, 1.0, 72.0) for i, extra in enumerate(measures, 1)
        ]
    return found


@pytest.mark.parametrize(("schedule", "at_equal_steps"), [("constant", 2.1), ("cosine", 1.1)])
def test_controls_are_beside_the_verdicts(schedule: str, at_equal_steps: float) -> None:
    of = recipe(methods=("sgd", "sam"), seeds=3, schedule=schedule)
    made = robustness_of(of, with_controls(of))
    assert made is not None
    (verdict,) = made.verdicts["accuracy under corruptions"]
    found = {each.control.name: each.difference.mean for each in verdict.comparisons}
    assert found == pytest.approx({"equal_compute": 4.1, "equal_steps": at_equal_steps, "averaged_weights": -1.9})
    assert [each.word for each in verdict.comparisons] == ["better", "better", "worse"]
    assert "but worse than SGD with averaged weights (-1.90 points" in verdict.sentence({"sam": "SAM", "sgd": "SGD"})


def test_control_runs_have_no_rows_of_their_own() -> None:
    of = recipe(methods=("sgd", "sam"), seeds=1, schedule="cosine", epochs=2)
    (sgd, sam, half) = of.runs()
    usual = {"train_loss": 0.1, "train_accuracy": 99.0, "test_loss": 0.5, "test_accuracy": 80.0, "gap": 19.0}
    record = Record(2, 1.0, 10, 144, 1.0, usual | {MEAN: 60.0}, 1.0, 72.0)
    made = robustness_of(of, {run: [record] for run in (sgd, sam, half)})
    assert made is not None
    assert [row[0] for row in made.table().sections[""]] == ["SGD", "SAM"]
