from pathlib import Path

import pytest
from matplotlib.axes import Axes
from tiny import recipe

from steppe.experiments.analysis import controls as analysis
from steppe.experiments.analysis.metric_verdicts import AVERAGED, CONTROLS, EQUAL_COMPUTE, EQUAL_STEPS
from steppe.experiments.analysis.robustness import robustness_of
from steppe.experiments.analysis.summary import Summary, summarize
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures.controls import Row, drawings, new_figure
from steppe.experiments.storage.records import Record

MEAN, ERROR = "test_accuracy under corruptions", "test_calibration error"


def summary_of(of: Recipe) -> Summary:
    """Runs in which SAM is better than SGD at equal steps, too, but not than its averaged weights."""
    found = {}
    for run in of.runs():
        small, is_base = 0.1 * run.seed, run.method.name == "sgd"
        usual = {"train_loss": 0.1, "train_accuracy": 99.0, "test_loss": 0.5, "gap": 19.0}
        early = usual | {"test_accuracy": 78.0 + small, MEAN: 50.0 + small, ERROR: 9.0}
        late = usual | {"test_accuracy": 80.0 if is_base else 82.0 + small, MEAN: 60.0, ERROR: 9.0 if is_base else 5.0}
        averaged = {"test_accuracy (ema)": 84.0, f"{MEAN} (ema)": 61.0, f"{ERROR} (ema)": 8.0} if is_base else {}
        found[run] = [
            Record(2, 2.0, 10, 144, 1.0, early, 1.0, 72.0),
            Record(4, 4.0, 20, 288, 1.0, late | averaged, 2.0, 72.0),
        ]
    made = summarize(of, found)
    assert robustness_of(of, found) is not None
    assert analysis.verdicts(of, found)
    return made


def points(axes: Axes, phrase: str) -> list[float]:
    """The means beside a control, from top to bottom."""
    (line,) = (line for line in axes.lines if line.get_label() == phrase)
    return [float(x) for x in line.get_xdata()]  # type: ignore[union-attr]


def test_every_difference_to_a_control_is_drawn_and_better_is_on_the_right() -> None:
    of = recipe(methods=("sgd", "sam"), seeds=3)
    (drawing,) = drawings(of, summary_of(of))
    assert drawing.stem == "controls"
    (axes,) = drawing.figure.axes
    names = [name.get_text() for name in axes.get_yticklabels()]
    assert names == ["accuracy", "accuracy under corruptions", "calibration error"]
    assert points(axes, EQUAL_COMPUTE.phrase) == pytest.approx([2.1, 0.0, 4.0])  # less calibration error is better
    assert points(axes, EQUAL_STEPS.phrase) == pytest.approx([4.0, 9.9, 4.0])
    assert points(axes, AVERAGED.phrase) == pytest.approx([-1.9, -1.0, 3.0])
    assert "SAM better than SGD by, points" in axes.get_xlabel()


def test_rows_of_several_methods_name_them() -> None:
    of = recipe(methods=("sgd", "sam", "gsam"), seeds=3)
    summary = summary_of(of)
    assert [verdict.method for verdict in summary.verdicts_with_controls()] == ["sam"] * 3 + ["gsam"] * 3
    (drawing,) = drawings(of, summary)
    names = [name.get_text() for name in drawing.figure.axes[0].get_yticklabels()]
    assert names[::3] == ["SAM: accuracy", "GSAM: accuracy"]


def test_one_method_has_no_controls() -> None:
    of = recipe(methods=("sgd",), seeds=3)
    assert list(drawings(of, summary_of_one(of))) == []


def summary_of_one(of: Recipe) -> Summary:
    usual = {"train_loss": 0.1, "train_accuracy": 99.0, "test_loss": 0.5, "test_accuracy": 80.0, "gap": 19.0}
    return summarize(of, {run: [Record(4, 4.0, 20, 288, 1.0, usual, 2.0, 72.0)] for run in of.runs()})


def test_intervals_are_drawn_from_end_to_end_and_absent_controls_have_no_entry() -> None:
    figure = new_figure([Row("a", {EQUAL_COMPUTE: (1.0, 0.5, 1.5)}), Row("b", {EQUAL_STEPS: (2.0, 1.0, 3.0)})])
    (axes,) = figure.axes
    ends = [[(s[0][0], s[1][0]) for s in of.get_segments()] for of in axes.collections]  # type: ignore[attr-defined]
    assert ends == [[(0.5, 1.5)], [(1.0, 3.0)]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["at equal compute", "at equal steps"]


def test_folder_without_measurements_has_no_figure(tmp_path: Path) -> None:
    of = recipe(seeds=2, out=tmp_path)
    assert list(drawings(of, summarize(of, {}))) == []


def test_legend_is_whole_beside_long_labels() -> None:
    found = dict.fromkeys(CONTROLS.values(), (1.0, 0.5, 1.5))
    figure = new_figure([Row("a very long label of a setting, a method and a measure of it", found)])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
