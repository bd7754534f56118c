"""Curves over compute and time: files, their bytes, and the measurements in them."""

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import matplotlib.image
import pytest
from tiny import image_record, recipe

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.figures import drawing, style
from steppe.experiments.figures.curves import EXTENTS, drawings, quantities, tracked
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results


def record(epoch: float, train: float, test: float) -> Record:
    return image_record(
        int(epoch), 1, 10, 100, 1.2, 2 - train / 50, train, 1.0, test, train - test, 60.0 * epoch, 100.0
    )


def draw(of: Recipe, measured: Results, folder: Path) -> list[Path]:
    return drawing.save_all(drawings(of, measured), folder)


def results(of: Recipe, tests: dict[str, list[float]]) -> Results:
    """Two measurements of each unit, at half of its compute and at `epochs`, and one at the end of further ones."""

    def records(run: Run) -> list[Record]:
        test = tests[str(run.method)][run.seed]
        points = sorted({2, of.comparison.epochs, run.standardized_epochs})
        return [record(epoch, 90.0 + epoch, test + epoch) for epoch in points]

    return {run: records(run) for run in of.runs()}


@pytest.mark.slow
def test_all_figures_are_the_same_bytes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "_STYLE", {**style._STYLE, "savefig.dpi": 50})  # drawn in less time
    two = recipe(seeds=2, extra_epochs=2)
    values = results(two, {"sgd": [80.0, 81.0], "sam": [82.0, 83.0]})
    first = draw(two, values, tmp_path / "a")
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.grid": False}):  # a reader's style is not the figure's
        second = draw(two, values, tmp_path / "b")
    drawn = [quantity.field for quantity in quantities(two)] + ["overview"]
    stems = {f"{name}{extent.suffix}" for name in drawn for extent in EXTENTS}
    names = {f"{stem}.{suffix}" for stem in {*stems, "pareto"} for suffix in ("png", "svg")}
    assert {path.name for path in first} == names
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        if a.suffix == ".svg":
            ElementTree.parse(a)
            assert not re.search(rb"<dc:date>", a.read_bytes())
        else:
            assert matplotlib.image.imread(a).std() > 0.05  # there is something on it


@pytest.mark.slow
def test_figures_show_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_SUFFIXES", ("svg",))
    two = recipe(seeds=2)
    figures = {"test_accuracy": True, "gap_seconds": True, "pareto": True, "train_loss": False}
    for folder, last in (("a", 83.0), ("b", 84.0)):
        measured = results(two, {"sgd": [80.0, 81.0], "sam": [82.0, last]})
        drawing.save_all((each for each in drawings(two, measured) if each.stem in figures), tmp_path / folder)
    for name, changes in figures.items():
        a, b = ((tmp_path / folder / f"{name}.svg").read_bytes() for folder in "ab")
        assert (a != b) is changes
    nothing_measured = drawings(recipe(), {run: [] for run in recipe().runs()})
    empty_axes = {"overview", "overview_seconds", "pareto"}  # each quantity over each extent
    drawing.save_all((each for each in nothing_measured if each.stem in empty_axes), tmp_path / "c")


def test_curves_are_drawn_over_compute_and_over_time() -> None:
    two = recipe(seeds=2)
    figures = {d.stem: d for d in drawings(two, results(two, {"sgd": [80.0, 81.0], "sam": [82.0, 83.0]}))}
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures["test_accuracy"].figure.axes[0].lines}
    assert lines == {"SGD": [[2.0, 82.5], [4.0, 84.5]], "SAM": [[2.0, 84.5], [4.0, 86.5]]}
    seconds = figures["test_accuracy_seconds"].figure.axes[0].lines[0].get_xdata()
    assert list(seconds) == [120.0, 240.0]


def test_sharpness_is_tracked_where_it_was_measured() -> None:
    two = recipe()
    values = results(two, {"sgd": [80.0], "sam": [82.0]})
    assert tracked(values) == []
    assert "sharpness" not in {d.stem for d in drawings(two, values)}
    some = {
        run: [dataclasses.replace(r, lambda_max=3.0 if run.method.name == "sam" else None) for r in records]
        for run, records in values.items()
    }
    (quantity,) = tracked(some)
    assert quantity.field == "lambda_max"
    (figure,) = (d.figure for d in drawings(two, some) if d.stem == "sharpness")
    assert [(line.get_label(), list(line.get_ydata())) for line in figure.axes[0].lines] == [("SAM", [3.0, 3.0])]
