from pathlib import Path

import browser as made_up
import pytest
from matplotlib.axes import Axes
from tiny import recipe

from steppe.experiments.analysis.summary import Summary
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures.drawing import Drawing
from steppe.experiments.figures.robustness import drawings


def drawn(of: Recipe, summary: Summary) -> Drawing:
    (drawing,) = drawings(of, summary)
    assert drawing.stem == "robustness"
    return drawing


def points(axes: Axes, label: str) -> list[float]:
    """The means of a method, from top to bottom."""
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return [float(x) for x in line.get_xdata()]  # type: ignore[union-attr]


def bars(axes: Axes) -> list[list[tuple[float, float]]]:
    return [[(float(a[0]), float(b[0])) for a, b in of.get_segments()] for of in axes.collections]  # type: ignore


def test_means_and_decided_intervals_are_those_of_the_summary(tmp_path: Path) -> None:
    of, _, summary = made_up.summary_of(made_up.folder(tmp_path / "run", recipe(seeds=3), measured=False, robust=True))
    robustness = summary.robustness
    assert robustness is not None
    accuracies, differences = drawn(of, summary).figure.axes
    names = [name.get_text() for name in accuracies.get_yticklabels()]
    assert names == [
        *("clean images", "all corrupted", "gaussian noise", "blur", "4-bit weights", "3-bit weights"),
    ]
    measures = [measure.name for measure in robustness.measures if measure.higher_is_better]
    (clean,) = (row.measures["test_accuracy"] for row in summary.rows if str(row.method) == "sam")
    expected = [clean.mean, *(robustness.values["sam"][name].mean for name in measures)]
    assert points(accuracies, "SAM") == pytest.approx(expected)
    decided = [summary.verdicts[0].first.difference]
    decided += [robustness.verdicts[name][0].first.difference for name in measures]
    assert points(differences, "SAM") == pytest.approx([difference.mean for difference in decided])
    assert not [line for line in differences.lines if line.get_label() == "SGD"], "the first method has no difference"
    (intervals,) = bars(differences)
    assert intervals == [pytest.approx(difference.interval) for difference in decided]


def test_one_method_has_accuracies_only_and_unmeasured_runs_have_no_figure(tmp_path: Path) -> None:
    alone = recipe(seeds=1, methods=("sgd",))
    of, _, summary = made_up.summary_of(made_up.folder(tmp_path / "one", alone, measured=False, robust=True))
    (axes,) = drawn(of, summary).figure.axes
    assert len(points(axes, "SGD")) == 6
    of, _, summary = made_up.summary_of(made_up.folder(tmp_path / "none", recipe(), measured=False))
    assert list(drawings(of, summary)) == []
