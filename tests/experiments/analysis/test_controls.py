"""The controls beside a comparison: which number of the base each of them reads."""

from collections.abc import Sequence

import pytest
from tiny import recipe

from steppe.experiments.analysis import controls
from steppe.experiments.analysis.metric_verdicts import CONTROLS
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.storage.records import Record

SEEDS = 3
NAN = float("nan")


def record(epoch: int, test: float, **measures: float) -> Record:
    named = {name.replace("__", " "): value for name, value in measures.items()}
    usual = {"train_loss": 1.0, "test_loss": 1.0, "train_accuracy": 90.0, "gap": 1.0, "test_accuracy": test}
    return Record(epoch, epoch, 10 * epoch, 100.0 * epoch, 1.0, usual | named, 2.0 * epoch, 50.0)


def results(of: Recipe, base: Sequence[Record], other: Sequence[Record]) -> dict[Run, list[Record]]:
    """The same measurements for every seed, a little apart."""
    reference = of.comparison.methods[0]
    found = {}
    for run in of.runs():
        given = base if run.method == reference else other
        apart = {"sgd": 0.01, "sam": 0.03}[run.method.name] * run.seed
        found[run] = [Record(**{**vars(r), "measures": {k: v + apart for k, v in r.measures.items()}}) for r in given]
    return found


def differences(of: Recipe, base: Sequence[Record], other: Sequence[Record]) -> dict[str, float]:
    (verdict,) = controls.verdicts(of, results(of, base, other))
    return {each.control.name: round(each.difference.mean, 1) for each in verdict.comparisons}


def test_equal_steps_is_the_base_after_as_many_steps_as_sam_made() -> None:
    of = recipe(epochs=4, seeds=SEEDS)
    found = differences(of, [record(2, 70.0), record(4, 60.0)], [record(4, 65.0)])
    assert found == {"equal_compute": 5.0, "equal_steps": -5.0}


def test_with_a_schedule_equal_steps_is_a_run_of_its_own_with_half_of_the_compute() -> None:
    of = recipe(epochs=4, seeds=SEEDS, schedule="cosine")
    found = results(of, [record(2, 70.0), record(4, 60.0)], [record(4, 65.0)])
    for run in found:
        if run.method.share != 1:
            found[run] = [record(2, 64.0 + 0.01 * run.seed)]
    (verdict,) = controls.verdicts(of, found)
    assert [each.control.name for each in verdict.comparisons[:2]] == ["equal_compute", "equal_steps"]
    assert round(verdict.comparisons[1].difference.mean, 1) == 1.0
    assert [run.name for run in of.runs()][:3] == ["sgd-seed0", "sam-seed0", "sgd@0.5-seed0"]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_equal_steps_are_no_control_where_they_are_equal_compute_to_the_nearest_epoch(schedule: str) -> None:
    of = recipe(epochs=1, seeds=SEEDS, schedule=schedule)
    assert "equal_steps" not in differences(of, [record(1, 60.0)], [record(1, 65.0)])
    assert {run.method.share for run in of.runs()} == {1}


def test_best_moment_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    halves = "test_accuracy (half 1)", "test_accuracy (half 2)"
    base = [
        record(2, 70.0, **{halves[0]: 80.0, halves[1]: 60.0}),  # the best by half 1, so 60 counts
        record(4, 60.0, **{halves[0]: 50.0, halves[1]: 70.0}),  # the best by half 2, so 50 counts
    ]
    found = differences(recipe(epochs=4, seeds=SEEDS), base, [record(4, 65.0)])
    assert found["best_held_out"] == 65.0 - 55.0


def test_half_without_a_value_is_no_control() -> None:
    halves = "test_accuracy (half 1)", "test_accuracy (half 2)"
    ends = [record(4, 60.0, **{halves[0]: 50.0, halves[1]: 70.0})]
    undefined = record(2, 70.0, **{halves[0]: NAN, halves[1]: 60.0})
    of = recipe(epochs=4, seeds=SEEDS)
    assert "best_held_out" not in differences(of, [undefined, *ends], [record(4, 65.0)])
    diverged = record(2, NAN, **{halves[0]: NAN, halves[1]: 60.0})
    assert "best_held_out" in differences(of, [diverged, *ends], [record(4, 65.0)])


def test_with_validation_data_the_best_moment_is_chosen_on_them() -> None:
    base = [record(2, 64.0, validation_accuracy=90.0), record(4, 60.0, validation_accuracy=80.0)]
    assert differences(recipe(epochs=4, seeds=SEEDS), base, [record(4, 65.0)])["best_held_out"] == 1.0


def test_averaged_weights_are_read_at_the_end_of_equal_compute() -> None:
    base = [record(2, 64.0), record(4, 60.0, **{"test_accuracy (ema)": 66.0})]
    assert differences(recipe(epochs=4, seeds=SEEDS), base, [record(4, 65.0)])["averaged_weights"] == -1.0


def test_what_was_not_measured_with_the_averaged_weights_of_the_base_is_read_from_the_averaged_base() -> None:
    of = recipe(methods=["sgd", "sam", "sgd+ema"], epochs=4, seeds=SEEDS)
    found = results(of, [record(4, 60.0)], [record(4, 65.0)])
    for run in found:
        if run.method.average:
            found[run] = [record(4, 62.0)]
    judged = {verdict.method: verdict for verdict in controls.verdicts(of, found)}
    differences = {each.control.name: each.difference.mean for each in judged["sam"].comparisons}
    assert round(differences["averaged_weights"], 1) == 3.0
    assert "averaged_weights" not in {each.control.name for each in judged["sgd+ema"].comparisons}


def test_advice_keeps_the_base_where_its_averaged_weights_are_better() -> None:
    of = recipe(epochs=4, seeds=SEEDS)
    base = [record(2, 64.0), record(4, 60.0, **{"test_accuracy (ema)": 66.0})]
    found = results(of, base, [record(4, 65.0)])
    judged = controls.verdicts(of, found)
    assert judged[0].word == "better"
    assert controls.advice(of, found, judged)[0].startswith("Take SGD with averaged weights")


def test_advice_names_the_seeds_whose_averaged_weights_were_not_measured() -> None:
    of = recipe(epochs=4, seeds=SEEDS)
    with_average = record(4, 60.0, **{"test_accuracy (ema)": 66.0})
    found = results(of, [with_average], [record(4, 65.0)])
    missing = "The averaged weights of SGD were not measured for "
    assert not any(missing in line for line in controls.advice(of, found, controls.verdicts(of, found)))
    for run in found:
        if run.method.name == "sgd" and run.seed < 2:
            found[run] = [record(4, 60.0)]
    lines = controls.advice(of, found, controls.verdicts(of, found))
    assert lines[-1].startswith(f"{missing}seeds 0, 1, trained before others were compared with it: add ")
    assert lines[-1].endswith(" add sgd+ema to the methods for that control.")


def test_folder_that_grew_has_the_controls_of_a_new_one_or_names_the_seeds_that_lack_them() -> None:
    of = recipe(methods=["sgd", "sam"], epochs=8, eval_every=4, seeds=SEEDS)
    at_halves = {"test_accuracy (half 1)": 61.0, "test_accuracy (half 2)": 63.0}
    old = [record(4, 62.0, **at_halves), record(8, 60.0, **at_halves)]
    new = [old[0], record(5, 90.0, **dict.fromkeys(at_halves, 90.0)), old[1]]
    found = results(of, old, [record(8, 65.0)])
    alike = differences(of, old, [record(8, 65.0)])
    assert alike["best_held_out"] == differences(of, new, [record(8, 65.0)])["best_held_out"], "one more measurement"
    for run in found:
        if run.method.name == "sgd" and run.seed < 2:
            found[run] = [record(8, 60.0)]
    lines = controls.advice(of, found, controls.verdicts(of, found))
    (line,) = (line for line in lines if "as many steps as" in line and "was not measured" in line)
    assert "SGD was not measured after as many steps as SAM makes for seeds 0, 1, trained before it was" in line


@pytest.mark.parametrize(
    ("loss", "reason"), [(1.0, "test accuracy is not finite where the loss is."), (NAN, "runs ended")]
)
@pytest.mark.parametrize(
    ("methods", "failing", "whose"),
    [
        (("sgd", "sam"), ("sgd", "sam"), "Keep SGD for now: "),
        (("sgd", "sam", "gsam"), ("sam",), "Nothing is said of SAM: "),
    ],
)
def test_advice_blames_the_metric_where_the_loss_is_finite(
    methods: tuple[str, ...], failing: tuple[str, ...], whose: str, loss: float, reason: str
) -> None:
    of = recipe(methods=methods, epochs=4, seeds=SEEDS)
    found = {
        run: [record(4, 0.0, test_loss=loss, test_accuracy=NAN if run.method.name in failing else 65.0)]
        for run in of.runs()
    }
    (line,) = (line for line in controls.advice(of, found, controls.verdicts(of, found)) if whose in line)
    assert line.startswith(whose + reason)


@pytest.mark.parametrize("methods", [("sgd",), ("sam",)])
def test_one_method_has_no_verdict_and_no_advice(methods: tuple[str, ...]) -> None:
    of = recipe(methods=methods, epochs=4)
    found = {run: [record(4, 60.0)] for run in of.runs()}
    assert controls.verdicts(of, found) == []
    assert controls.advice(of, found, []) == []


def test_the_base_is_measured_where_it_has_made_as_many_steps() -> None:
    base, sam = recipe(epochs=10, eval_every=4, seeds=1).runs()
    assert base.grid == [4, 5, 8, 10]
    assert sam.grid == [4, 8, 10]


def test_averaged_base_among_the_methods_is_a_control_at_its_best_moment() -> None:
    of = recipe(methods=("sgd", "sgd+ema", "sam"), epochs=4, seeds=SEEDS)
    halves = "test_accuracy (half 1)", "test_accuracy (half 2)"
    by_method = {
        "sgd": [record(2, 64.0), record(4, 60.0)],
        "sgd+ema": [
            record(2, 71.0, **{halves[0]: 72.0, halves[1]: 70.0}),
            record(4, 66.0, **{halves[0]: 66.0, halves[1]: 66.0}),
        ],
        "sam": [record(4, 75.0)],
    }
    found = {run: by_method[str(run.method)] for run in of.runs()}
    judged = {verdict.method: verdict for verdict in controls.verdicts(of, found)}
    best = judged["sam"].control(CONTROLS["best_averaged"])
    assert best is not None
    assert best.difference.mean == 75.0 - 71.0
    assert judged["sgd+ema"].control(CONTROLS["best_averaged"]) is None
    without = recipe(methods=("sgd", "sam"), epochs=4, seeds=SEEDS)
    (verdict,) = controls.verdicts(without, {run: by_method[str(run.method)] for run in without.runs()})
    assert verdict.control(CONTROLS["best_averaged"]) is None
