from tiny import recipe

from steppe.experiments.analysis.forgetting import forgetting_of
from steppe.experiments.analysis.summary import setting, summarize
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results


def comparison() -> Recipe:
    return recipe(seeds=3, then="inverted", then_epochs=2)


def record(before: float, after: float, second: float) -> Record:
    measures = {"test_accuracy": before, "test_accuracy after the second task": after, "train_accuracy": 90.0}
    measures |= {"test_accuracy forgotten": before - after, "test_accuracy on the second task": second}
    measures |= {"train_loss": 1.0, "test_loss": 1.0, "gap": 1.0}
    return Record(4, 4, 20, 288, 1.0, measures, 1.0, 100.0)


def results() -> Results:
    after = {"sgd": (40.0, 41.0, 42.0), "sam": (50.0, 51.5, 52.0)}
    return {run: [record(80.0, after[str(run.method)][run.seed], 70.0 + run.seed)] for run in comparison().runs()}


def test_verdicts_say_which_method_forgets_less() -> None:
    found = forgetting_of(comparison(), results())
    assert found is not None
    words = {verdict.metric.name: verdict.word for verdict in found.verdicts}
    assert words["accuracy after the second task"] == words["accuracy forgotten"] == "better"
    assert words["accuracy on the second task"] == "not distinguishable"
    assert found.table().sections[""][1] == ["SAM", "80.00±0.00", "51.17±1.04", "28.83±1.04", "71.00±1.00"]


def test_summary_has_forgetting_in_all_its_forms() -> None:
    summary = summarize(comparison(), results())
    assert "| SGD | 80.00±0.00 | 41.00±1.00 |" in summary.markdown()
    assert "same images, black and white exchanged, on which a copy" in summary.markdown()
    assert [verdict["verdict"] for verdict in summary.json()["forgetting"]][:2] == ["better", "better"]
    assert setting(comparison()).endswith(", then the same images, black and white exchanged")


def test_comparison_without_a_second_task_has_no_forgetting() -> None:
    plain = {run: [Record(4, 4, 20, 288, 1.0, {"test_accuracy": 1.0}, 1.0, 1.0)] for run in comparison().runs()}
    assert forgetting_of(recipe(), plain) is None
