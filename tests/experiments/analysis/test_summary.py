import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import image_record, recipe

from steppe.experiments.analysis.summary import summarize
from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.storage.files import write_json_lines
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results, RunFolder


def record(epoch: float, train: float, test: float) -> Record:
    return image_record(
        int(epoch), 1, 10, 100, 1.2, 2 - train / 50, train, 1.0, test, train - test, 60.0 * epoch, 100.0
    )


def results(of: Recipe, tests: dict[str, list[float]]) -> Results:
    """Two measurements of each unit, at half of its compute and at `epochs`, and one at the end of further ones."""

    def records(run: Run) -> list[Record]:
        test = tests[str(run.method)][run.seed]
        points = sorted({2, of.comparison.epochs, run.standardized_epochs})
        return [record(epoch, 90.0 + epoch, test + epoch) for epoch in points]

    return {run: records(run) for run in of.runs()}


def test_rows_differences_and_verdicts() -> None:
    three = recipe(seeds=3)
    summary = summarize(three, results(three, {"sgd": [80.0, 81.0, 82.0], "sam": [81.0, 82.1, 83.1]}))
    assert [(str(row.method), row.standardized_epoch, row.seconds.n) for row in summary.rows] == [
        ("sgd", 4, 3),
        ("sam", 4, 3),
    ]
    assert summary.rows[0].measures["test_accuracy"].mean == pytest.approx(85.0)
    assert summary.rows[0].measures["test_accuracy"].sd == pytest.approx(1.0)
    sentence, *_, certainty = summary.notes()
    # differences 1.0, 1.1, 1.1: mean 1.0667, sd 0.0577, with the resolution 0.1 sqrt(0.0577^2 + 0.1^2 / 6) = 0.0707;
    # 4.3027 * 0.0707 / sqrt(3) = 0.1757
    assert "SAM against SGD at 4 standardized epochs, 3 paired runs" in sentence
    assert "test accuracy +1.07 points, 95 % interval [+0.89, +1.24]: better" in sentence
    assert "generalization gap -1.07 points, 95 % interval [-1.24, -0.89]: better" in sentence
    assert certainty == (
        "By chance alone, a difference in test accuracy is found in at most 5 % of comparisons, and one in the "
        "generalization gap in at most another 5 %."
    )


def test_worse_and_not_distinguishable_are_stated() -> None:
    three = recipe(seeds=3)
    worse = summarize(three, results(three, {"sgd": [81.0, 82.1, 83.1], "sam": [80.0, 81.0, 82.0]}))
    assert next(worse.notes()).count(": worse") == 2
    unclear = summarize(three, results(three, {"sgd": [81.0, 82.0, 83.0], "sam": [83.0, 81.0, 84.0]}))
    assert next(unclear.notes()).count(": not distinguishable") == 2


def test_one_run_gives_no_verdict() -> None:
    summary = summarize(recipe(), results(recipe(), {"sgd": [80.0], "sam": [85.0]}))
    assert next(summary.notes()).count("+5.00 points (one run: no verdict)") == 1
    assert "better" not in summary.markdown()


def test_no_verdict_on_a_gap_between_wrong_labels_and_correct_ones() -> None:
    wrong = recipe(seeds=3, label_noise=0.4)
    summary = summarize(wrong, results(wrong, {"sgd": [80.0, 81.0, 82.0], "sam": [81.0, 82.1, 83.1]}))
    notes = " ".join(summary.notes())
    assert "test accuracy +1.07 points" in notes
    assert notes.count("gap") == 2
    assert "There is no verdict on the gap" in notes
    assert "in at most 5 % of comparisons." in notes
    assert summary.json()["gaps"] == []
    assert "gap, points" in summary.markdown()


def test_further_epochs_are_a_row_and_no_part_of_the_verdict() -> None:
    more = recipe(extra_epochs=2)
    summary = summarize(more, results(more, {"sgd": [80.0], "sam": [81.0]}))
    assert [(str(row.method), row.standardized_epoch) for row in summary.rows] == [("sgd", 4), ("sam", 4), ("sam", 6)]
    assert summary.verdicts[0].first.difference.mean == 1.0
    assert "at 4 standardized epochs" in next(summary.notes())


def test_unfinished_runs_are_named_and_not_paired() -> None:
    two = recipe(seeds=2)
    partial: dict[Run, Any] = dict(results(two, {"sgd": [80.0, 81.0], "sam": [82.0, 83.0]}))
    partial[Run(two, MethodSpec.parse("sam"), 1)] = partial[Run(two, MethodSpec.parse("sam"), 1)][:1]
    summary = summarize(two, partial)
    assert summary.gaps[0].first.difference.n == 1
    assert list(summary.notes())[-1] == (
        "Not finished, and neither in the table nor in the verdicts where it has not come so far: sam-seed1. If its "
        "loss diverged, its method is worse than its other runs show."
    )
    assert summarize(two, {run: [] for run in two.runs()}).rows == []


def test_terminal_markdown_and_json_agree(tmp_path: Path) -> None:
    three = recipe(seeds=3)
    summary = summarize(three, results(three, {"sgd": [80.0, 81.0, 82.0], "sam": [81.0, 82.1, 83.1]}))
    console = Console(width=100, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    summary.show(console)
    console.file.close()
    text, markdown = (tmp_path / "out").read_text(), summary.markdown()
    for cells in summary.table().sections[""]:
        assert all(cell in text and cell in markdown for cell in cells)
    assert "…" not in text  # it fits on a terminal of 100 columns
    summary.write(RunFolder(tmp_path))
    assert (tmp_path / "summary.md").read_text() == markdown
    values = json.loads((tmp_path / "summary.json").read_text())
    assert values["notes"] == [*summary.notes()]
    assert (values["verdicts"][0]["verdict"], values["gaps"][0]["verdict"]) == ("better", "better")
    assert values["rows"][1]["test_accuracy"]["mean"] == summary.rows[1].measures["test_accuracy"].mean


def test_wide_table_fits_and_the_correction_for_several_methods_is_stated(tmp_path: Path) -> None:
    many = recipe(methods=("sgd", "sam", "late_sam:start=0.5,rho=0.1", "looksam"), seeds=3)
    summary = summarize(
        many, results(many, {method: [80.0, 81.0, 82.5] for method in map(str, many.comparison.methods)})
    )
    assert list(summary.notes())[-1] == (
        "By chance alone, a difference in test accuracy is found for any of the 3 methods in at most 5 % of "
        "comparisons, and one in the generalization gap in at most another 5 %. The intervals of each hold for all "
        "methods at once."
    )
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    summary.show(console)
    console.file.close()
    text = (tmp_path / "out").read_text()
    assert "…" not in text
    assert "Late SAM (rho 0.1," in text
    assert [cells[2] for cells in summary.table().sections[""]] == ["1.20"] * 4


@pytest.mark.parametrize("width", [60, 80])
def test_narrow_terminal_keeps_the_labels(tmp_path: Path, width: int) -> None:
    many = recipe(methods=("sgd", "sam", "late_sam:start=0.5,rho=0.1"), seeds=3)
    summary = summarize(
        many, results(many, {method: [80.0, 81.0, 82.5] for method in map(str, many.comparison.methods)})
    )
    console = Console(width=width, record=True, file=(tmp_path / "out").open("w"))
    summary.show(console)
    console.file.close()
    text = (tmp_path / "out").read_text()
    assert "…" not in text
    for cells in summary.table().sections[""]:
        assert all(word in text for word in cells[0].split())
        assert cells[4] in text, "the test accuracy is not left out"


def test_records_are_one_json_line_each(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "metrics.jsonl", [record(1, 2.0, 1.0).to_json()])
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (
            [88.0, 88.1, 88.2],
            [81.0, 82.1, 83.1],
            "The gap is 6.97 points smaller; 5.90 of them are lower training accuracy.",
        ),
        (
            [88.0, 88.1, 88.2],
            [79.0, 80.1, 81.1],
            "The gap is 4.97 points smaller because training accuracy is 5.90 points lower; test accuracy is lower, "
            "too.",
        ),
        ([94.0, 94.0, 94.0], [84.0, 85.1, 86.1], None),  # it closes by the test accuracy alone
        ([94.0, 94.0, 94.0], [80.0, 81.0, 82.0], None),  # it does not close
    ],
)
def test_share_of_a_smaller_gap_that_is_lower_training_accuracy_is_stated(
    train: list[float], test: list[float], expected: str | None
) -> None:
    three = recipe(seeds=3)
    ends = {"sgd": ([94.0] * 3, [80.0, 81.0, 82.0]), "sam": (train, test)}
    found = {run: [record(4, *(values[run.seed] for values in ends[str(run.method)]))] for run in three.runs()}
    sentences = [note for note in summarize(three, found).notes() if note.startswith("The gap is")]
    assert sentences == ([] if expected is None else [expected])
